"""Compaction: dead channels go, the function and further training stay."""

import copy
import json
import operator
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsieve import DataError, FedSparsify, UsageError, cli, fit
from fedsieve.finish import compact as finish
from fedsieve.local.executor import Executor
from fedsieve.models import CATALOGUE, ModelSpec, build
from fedsieve.models.compact import compact
from fedsieve.params import Kind, Masks, Params
from fedsieve.settings import Engine, Local, Model
from fedsieve.streams import Streams
from test_models import classes_of, make, shape_of

NETS = [
    ("cnn", "default"), ("cnn6", "batch"), ("cnn6", "none"), ("lenet", "default"), ("resnet8", "none"), ("resnet8", "batch"),
    ("resnet8", "group"), ("resnet20", "batch"), ("vgg11", "batch"), ("mlp", "default"), ("tabular", "default"),
    ("charlstm", "default"),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def filled(spec, seed=0, bias=0.1):
    """Parameters as after training: weights that keep the signal's size, biases, norms and statistics at random."""
    draw = torch.Generator().manual_seed(seed)
    params = spec.initial("kaiming", Streams(seed))
    for slot in spec.layout.slots:
        noise = torch.randn(slot.shape, generator=draw)
        if slot.name.endswith("running_var"):
            params[slot.name].copy_(noise.abs() + 0.5)
        elif slot.kind is not Kind.WEIGHT:
            params[slot.name].add_(noise, alpha=bias)
    return params


def pruned(spec, density, seed=0, dead=0.3, least=2):
    """Masks of a density at random, with a share of the rows and of the columns of each tensor pruned whole.

    Each row that is left keeps at least `least` weights, so that the signal comes through.
    """
    draw = torch.Generator().manual_seed(seed)
    masks = Masks.full(spec.layout)
    first, *_, last = spec.layout.masked_slots
    for slot in spec.layout.masked_slots:
        mask = masks[slot.name]
        rows = mask.view(len(mask), -1)
        rows.copy_(torch.rand(rows.shape, generator=draw) < density)
        rows.scatter_(1, torch.randint(rows.shape[1], (len(rows), least), generator=draw), True)
        if slot is not last:
            mask[torch.rand(mask.shape[0], generator=draw) < dead] = False
        if slot is not first:
            mask[:, torch.rand(mask.shape[1], generator=draw) < dead] = False
    return masks


def scale_up(spec, params, masks):
    """Make up for the weights that are pruned, so that no layer's signal fades."""
    for slot in spec.layout.masked_slots:
        params[slot.name].div_(max(masks[slot.name].float().mean(), 1e-3) ** 0.5)


def inputs(name, count=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    if name == "charlstm":
        return torch.randint(65, (count, 20), generator=draw)
    return torch.randn(count, *shape_of(name), generator=draw)


def run(spec, params, x, *, training=False, double=False):
    module = copy.deepcopy(spec.module).train(training)
    tensors = {name: tensor.double() if double else tensor for name, tensor in params.items()}
    return functional_call(
        module.double() if double else module, tensors, x.double() if double and x.is_floating_point() else x
    )


def check_function(spec, params, masks, small, x):
    """Outputs agree to 1e-6 of the largest, in float32 and float64, and say something about the input."""
    for double in (False, True):
        large = run(spec, params.under(masks), x, double=double)
        assert (large - run(small.spec, small.params, x, double=double)).abs().max() <= 1e-6 * large.abs().max()
    small.spec.module.eval()
    assert torch.equal(small.spec.module(x), run(small.spec, small.params, x))
    return large


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.02])
@pytest.mark.parametrize(("name", "norm"), NETS)
def test_the_function_of_every_network_stays(name, norm, density, training):
    spec = make(name, norm=norm)
    params, masks = filled(spec), pruned(spec, density)
    scale_up(spec, params, masks)
    small = compact(spec, params, masks, training=training)
    large = check_function(spec, params, masks, small, inputs(name))
    assert (large.std(0).max() > 1e-3 * large.abs().max()).all()
    share = small.spec.layout.size / spec.layout.size
    if name == "charlstm" or norm == "group":
        assert share == 1
    else:
        assert share < (0.85 if name.startswith("resnet") else 0.75), share


def test_every_network_of_the_catalogue_is_traced():
    from fedsieve.models.channels import channels

    for entry in CATALOGUE:
        assert channels(make(entry.name), training=True).steps, entry.name


def test_flops_and_slots_are_those_of_the_small_module():
    for name, norm in NETS[:-1]:
        spec = make(name, norm=norm)
        small = compact(spec, filled(spec), pruned(spec, 0.05), training=False).spec
        measured = ModelSpec.of(small.module, spec.example)
        assert dict(small.flops) == dict(measured.flops)
        assert small.layout == measured.layout
        assert small.loss is spec.loss
        assert torch.equal(small.initial("module", Streams(0)).flat, measured.initial("module", Streams(0)).flat)
        for layer in small.module.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels)
            if isinstance(layer, nn.Linear):
                assert layer.weight.shape == (layer.out_features, layer.in_features)
            if isinstance(layer, nn.BatchNorm2d):
                assert len(layer.running_mean) == layer.num_features


def test_maskable_dense_and_block_carry_over():
    spec = build(Model(name="cnn", maskable="all", dense=("fc2.weight",)), shape_of("cnn"), 10)
    masks = Masks(spec.layout, torch.rand(spec.layout.maskable, generator=torch.Generator().manual_seed(0)) < 0.002)
    small = compact(spec, filled(spec), masks, training=True)
    assert small.spec.layout.size < 0.1 * spec.layout.size
    for slot, whole in zip(small.spec.layout.slots, spec.layout.slots, strict=True):
        assert (slot.name, slot.kind, slot.maskable, slot.block) == (whole.name, whole.kind, whole.maskable, whole.block)
    assert not small.spec.layout.named["fc2.weight"].maskable
    again = pickle.loads(pickle.dumps(small.spec))
    assert again.layout.fingerprint == small.spec.layout.fingerprint != spec.layout.fingerprint


def test_shrink_and_expand_are_inverse():
    spec = make("resnet8", norm="batch")
    params, masks = filled(spec), pruned(spec, 0.05)
    small = compact(spec, params, masks, training=True)
    other = Params(small.spec.layout, torch.randn(small.spec.layout.size))
    whole = small.expand(other, params)
    assert torch.equal(small.shrink(whole).flat, other.flat)
    assert not small.filling.any()
    untouched = torch.ones(spec.layout.size, dtype=torch.bool)
    untouched[small.origin] = False
    assert torch.equal(whole.flat[untouched], params.flat[untouched])
    assert untouched.any()
    assert len(set(small.origin.tolist())) == small.spec.layout.size
    assert small.shrink(Params(spec.layout, torch.stack([params.flat] * 2))).flat.shape == (2, small.spec.layout.size)
    for slot in small.spec.layout.slots:
        kept = small.shrink_masks(masks)[slot.name] if slot.maskable else None
        values = small.shrink(params)[slot.name]
        assert torch.equal(values if kept is None else values * kept, small.params[slot.name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(("name", "norm"), NETS[:-1])
def test_compacting_twice_removes_nothing_more(name, norm, multiple, training):
    spec = make(name, norm=norm, **({"dropout": 0.0} if name == "cnn6" else {}))
    params, masks = filled(spec), pruned(spec, 0.05)
    once = compact(spec, params, masks, training=training, multiple=multiple)
    twice = compact(once.spec, once.params, once.shrink_masks(masks), training=training, multiple=multiple)
    assert twice.origin.tolist() == list(range(once.spec.layout.size))
    assert torch.equal(twice.params.flat, once.params.flat)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "norm"), NETS[:-1])
def test_widths_are_multiples_or_whole(name, norm, training):
    spec = make(name, norm=norm)
    params, masks = filled(spec), pruned(spec, 0.05)
    scale_up(spec, params, masks)
    bare, filled_up = (compact(spec, params, masks, training=training, multiple=multiple) for multiple in (1, 8))
    check_function(spec, params, masks, filled_up, inputs(name))
    odd = 0
    for slot in spec.layout.masked_slots:
        width, least = (each.spec.layout.named[slot.name].shape[0] for each in (filled_up, bare))
        assert width % 8 == 0 or width == slot.shape[0]
        assert width == min(slot.shape[0], -(-least // 8) * 8) or norm == "group"
        odd += least % 8 != 0
    assert odd


def test_a_network_pruned_whole_keeps_one_unit_a_layer():
    for name, norm in NETS[:-1]:
        spec = make(name, norm=norm)
        params = filled(spec)
        masks = Masks(spec.layout, torch.zeros(spec.layout.maskable, dtype=torch.bool))
        small = compact(spec, params, masks, training=False)
        check_function(spec, params, masks, small, inputs(name))
        if name == "mlp":
            assert [slot.shape for slot in small.spec.layout.masked_slots] == [(1, 784), (1, 1), (10, 1)]


# ---- by hand


class Tiny(nn.Module):
    """Two inputs, three neurons, two outputs."""

    def __init__(self, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2, bias=bias)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def tiny(**tensors):
    spec = ModelSpec.of(Tiny(bias="b_bias" in tensors), torch.zeros(1, 2))
    params = Params.zeros(spec.layout)
    for name, value in tensors.items():
        params[name.replace("_", ".")].copy_(torch.tensor(value))
    return spec, params, Masks(spec.layout, params.maskable != 0)


def test_a_constant_neuron_is_taken_up_by_the_next_bias():
    """Neuron 0 is the constant relu(2) = 2, neuron 1 is alive, neuron 2 is not read: worked out by hand."""
    spec, params, masks = tiny(
        a_weight=[[0.0, 0.0], [1.0, -1.0], [3.0, 0.0]],
        a_bias=[2.0, 0.5, 1.0],
        b_weight=[[5.0, 7.0, 0.0], [0.0, -1.0, 0.0]],
        b_bias=[1.0, 0.25],
    )
    small = compact(spec, params, masks, training=False)
    assert {name: tensor.tolist() for name, tensor in small.params.items()} == {
        "a.weight": [[1.0, -1.0]],
        "a.bias": [0.5],
        "b.weight": [[7.0], [-1.0]],
        "b.bias": [11.0, 0.25],
    }
    # the vector: a.weight 0..5, b.weight 6..11, a.bias 12..14, b.bias 15..16
    assert small.origin.tolist() == [2, 3, 7, 10, 13, 15, 16]
    assert small.spec.flops == {"a.weight": 4, "a.bias": 0, "b.weight": 4, "b.bias": 0}
    module = small.spec.module
    assert (module.a.in_features, module.a.out_features, module.b.in_features, module.b.out_features) == (2, 1, 1, 2)
    in_training = compact(spec, params, masks, training=True)
    assert in_training.params["a.bias"].tolist() == [2.0, 0.5]
    assert in_training.params["b.bias"].tolist() == [1.0, 0.25]


def test_a_constant_is_not_taken_up_where_there_is_no_bias():
    weights = {"a_weight": [[0.0, 0.0], [1.0, -1.0], [3.0, 0.0]], "b_weight": [[5.0, 7.0, 0.0], [0.0, -1.0, 0.0]]}
    spec, params, masks = tiny(a_bias=[2.0, 0.5, 1.0], **weights)
    assert compact(spec, params, masks, training=False).params["a.bias"].tolist() == [2.0, 0.5]
    spec, params, masks = tiny(a_bias=[-2.0, 0.5, 1.0], **weights)
    for training in (False, True):
        assert compact(spec, params, masks, training=training).params["a.bias"].tolist() == [0.5]


def test_a_bias_that_still_moves_is_no_constant():
    spec, params, masks = tiny(
        a_weight=[[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]], a_bias=[-2.0, 0.5, -1.0], b_weight=[[5.0, 7.0, 1.0], [0.0, -1.0, 1.0]]
    )
    momentum = torch.zeros(spec.layout.trainable)
    momentum[12] = -0.1
    moving = compact(spec, params, masks, training=True, momentum=momentum)
    assert moving.params["a.bias"].tolist() == [-2.0, 0.5]
    assert compact(spec, params, masks, training=True).params["a.bias"].tolist() == [0.5]


def test_a_constant_that_another_reader_trains_is_none():
    """Neuron 0 is -0.1, behind a ReLU 0; but the output reads it directly too, so training lifts it above 0."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x):
            y = self.a(x)
            return self.c(F.relu(self.b(F.relu(y)))) + self.d(y)

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of(Net(), x[:1])
    params, masks = filled(spec), Masks.full(spec.layout)
    masks["a.weight"][0] = False
    masks["b.weight"][2, 1:] = False  # reads neuron 0 alone
    params["a.bias"][0] = params["b.bias"][2] = -0.1
    params["d.weight"][:, 0] = torch.tensor([2.0, -2.0])
    small = compact(spec, params, masks, training=True)
    large = check_training(spec, params, masks, small, x, torch.zeros(6, dtype=torch.int64), momentum=0.5, lr=0.1)
    assert large["a.bias"][0] > 0
    assert [slot.shape for slot in small.spec.layout.masked_slots] == [slot.shape for slot in spec.layout.masked_slots]


def test_padding_prevents_folding_of_all_but_zero():
    x = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    for padding, mode, constant, left in [(1, "zeros", 1.0, 2), ("same", "zeros", 1.0, 2), (1, "reflect", 1.0, 2),
                                          (1, "zeros", -1.0, 1), (0, "zeros", 1.0, 1), ("valid", "zeros", 1.0, 1)]:  # fmt: skip
        module = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=padding, padding_mode=mode), nn.Flatten()
        )
        spec = ModelSpec.of(module, x[:1])
        params, masks = filled(spec, bias=1.0), Masks.full(spec.layout)
        masks["0.weight"][1] = False
        params["0.bias"][1] = constant
        small = compact(spec, params, masks, training=False)
        assert len(small.params["0.bias"]) == left
        check_function(spec, params, masks, small, x)


def test_average_pooling_over_padding_keeps_zeros_only():
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    for padding, constant, left in [(0, 1.0, 1), (1, 1.0, 2), (1, -1.0, 1)]:
        pool = nn.AvgPool2d(2, padding=padding)
        size = (6 + 2 * padding) // 2
        module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(2 * size * size, 3))
        spec = ModelSpec.of(module, x[:1])
        params, masks = filled(spec), Masks.full(spec.layout)
        masks["0.weight"][1] = False
        params["0.bias"][1] = constant
        small = compact(spec, params, masks, training=False)
        assert len(small.params["0.bias"]) == left
        assert small.params["4.weight"].shape == (3, left * size * size)
        check_function(spec, params, masks, small, x)


def test_channels_that_are_added_go_together():
    """A channel of a residual network goes if no summand is alive, or if nothing reads the sum."""
    spec = make("resnet8", norm="none")
    params, x = filled(spec), inputs("resnet8")
    first = ["stem.conv", "stage1.0.conv2"]
    for dead, width in ([first, 15], [first[:1], 16], [first[1:], 16]):
        masks = Masks.full(spec.layout)
        for layer in dead:
            masks[f"{layer}.weight"][3] = False
            params[f"{layer}.bias"][3] = -0.5
        for training in (False, True):
            small = compact(spec, params, masks, training=training)
            assert [len(small.params[f"{layer}.weight"]) for layer in first] == [width, width]
            check_function(spec, params, masks, small, x)
    masks = Masks.full(spec.layout)
    for reader in ("stage1.0.conv1", "stage2.0.conv1", "stage2.0.shortcut.conv"):
        masks[f"{reader}.weight"][:, 5] = False
    small = compact(spec, params, masks, training=True)
    assert [len(small.params[f"{layer}.weight"]) for layer in first] == [15, 15]
    masks["stage2.0.shortcut.conv.weight"][0, 5] = True
    assert len(compact(spec, params, masks, training=True).params["stem.conv.weight"]) == 16


def test_a_group_of_group_norm_goes_whole_or_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3), nn.GroupNorm(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))

    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of(Net(), x[:1])
    params, masks = filled(spec), Masks.full(spec.layout)
    masks["fc.weight"][:, 2] = False
    assert len(compact(spec, params, masks, training=True).params["conv.bias"]) == 6
    masks["fc.weight"][:, 3] = False
    for training in (False, True):
        small = compact(spec, params, masks, training=training)
        assert len(small.params["conv.bias"]) == 4
        assert (small.spec.module.norm.num_groups, small.spec.module.norm.num_channels) == (2, 4)
        check_function(spec, params, masks, small, x)


def test_batch_norm_of_a_constant_is_judged_in_both_modes():
    """After BatchNorm and ReLU a constant is 0 in training if the shift is negative, in evaluation by the statistics."""
    x = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1), nn.Flatten())
    spec = ModelSpec.of(module, x[:1])
    # bias, running mean (variance 1, scale 1), shift -> widths after training, in training
    for bias, mean, shift, after, during in [
        (0.5, 0.0, -0.6, 1, 1), (0.5, 0.0, -0.4, 2, 2), (0.5, 0.2, 0.1, 2, 2), (0.0, 0.5, 0.1, 1, 2),
        (0.0, 0.0, 0.0, 1, 1), (0.5, 0.6, 0.0, 1, 2),
    ]:  # fmt: skip
        params, masks = filled(spec), Masks.full(spec.layout)
        masks["0.weight"][1] = False
        for name, value in {"0.bias": bias, "1.running_mean": mean, "1.bias": shift, "1.weight": 1, "1.running_var": 1}.items():
            params[name][1] = value
        for training, width in ((False, after), (True, during)):
            small = compact(spec, params, masks, training=training)
            assert len(small.params["0.bias"]) == width, (bias, mean, shift, training)
            check_function(spec, params, masks, small, x)


# ---- what is not understood stays


class Own(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between, **layers):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.between = between

    def forward(self, x):
        return self.fc(self.two(self.between(self, self.one(x))).mean((2, 3)))


def shared(self, y):
    return self.again(self.again(y))


def branch(self, y):
    return y + y.relu_()


UNKNOWN = {
    "product": (lambda self, y: y * 2, {}),
    "a product with itself": (lambda self, y: y * y, {}),
    "instance norm": (lambda self, y: self.norm(y), {"norm": nn.InstanceNorm2d(4)}),
    "layer norm": (lambda self, y: self.norm(y), {"norm": nn.LayerNorm((4, 5, 5))}),
    "indexing": (lambda self, y: y[:, [3, 1, 0, 2]], {}),
    "depthwise": (lambda self, y: self.conv(y), {"conv": nn.Conv2d(4, 4, 1, groups=4)}),
    "used twice": (shared, {"again": nn.Conv2d(4, 4, 1)}),
    "size of the channels": (lambda self, y: y / y.size(1), {}),
    "softmax": (lambda self, y: y.softmax(1), {}),
    "weights read elsewhere": (lambda self, y: y + self.one.weight.sum(), {}),
    "changed in place": (lambda self, y: y.mul_(2).relu(), {}),
    "changed in place and read before": (branch, {}),
    "changed in place in a function": (lambda self, y: y + F.leaky_relu(y, 0.1, True), {}),
    "a path that hangs on the input": (lambda self, y: y if y.sum() > 0 else -y, {}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_understood_protects(case, training):
    between, layers = UNKNOWN[case]
    x = torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of(Own(between, **layers), x[:1])
    params, masks = filled(spec), Masks.full(spec.layout)
    masks["one.weight"][1] = False
    params["one.bias"][:2] = torch.tensor([1.0, -1.0])
    masks["two.weight"][:, 2] = False
    small = compact(spec, params, masks, training=training)
    assert len(small.params["one.bias"]) == 4
    check_function(spec, params, masks, small, x)


KNOWN = {
    "functions": lambda self, y: F.avg_pool2d(F.max_pool2d(F.relu(y), 2, 1), 2, stride=1),
    "a padded average": lambda self, y: F.avg_pool2d(y, 2, padding=1),
    "in place": lambda self, y: F.relu(y, inplace=True),
    "a method in place": lambda self, y: y.relu_(),
    "added in place": lambda self, y: torch.relu(self.norm(y).add_(y)),
    "added by +=": lambda self, y: operator.iadd(self.norm(y), y),
    "batch norm": lambda self, y: self.norm(y).relu(),
    "added to itself": lambda self, y: y + y,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", KNOWN)
def test_functions_and_methods_are_understood(case, training):
    x = torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of(Own(KNOWN[case], norm=nn.BatchNorm2d(4)), x[:1])
    params, masks = filled(spec), Masks.full(spec.layout)
    masks["two.weight"][:, 2] = False
    small = compact(spec, params, masks, training=training)
    assert len(small.params["one.bias"]) == 3
    check_function(spec, params, masks, small, x)


def test_flattening_and_concatenation_are_understood():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.mix = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(7, 5, 2)
            self.a, self.b = nn.Linear(5 * 16, 6), nn.Linear(5 * 16, 6)

        def forward(self, x):
            y = self.mix(torch.cat([self.one(x).relu(), torch.tanh(self.two(x))], 1))
            return self.a(y.view(y.size(0), -1)) + self.b(torch.flatten(y, 1)) + self.b_of(y)

        def b_of(self, y):
            return y.reshape(y.shape[0], -1).sum(1, keepdim=True) * 0

    x = torch.randn(3, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    for protects in (True, False):
        module = Net()
        if not protects:
            module.b_of = lambda y: 0
        spec = ModelSpec.of(module, x[:1])
        params, masks = filled(spec), Masks.full(spec.layout)
        masks["mix.weight"][:, 4] = False
        masks["one.weight"][2] = False
        for fc in "ab":
            masks[f"{fc}.weight"].view(6, 5, 16)[:, 1:3] = False
        masks["a.weight"].view(6, 5, 16)[3, 2, 7] = True
        small = compact(spec, params, masks, training=False)
        assert [len(small.params[f"{layer}.bias"]) for layer in ("one", "two", "mix")] == [2, 3, 5 if protects else 4]
        check_function(spec, params, masks, small, x)


def test_sequences_of_features_are_compacted_where_they_are_last():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4 * 7, 2)

        def forward(self, x):
            return self.c(self.b(F.relu(self.a(x))).flatten(1))

    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of(Net(), x[:1])
    params, masks = filled(spec), Masks.full(spec.layout)
    masks["b.weight"][:, 1] = False
    masks["c.weight"].view(2, 7, 4)[:, :, 2] = False
    small = compact(spec, params, masks, training=True)
    assert [slot.shape for slot in small.spec.layout.masked_slots] == [(4, 3), (3, 4), (2, 21)]
    check_function(spec, params, masks, small, x)


def test_layers_with_hooks_or_tied_weights_stay():
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for change in ("hook", "tied", "forward", "frozen", None):
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        if change == "hook":
            module[2].register_forward_hook(lambda layer, args, output: output + 1)
        elif change == "tied":
            module[2].weight = module[0].weight
        elif change == "forward":
            module[2].forward = lambda x: x + 1
        elif change == "frozen":
            module[2].weight.requires_grad_(False)
        spec = ModelSpec.of(module, x[:1])
        params, masks = filled(spec), Masks.full(spec.layout)
        if change in (None, "hook"):
            masks["2.weight"][:, 1] = False
        masks["4.weight"][:, 2] = False
        small = compact(spec, params, masks, training=True)
        assert len(small.params["0.weight"]) == (3 if change is None else 4)
        check_function(spec, params, masks, small, x)


# ---- random masks


def small_conv():
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 4, 7), nn.ReLU(), nn.Linear(7, 3))


class SmallResidual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.one, self.two, self.three = (nn.Conv2d(i, 4, 3, padding=1) for i in (2, 4, 4, 4))
        self.norm, self.norm2 = norm(), norm()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.two(F.relu(self.one(x)))) + x)
        x = F.relu(self.norm2(self.three(x)) + x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


RANDOM = {
    "conv": small_conv,
    "residual": lambda: SmallResidual(nn.Identity),
    "residual batch": lambda: SmallResidual(lambda: nn.BatchNorm2d(4)),
    "residual group": lambda: SmallResidual(lambda: nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize("kind", RANDOM)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20), density=st.sampled_from([0.02, 0.05, 0.1, 0.2, 0.5]),
    maskable=st.sampled_from(["weights", "all"]), training=st.booleans(), multiple=st.integers(1, 4),
    momentum=st.sampled_from([0.0, 0.9]),
)  # fmt: skip
def test_random_masks_keep_function_and_training(kind, seed, density, maskable, training, multiple, momentum):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, 6, 6, generator=draw)
    spec = ModelSpec.of(RANDOM[kind](), x[:1], maskable=maskable)
    params = filled(spec, seed, bias=0.5)
    for slot in spec.layout.slots:
        if slot.kind in (Kind.BIAS, Kind.NORM) and torch.rand((), generator=draw) < 0.3:
            params[slot.name].clamp_(max=0)
    masks = Masks(spec.layout, torch.rand(spec.layout.maskable, generator=draw) < density)
    small = compact(spec, params, masks, training=training, multiple=multiple)
    large, little = run(spec, params.under(masks), x), run(small.spec, small.params, x)
    assert (large - little).abs().max() <= 1e-6 * max(1e-3, float(large.abs().max()))
    if training:
        check_training(spec, params, masks, small, x, torch.arange(5) % 3, momentum=momentum)


# ---- training


def train(spec, params, masks, x, y, momentum, steps, lr):
    """Masked SGD as the textbook has it; returns parameters, losses, velocity."""
    values = {name: tensor.clone() for name, tensor in params.under(masks).items()}
    trained = [slot for slot in spec.layout.slots if slot.kind is not Kind.BUFFER]
    velocity = {slot.name: torch.zeros(slot.shape) for slot in trained}
    module, losses = copy.deepcopy(spec.module).train(), []
    for step in range(steps):
        torch.manual_seed(step)
        leaves = {slot.name: values[slot.name].requires_grad_() for slot in trained}
        loss = spec.loss(functional_call(module, values, x), y)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for slot, gradient in zip(trained, gradients, strict=True):
                gradient = gradient * masks[slot.name] if slot.maskable else gradient
                velocity[slot.name] = momentum * velocity[slot.name] + gradient
                values[slot.name] = values[slot.name].detach() - lr * velocity[slot.name]
    end = Params(spec.layout, torch.cat([values[slot.name].detach().flatten() for slot in spec.layout.slots]))
    return end, losses


def check_training(spec, params, masks, small, x, y, momentum, steps=4, lr=0.02, atol=1e-5):
    """Steps of the small network are those of the large one; what is not in it does not move there, statistics apart."""
    large, losses = train(spec, params, masks, x, y, momentum, steps, lr)
    little, small_losses = train(small.spec, small.params, small.shrink_masks(masks), x, y, momentum, steps, lr)
    scale = max(1.0, *map(abs, losses))
    assert torch.allclose(torch.tensor(losses), torch.tensor(small_losses), rtol=0, atol=atol * scale)
    whole = small.expand(little, params.under(masks))
    filling = small.filling[small.spec.layout.trainable :]
    largest = max(1.0, float(large.trainable.abs().max()))
    assert (whole.trainable - large.trainable).abs().max() <= atol * largest
    torch.testing.assert_close(
        small.shrink(large).statistics[~filling], little.statistics[~filling], rtol=1e-4, atol=atol * largest
    )
    for training in (False, True):
        outputs = [run(*each, x, training=training) for each in ((spec, large), (spec, whole), (small.spec, little))]
        for other in outputs[1:] if not training or not any(isinstance(m, nn.Dropout) for m in spec.module.modules()) else ():
            assert (outputs[0] - other).abs().max() <= 10 * atol * max(1.0, float(outputs[0].abs().max()))
    return large


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("name", "norm"), [net for net in NETS if net[0] not in ("cnn6", "vgg11", "resnet20", "charlstm")] + [("cnn6", "batch")]
)
def test_training_goes_on_as_in_the_large_network(name, norm, momentum):
    spec = make(name, norm=norm, **({"dropout": 0.3} if name in ("tabular", "cnn6") else {}))
    params, masks = filled(spec), pruned(spec, 0.1)
    for slot in spec.layout.slots:
        if slot.kind is Kind.BIAS:
            params[slot.name].clamp_(max=0.02)
    small = compact(spec, params, masks, training=True)
    assert small.spec.layout.size < 0.9 * spec.layout.size or norm == "group"
    x = inputs(name, 6)
    large = check_training(spec, params, masks, small, x, torch.arange(6) % classes_of(name), momentum)
    assert (large.trainable - params.under(masks).trainable).abs().max() > 1e-3


def test_the_executor_trains_the_small_network_as_the_large_one(digits):
    """Dropout, BatchNorm, momentum, and convolutions by other algorithms, whose rounding differs with the width."""
    spec = build(Model(name="cnn6", norm="batch"), digits.shape, digits.classes)
    params, masks = filled(spec), pruned(spec, 0.1)
    small = compact(spec, params, masks, training=True)
    assert small.spec.layout.size < 0.7 * spec.layout.size
    assert not small.filling.any()
    local, order = Local(lr=0.02, momentum=0.5, batch=16), np.arange(48)
    large = Executor(spec, local, 1).train(params, digits.train, order, Streams(0), masks=masks)
    little = Executor(small.spec, local, 1).train(
        small.params, digits.train, order, Streams(0), masks=small.shrink_masks(masks)
    )
    assert large.loss == pytest.approx(little.loss, rel=1e-5)
    whole = small.expand(little.params, params.under(masks))
    assert (whole.trainable - large.params.trainable).abs().max() < 1e-4 < (large.params - params).trainable.abs().max()


# ---- export


OWN = """
from torch import nn


def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, classes))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with a model of one's own."""
    (tmp_path / "ownnet.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    sys.modules.pop("ownnet", None)


@pytest.mark.parametrize("model", ["mlp", "ownnet:net"])
def test_the_compact_export_is_the_model(place, model, capsys):
    words = f"run fedsparsify --data digits --model {model} --algorithm.density 0.03 --engine.rounds 6 --out a".split()
    if model == "mlp":
        words += ["--model.hidden", "60", "40"]
    assert cli.main([*words, "--data.train_limit", "300", "--data.clients", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["export", "a", "--compact", "--multiple", "4"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    sizes = json.loads((place / "a/export/compact.json").read_text())
    module = finish.load(place / "a/export/compact.safetensors")
    whole = torch.load(place / "a/export/model.pt")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        assert sizes["widths"][name] == {"before": list(whole[f"{name}.weight"].shape), "after": list(layer.weight.shape)}
        assert re.search(rf"^{name} +{whole[f'{name}.weight'].shape[0]} +{layer.out_features} ", out, re.MULTILINE)
        assert layer.out_features % 4 == 0 or layer.out_features == len(whole[f"{name}.weight"])
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert sizes["parameters"]["after"] == parameters < 0.7 * sizes["parameters"]["before"]
    assert sizes["flops"]["after"] == sum(2 * layer.weight.numel() for layer in layers.values()) < sizes["flops"]["before"]
    assert f"{sizes['parameters']['before']:,} -> {parameters:,}" in out
    assert not module.training

    large = build(Model(name=model, hidden=(60, 40) if model == "mlp" else ()), (1, 8, 8), 10).module.eval()
    large.load_state_dict(whole, strict=False)
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (large(x) - module(x)).abs().max() <= 1e-6 * large(x).abs().max()


def test_export_refuses_what_it_cannot_compact(place, small, digits, capsys):
    def refused(code, *words):
        assert cli.main([str(word) for word in words]) == code
        err = capsys.readouterr().err
        assert len(err.splitlines()) <= 8
        return err

    settings = {"data": digits, "engine": Engine(rounds=2), "local": Local(epochs=1)}
    fit(FedSparsify(density=0.5), model=small, out=place / "python", **settings)
    assert "python/config.toml" in refused(2, "export", "python", "--compact")
    assert cli.main(["run", "fedavg", "--data", "digits", "--model", "ownnet:net", "--engine.rounds", "1", "--out", "own"]) == 0
    capsys.readouterr()
    assert "--multiple 0" in refused(2, "export", "own", "--compact", "--multiple", 0)
    assert "--compact" in refused(2, "export", "own", "--multiple", 8)
    assert cli.main(["export", "own", "--compact"]) == 0
    (place / "ownnet.py").write_text(OWN.replace("nn.BatchNorm1d(30), ", ""))
    sys.modules.pop("ownnet")
    assert "another network" in refused(2, "export", "own", "--compact")
    with pytest.raises(UsageError, match="made of another model"):
        finish.load(place / "own/export/compact.safetensors")
    (place / "ownnet.py").unlink()
    sys.modules.pop("ownnet")
    assert "cannot import 'ownnet'" in refused(2, "export", "own", "--compact")
    with pytest.raises(DataError, match="no compact model"):
        finish.load(place / "own/export/packed.safetensors")
