"""Convolutional networks for images of shape (channels, height, width).

They adapt to the channels and, from a least size on, to the height and width of the images. Max pooling stands before the
ReLU it meets: the maximum commutes with an increasing function, so the network is the same and the ReLU costs a quarter.
GroupNorm uses two groups, as is the custom in federated learning (Reddi et al. 2021, arXiv 2003.00295, after Hsieh et al.
2020, arXiv 1910.00189).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from fedsieve.errors import UsageError

Norm = Literal["none", "group", "batch"]
GROUPS = 2


def lenet(shape: tuple[int, ...], classes: int, norm: Norm = "none") -> nn.Sequential:
    """Make LeNet-5 (LeCun et al. 1998, Proc. IEEE 86(11)); 61,706 parameters on 28 x 28 pixels with 10 classes.

    Normalisation, where it is asked for, follows the pooling.

    Images smaller than the paper's 32 x 32 are padded by two pixels in the first convolution, as MNIST was there.
    Deviates: ReLU and max pooling for tanh and trained average pooling, all channels of the second convolution connected, a
    linear last layer.
    """
    channels, height, width = _image_shape("lenet", shape, least=16)
    padding = 2 if min(height, width) < 32 else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=padding),
        pool1=nn.MaxPool2d(2),
        norm1=_norm(norm, 6),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 16, 5),
        pool2=nn.MaxPool2d(2),
        norm2=_norm(norm, 16),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * height * width, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        fc3=nn.Linear(84, classes),
    )
    return nn.Sequential(layers)


def cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Make FedAvg's CNN (McMahan et al. 2017, arXiv 1602.05629, section 3): 1,663,370 parameters on MNIST."""
    channels, height, width = _image_shape("cnn", shape, least=4)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, classes),
        )
    )


def cnn6(shape: tuple[int, ...], classes: int, norm: Norm = "batch", dropout: float = 0.2) -> nn.Sequential:
    """Make FedSparsify's CNN of six convolutions (Stripelis et al. 2022, arXiv 2204.12430).

    64, 64, pool, 128, 128, pool, 128, 128, pool, 512, classes, with normalisation after the ReLU of the first two pools and
    dropout after the layer of 512. On CIFAR-10: 1,609,546 parameters without normalisation; with BatchNorm 1,610,314, of which
    384 are running statistics.
    """
    channels, height, width = _image_shape("cnn6", shape, least=8)
    return nn.Sequential(
        OrderedDict(
            stage1=_pair(channels, 64, norm),
            stage2=_pair(64, 128, norm),
            stage3=_pair(128, 128, "none"),
            flatten=nn.Flatten(),
            fc1=nn.Linear(128 * (height // 8) * (width // 8), 512),
            relu=nn.ReLU(),
            dropout=nn.Dropout(dropout) if dropout else nn.Identity(),
            fc2=nn.Linear(512, classes),
        )
    )


def _pair(inputs: int, channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(inputs, channels, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(channels, channels, 3, padding=1),
            pool=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            norm=_norm(norm, channels),
        )
    )


def resnet8(shape: tuple[int, ...], classes: int, norm: Norm = "group") -> nn.Sequential:
    """Make the smallest CIFAR ResNet, 6n + 2 layers with n = 1: 78,042 parameters on CIFAR-10. See `resnet20`."""
    channels, _, _ = _image_shape("resnet8", shape, least=8)
    return _resnet(channels, (16, 32, 64), 1, classes, norm)


def resnet20(shape: tuple[int, ...], classes: int, norm: Norm = "group") -> nn.Sequential:
    """Make the CIFAR ResNet of 6n + 2 layers with n = 3 (He et al. 2016, arXiv 1512.03385, section 4.2).

    272,474 parameters on CIFAR-10. Without normalisation the convolutions have biases, and the start must be made for that:
    with a kaiming or glorot start the signal grows from block to block.
    Deviates: 1 x 1 convolutions where a shortcut changes width (the paper pads with zeros), as is common in work on pruning.
    """
    channels, _, _ = _image_shape("resnet20", shape, least=8)
    return _resnet(channels, (16, 32, 64), 3, classes, norm)


def resnet18(shape: tuple[int, ...], classes: int, norm: Norm = "group") -> nn.Sequential:
    """Make ResNet-18 (He et al. 2016, arXiv 1512.03385, table 1) with a stem for small images: 3 x 3, no pooling.

    11,173,962 parameters on CIFAR-10 and 11,220,132 on CIFAR-100. Without normalisation: see `resnet20`.
    """
    channels, _, _ = _image_shape("resnet18", shape, least=8)
    return _resnet(channels, (64, 128, 256, 512), 2, classes, norm)


def _resnet(channels: int, widths: Sequence[int], blocks: int, classes: int, norm: Norm) -> nn.Sequential:
    """Chain a stem, a stage of `blocks` residual blocks for each width, global average pooling, and a linear layer."""
    inputs = widths[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv_norm(channels, inputs, 3, 1, norm), relu=nn.ReLU())
    for depth, width in enumerate(widths, start=1):
        strides = [1 if depth == 1 else 2] + [1] * (blocks - 1)
        stage = [Residual(inputs if i == 0 else width, width, stride, norm) for i, stride in enumerate(strides)]
        layers[f"stage{depth}"] = nn.Sequential(*stage)
        inputs = width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
    return nn.Sequential(layers)


class Residual(nn.Module):
    """Add the input, or its 1 x 1 projection where the shape changes, to two convolutions of it: relu(f(x) + x)."""

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=bias)
        self.norm1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = _norm(norm, channels)
        same = inputs == channels and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, channels, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv_norm(inputs: int, channels: int, kernel: int, stride: int, norm: Norm) -> nn.Sequential:
    conv = nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2, bias=norm == "none")
    return nn.Sequential(OrderedDict(conv=conv, norm=_norm(norm, channels)))


def vgg11(shape: tuple[int, ...], classes: int, norm: Norm = "batch") -> nn.Sequential:
    """Make VGG-11 (configuration A) with one linear layer: 9,231,114 parameters on CIFAR-10. See `vgg16`."""
    return _vgg("vgg11", shape, classes, (1, 1, 2, 2, 2), norm)


def vgg16(shape: tuple[int, ...], classes: int, norm: Norm = "batch") -> nn.Sequential:
    """Make VGG-16 (Simonyan and Zisserman 2015, arXiv 1409.1556, configuration D) with one linear layer, as on CIFAR.

    With BatchNorm and 100 classes 14,782,884 numbers, of which 8,448 are running statistics (the count of Stripelis et al.
    2022, arXiv 2204.12430). Images larger than 32 x 32 are averaged over what the last pooling leaves.
    """
    return _vgg("vgg16", shape, classes, (2, 2, 3, 3, 3), norm)


def _vgg(name: str, shape: tuple[int, ...], classes: int, depths: Sequence[int], norm: Norm) -> nn.Sequential:
    inputs, _, _ = _image_shape(name, shape, least=32)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (channels, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True), start=1):
        convs: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, depth + 1):
            convs[f"conv{i}"] = nn.Conv2d(inputs, channels, 3, padding=1)
            convs[f"norm{i}"] = _norm(norm, channels)
            if i == depth:
                convs["pool"] = nn.MaxPool2d(2)
            convs[f"relu{i}"] = nn.ReLU()
            inputs = channels
        layers[f"stage{stage}"] = nn.Sequential(convs)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
    return nn.Sequential(layers)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(GROUPS, channels) if norm == "group" else nn.Identity()


def _image_shape(model: str, shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise UsageError(
            f"model {model!r} takes images of shape (channels, height, width), {least} x {least} or larger;\n"
            f"one example of the data has shape {shape}.\n"
            "Set model.name to one that fits (`fedsieve list models`), or data.name to other images."
        )
    channels, height, width = shape
    return channels, height, width
