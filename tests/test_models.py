"""Models: published sizes, order of the slots, cost under a mask, and what happens to a model that does not fit."""

import pickle
import random
import sys
from copy import deepcopy
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsieve.errors import UsageError
from fedsieve.models import CATALOGUE, ModelSpec, build, cross_entropy
from fedsieve.params import Kind, Layout, Masks
from fedsieve.settings import Model
from fedsieve.streams import Streams

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)

# Weights written out layer by layer from the papers' descriptions: kernel * kernel * in * out, or in * out.
RESNET8 = (
    9 * 3 * 16
    + 2 * 9 * 16 * 16
    + (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    + (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    + 64 * 10
)  # fmt: skip
RESNET20 = (
    9 * 3 * 16
    + 6 * 9 * 16 * 16
    + (9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32)
    + (9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64)
    + 64 * 10
)  # fmt: skip
RESNET18 = (
    9 * 3 * 64
    + 4 * 9 * 64 * 64
    + (9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128)
    + (9 * 128 * 256 + 3 * 9 * 256 * 256 + 128 * 256)
    + (9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512)
    + 512 * 10
)  # fmt: skip
CNN6 = (
    9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 2 * 128 * 128)
    + 4 * 4 * 128 * 512 + 512 * 10
)  # fmt: skip
CNN6_BIASES = 64 + 64 + 4 * 128 + 512 + 10
VGG11 = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
VGG11_CHANNELS = 64 + 128 + 2 * 256 + 4 * 512
VGG16 = 9 * (
    3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 2 * 256 * 256 + 256 * 512 + 2 * 512 * 512 + 3 * 512 * 512
)  # fmt: skip
VGG16_CHANNELS = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
# channels that are normalised: the stem, two convolutions a block, and one a projection
RESNET8_NORMS = 16 + 2 * 16 + 3 * 32 + 3 * 64
RESNET20_NORMS = 16 + 6 * 16 + 7 * 32 + 7 * 64
RESNET18_NORMS = 64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512
LSTM = 4 * 256 * (8 + 256) + 4 * 256 * (256 + 256)

# name, options, shape, classes -> maskable, other trained, statistics
GOLDEN = [
    ("mlp", {}, MNIST, 10, 784 * 128 + 128 * 128 + 128 * 10, 128 + 128 + 10, 0),
    ("mlp", {"hidden": (200, 200)}, MNIST, 10, 784 * 200 + 200 * 200 + 200 * 10, 410, 0),
    ("lenet", {}, MNIST, 10, 25 * 6 + 25 * 6 * 16 + 5 * 5 * 16 * 120 + 120 * 84 + 84 * 10, 6 + 16 + 120 + 84 + 10, 0),
    ("lenet", {}, CIFAR, 10, 25 * 18 + 25 * 6 * 16 + 5 * 5 * 16 * 120 + 120 * 84 + 84 * 10, 6 + 16 + 120 + 84 + 10, 0),
    ("lenet", {"norm": "batch"}, MNIST, 10, 61_470, 6 + 16 + 120 + 84 + 10 + 2 * (6 + 16), 2 * (6 + 16)),
    ("cnn", {}, MNIST, 10, 25 * 32 + 25 * 32 * 64 + 7 * 7 * 64 * 512 + 512 * 10, 32 + 64 + 512 + 10, 0),
    ("cnn6", {"norm": "none"}, CIFAR, 10, CNN6, CNN6_BIASES, 0),
    ("cnn6", {}, CIFAR, 10, CNN6, CNN6_BIASES + 2 * (64 + 128), 2 * (64 + 128)),
    ("cnn6", {"norm": "group", "dropout": 0.0}, CIFAR, 10, CNN6, CNN6_BIASES + 2 * (64 + 128), 0),
    ("resnet8", {}, CIFAR, 10, RESNET8, 2 * RESNET8_NORMS + 10, 0),
    ("resnet8", {"norm": "none"}, CIFAR, 10, RESNET8, RESNET8_NORMS + 10, 0),
    ("resnet20", {}, CIFAR, 10, RESNET20, 2 * RESNET20_NORMS + 10, 0),
    ("resnet20", {"norm": "batch"}, CIFAR, 10, RESNET20, 2 * RESNET20_NORMS + 10, 2 * RESNET20_NORMS),
    ("resnet18", {}, CIFAR, 10, RESNET18, 2 * RESNET18_NORMS + 10, 0),
    ("resnet18", {}, CIFAR, 100, RESNET18 + 512 * 90, 2 * RESNET18_NORMS + 100, 0),
    ("vgg11", {}, CIFAR, 10, VGG11 + 5120, 3 * VGG11_CHANNELS + 10, 2 * VGG11_CHANNELS),
    ("vgg16", {}, CIFAR, 100, VGG16 + 51200, 3 * VGG16_CHANNELS + 100, 2 * VGG16_CHANNELS),
    ("vgg16", {"norm": "group"}, CIFAR, 10, VGG16 + 5120, 3 * VGG16_CHANNELS + 10, 0),
    ("tabular", {}, (13,), 2, 13 * 64 + 64 * 32 + 32 * 2, 64 + 32 + 2, 0),
    ("charlstm", {}, (20,), 65, LSTM + 256 * 65, 65 * 8 + 4 * 4 * 256 + 65, 0),
]
# sizes as published, trained and statistics together
PUBLISHED = {
    ("mlp", "default", 10): 118_282,
    ("lenet", "default", 10): 61_706,
    ("cnn", "default", 10): 1_663_370,
    ("cnn6", "none", 10): 1_609_546,
    ("cnn6", "batch", 10): 1_610_314,
    ("resnet20", "default", 10): 272_474,
    ("resnet18", "default", 10): 11_173_962,
    ("resnet18", "default", 100): 11_220_132,
    ("vgg16", "default", 100): 14_782_884,
}


def shape_of(name: str) -> tuple[int, ...]:
    return {"tabular": (13,), "charlstm": (20,), "mlp": MNIST, "lenet": MNIST, "cnn": MNIST}.get(name, CIFAR)


def classes_of(name: str) -> int:
    return {"tabular": 2, "charlstm": 65}.get(name, 10)


def make(name: str, **options) -> ModelSpec:
    return build(Model(name=name, **options), shape_of(name), classes_of(name), tokens=name == "charlstm")


@pytest.mark.parametrize(("name", "options", "shape", "classes", "maskable", "dense", "statistics"), GOLDEN)
def test_sizes_are_those_counted_by_hand(name, options, shape, classes, maskable, dense, statistics):
    spec = build(Model(name=name, **options), shape, classes, tokens=name == "charlstm")
    assert spec.layout.maskable == maskable
    assert spec.parameters == spec.layout.trainable == maskable + dense
    assert spec.layout.size == maskable + dense + statistics


@pytest.mark.parametrize(("model", "size"), PUBLISHED.items())
def test_sizes_are_those_published(model, size):
    name, norm, classes = model
    assert build(Model(name=name, norm=norm), shape_of(name), classes).layout.size == size


def test_catalogue_states_the_true_size_and_options_of_each_model():
    for entry in CATALOGUE:
        spec = make(entry.name)
        assert entry.parameters.split()[0] == f"{spec.parameters:,}"
        for option, value in {"norm": "group", "hidden": (5,), "dropout": 0.5}.items():
            if option in entry.options:
                assert make(entry.name, **{option: value}).layout.size > 0
            else:
                with pytest.raises(UsageError, match=f"no option '{option}'"):
                    make(entry.name, **{option: value})


def test_vector_starts_with_the_maskable_weights_in_the_models_own_order():
    layout = make("resnet20", norm="batch").layout
    parts = [2 if s.kind is Kind.BUFFER else 0 if s.maskable else 1 for s in layout.slots]
    assert parts == sorted(parts)
    names = [s.name for s in layout.masked_slots]
    assert len(names) == 22
    assert names[:3] == ["stem.conv.weight", "stage1.0.conv1.weight", "stage1.0.conv2.weight"]
    assert names[7:10] == ["stage2.0.conv1.weight", "stage2.0.conv2.weight", "stage2.0.shortcut.conv.weight"]
    assert names[-1] == "fc.weight"
    assert {s.name.partition(".")[0]: s.block for s in layout.slots} == {
        "stem": 0, "stage1": 1, "stage2": 2, "stage3": 3, "fc": 4,
    }  # fmt: skip
    assert [s.kind for s in layout.slots if s.name.startswith("stem.norm")] == [Kind.NORM, Kind.NORM, Kind.BUFFER, Kind.BUFFER]
    assert not any("num_batches_tracked" in name for name in layout.spans)


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE])
@pytest.mark.parametrize("scheme", ["kaiming", "glorot"])
def test_every_trained_tensor_gets_a_gradient(name, scheme):
    spec = make(name)
    trained = {slot.name for slot in spec.layout.slots if slot.kind is not Kind.BUFFER}
    start = spec.initial(scheme, Streams(3))
    params = {key: value.clone().requires_grad_(key in trained) for key, value in start.items()}
    draw = torch.Generator().manual_seed(0)
    if name == "charlstm":
        batch, targets = torch.randint(65, (4, 20), generator=draw), torch.randint(65, (4, 20), generator=draw)
    else:
        batch, targets = torch.randn(4, *shape_of(name), generator=draw), torch.tensor([0, 1, 1, 0])
    spec.module.train()
    outputs = functional_call(spec.module, params, batch)
    assert outputs.shape == ((4, 20, 65) if name == "charlstm" else (4, classes_of(name)))
    loss = spec.loss(outputs, targets)
    assert loss.shape == ()
    loss.backward()
    for key in trained:
        # BatchNorm takes away what a bias in front of it adds, so there the gradient is 0 up to rounding
        assert params[key].grad.any() or (name.startswith("vgg") and ".conv" in key and key.endswith("bias")), key


def test_pooling_before_relu_is_the_published_network():
    x = torch.randn(4, *CIFAR, generator=torch.Generator().manual_seed(1))
    net = build(Model(name="cnn"), CIFAR, 10).module
    y = F.max_pool2d(F.relu(net.conv1(x)), 2)
    y = F.max_pool2d(F.relu(net.conv2(y)), 2).flatten(1)
    torch.testing.assert_close(net(x), net.fc2(F.relu(net.fc1(y))), rtol=0, atol=0)

    net = make("cnn6", dropout=0.0).module.train()
    y = x
    for stage in (net.stage1, net.stage2, net.stage3):
        y = F.max_pool2d(F.relu(stage.conv2(F.relu(stage.conv1(y)))), 2)
        if stage is not net.stage3:
            y = F.batch_norm(y, None, None, stage.norm.weight, stage.norm.bias, training=True)
    torch.testing.assert_close(net(x), net.fc2(F.relu(net.fc1(y.flatten(1)))), rtol=0, atol=1e-6)

    net = make("vgg11").module.train()
    y = x
    for stage in (net.stage1, net.stage2, net.stage3, net.stage4, net.stage5):
        for i in range(1, 3 if hasattr(stage, "conv2") else 2):
            norm = stage.get_submodule(f"norm{i}")
            y = F.relu(F.batch_norm(stage.get_submodule(f"conv{i}")(y), None, None, norm.weight, norm.bias, training=True))
        y = F.max_pool2d(y, 2)
    torch.testing.assert_close(net(x), net.fc(y.flatten(1)), rtol=0, atol=1e-5)


def test_fully_connected_networks_are_relu_between_linear_layers():
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    for name, options in (("mlp", {"hidden": (7, 6)}), ("tabular", {"dropout": 0.5})):
        net = build(Model(name=name, **options), (13,), 3).module.eval()
        expected = net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))
        assert torch.equal(net(x), expected)
        assert (expected < 0).any()
    drops = [layer.p for layer in net.modules() if isinstance(layer, nn.Dropout)]
    assert drops == [0.5, 0.5]
    assert [layer.p for layer in make("cnn6").module.modules() if isinstance(layer, nn.Dropout)] == [0.2]
    assert not any(isinstance(layer, nn.Dropout) for layer in make("tabular").module.modules())


def test_a_residual_network_without_its_branches_is_its_shortcuts():
    spec = make("resnet8", norm="none")
    params = spec.initial("glorot", Streams(0))
    for slot in spec.layout.slots:
        if ".conv2." in slot.name:
            params[slot.name].zero_()
    x = torch.randn(2, *CIFAR, generator=torch.Generator().manual_seed(1))
    y = F.relu(F.conv2d(x, params["stem.conv.weight"], padding=1))
    y = F.relu(F.conv2d(y, params["stage2.0.shortcut.conv.weight"], stride=2))
    y = F.relu(F.conv2d(y, params["stage3.0.shortcut.conv.weight"], stride=2))
    assert y.shape == (2, 64, 8, 8)
    torch.testing.assert_close(
        functional_call(spec.module, dict(params), x), y.mean((2, 3)) @ params["fc.weight"].T, rtol=0, atol=1e-5
    )


def test_group_norm_is_two_groups():
    norms = [layer for layer in make("resnet20").module.modules() if isinstance(layer, nn.GroupNorm)]
    assert [layer.num_groups for layer in norms] == [2] * 21


def test_character_model_does_not_look_ahead():
    spec = make("charlstm")
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] = 3
    same = spec.module(tokens) == spec.module(changed)
    assert same[0, :12].all()
    assert not same[0, 12:].all()


def test_flops_of_each_slot_are_those_counted_by_hand():
    assert make("mlp").flops == {
        "fc1.weight": 2 * 784 * 128, "fc1.bias": 0, "fc2.weight": 2 * 128 * 128, "fc2.bias": 0, "fc3.weight": 2 * 128 * 10,
        "fc3.bias": 0,
    }  # fmt: skip
    flops = make("cnn").flops
    assert flops["conv1.weight"] == 2 * 28 * 28 * 25 * 32
    assert flops["conv2.weight"] == 2 * 14 * 14 * 25 * 32 * 64
    assert flops["fc1.weight"] == 2 * 7 * 7 * 64 * 512
    assert flops["fc2.weight"] == 2 * 512 * 10
    assert sum(make("resnet20").flops.values()) == 2 * (
        1024 * (9 * 3 * 16 + 6 * 9 * 16 * 16)
        + 256 * (9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32)
        + 64 * (9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64)
        + 640
    )
    assert sum(make("charlstm").flops.values()) == 2 * 20 * (LSTM + 256 * 65)


def test_flops_count_every_call_and_every_kind_of_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 4, 3, stride=2)
            self.mix = nn.Conv1d(4, 6, 1, groups=2)
            self.encoder = nn.TransformerEncoderLayer(6, nhead=2, dim_feedforward=5, batch_first=True)
            self.cross = nn.MultiheadAttention(6, 2, kdim=2, vdim=4, batch_first=True)
            self.twice = nn.Linear(6, 6, bias=False)
            self.cell = nn.GRUCell(6, 3)

        def forward(self, x):  # (1, 2, 7) -> up (1, 4, 15)
            up = self.up(x)
            y = self.encoder(self.mix(up).transpose(1, 2))
            y, _ = self.cross(y, key=x.transpose(1, 2), value=torch.zeros(1, 7, 4))
            y = self.twice(self.twice(y))
            return self.cell(y[:, 0])

    spec = ModelSpec.of(Net(), torch.ones(1, 2, 7))
    expected = {
        "up.weight": 7 * 2 * 4 * 3,
        "mix.weight": 15 * 6 * 2,
        "encoder.self_attn.in_proj_weight": 15 * 18 * 6,
        "encoder.self_attn.out_proj.weight": 15 * 6 * 6,
        "encoder.linear1.weight": 15 * 6 * 5,
        "encoder.linear2.weight": 15 * 5 * 6,
        "cross.q_proj_weight": 15 * 6 * 6,
        "cross.k_proj_weight": 7 * 6 * 2,
        "cross.v_proj_weight": 7 * 6 * 4,
        "cross.out_proj.weight": 15 * 6 * 6,
        "twice.weight": 2 * 15 * 6 * 6,
        "cell.weight_ih": 9 * 6,
        "cell.weight_hh": 9 * 3,
    }
    assert {key: value for key, value in spec.flops.items() if value} == {key: 2 * value for key, value in expected.items()}
    assert {slot.name for slot in spec.layout.masked_slots} == set(expected)


def test_flops_of_a_packed_sequence_are_those_of_its_steps():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5, bidirectional=True, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4]), batch_first=True)
            return self.rnn(packed)[1].mean(0)

    spec = ModelSpec.of(Net(), torch.ones(1, 9, 3))
    assert spec.flops["rnn.weight_ih_l0_reverse"] == 2 * 4 * 3 * 5
    assert sum(spec.flops.values()) == 2 * 4 * 2 * (3 * 5 + 5 * 5)


@given(seed=st.integers(0, 2**32), density=st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_flops_under_a_mask_are_each_slots_share(seed, density):
    spec = build(Model(name="cnn", dense=("conv1.weight",)), (1, 8, 8), 3)
    masks = Masks(spec.layout, torch.rand(spec.layout.maskable, generator=torch.Generator().manual_seed(seed)) < density)
    expected = spec.flops["conv1.weight"]
    for name in ("conv2.weight", "fc1.weight", "fc2.weight"):
        expected += int(masks[name].sum()) * 2 * {"conv2.weight": 16}.get(name, 1)
    assert spec.density_flops(masks) == expected
    assert spec.density_flops(Masks.full(spec.layout)) == sum(spec.flops.values())


def test_masks_cover_weights_or_everything_trained_except_what_is_kept_dense():
    spec = make("cnn6", dense=("fc2.weight", "fc1.bias"))
    assert [s.name for s in spec.layout.masked_slots] == [
        *(f"stage{i}.conv{j}.weight" for i in (1, 2, 3) for j in (1, 2)), "fc1.weight",
    ]  # fmt: skip
    every = make("cnn6", maskable="all", dense=("fc2.weight",)).layout
    assert every.maskable == 1_609_930 - 5120
    assert every.trainable == 1_609_930
    assert not any(s.maskable for s in make("charlstm").layout.slots if s.name.startswith("embedding"))
    assert make("charlstm", maskable="all").layout.maskable == 815_945


class Odd(nn.Module):
    """What the built-in models do not have: ties, frozen and bare parameters, buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((4,), 0.5))
        self.position = nn.Parameter(torch.full((1, 5, 4), 0.25))
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.act = nn.PReLU()
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("steps", torch.tensor(4))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, tokens):
        y = self.act(self.embedding(tokens) + self.position) * self.gain
        return self.out(self.norm(self.frozen(y)))


def test_your_own_module_is_described_without_touching_it():
    module = Odd().train()
    module.norm.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    spec = ModelSpec.of(module, torch.zeros(1, 5, dtype=torch.int64), maskable="all")
    assert {s.name: s.kind.value for s in spec.layout.slots} == {
        "gain": "norm", "position": "weight", "embedding.weight": "weight", "act.weight": "norm", "norm.weight": "norm",
        "norm.bias": "norm", "out.bias": "bias", "scale": "buffer",
    }  # fmt: skip
    assert [s.block for s in spec.layout.slots] == [0, 1, 3, 4, 5, 5, 6, 2]
    assert [s.name for s in spec.layout.slots if not s.maskable] == ["scale"]
    assert spec.name == "Odd"
    assert spec.flops["embedding.weight"] == 2 * 5 * 4 * 7  # the tied output layer; the lookup is free
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for net in (module, spec.module):
        assert net.training
        assert net.out.training
        assert not net.norm.training
    assert not any(layer._forward_hooks for layer in spec.module.modules())
    assert spec.module is not module

    drawn = spec.initial("kaiming", Streams(1))
    assert torch.equal(drawn["gain"], module.gain)
    assert torch.equal(drawn["position"], module.position)
    assert torch.equal(drawn["act.weight"], module.act.weight)
    assert torch.equal(drawn["scale"], module.scale)
    assert not drawn["embedding.weight"][0].any()
    assert drawn["embedding.weight"][1:].all()
    assert not torch.equal(drawn["embedding.weight"], module.embedding.weight)
    assert not drawn.flat.requires_grad
    own = spec.initial("module", Streams(1))
    assert torch.equal(own["embedding.weight"], module.embedding.weight)


def test_outputs_depend_on_the_parameters_alone():
    spec = make("mlp")
    x = torch.rand(3, *MNIST, generator=torch.Generator().manual_seed(0))
    own = functional_call(spec.module, dict(spec.initial("module", Streams(0))), x)
    assert torch.equal(own, spec.module(x))
    assert not torch.allclose(functional_call(spec.module, dict(spec.initial("glorot", Streams(0))), x), own)


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE if entry.name not in ("vgg16", "resnet18")])
def test_a_spec_survives_pickling_and_copying(name):
    spec = make(name)
    for other in (pickle.loads(pickle.dumps(spec)), deepcopy(spec), make(name)):
        assert other.layout == spec.layout
        assert other.layout.fingerprint == spec.layout.fingerprint
        assert other.flops == spec.flops
        assert other.loss is spec.loss
        assert torch.equal(other.initial("module", Streams(9)).flat, spec.initial("module", Streams(0)).flat)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_building_and_starting_leave_the_global_random_state_alone():
    noisy = Noisy(2, 2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    spec = make("cnn6")
    for scheme in ("module", "kaiming", "glorot"):
        spec.initial(scheme, Streams(1))
    ModelSpec.of(noisy, torch.ones(1, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_the_template_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1)
    first = make("lenet").initial("module", Streams(0)).flat
    torch.manual_seed(2)
    assert torch.equal(make("lenet").initial("module", Streams(0)).flat, first)


def test_cross_entropy_of_sequences_is_the_mean_over_all_positions_but_padding():
    outputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 4, -100], [0, 2, 3]])
    logs = outputs.log_softmax(-1)
    expected = -sum(logs[b, t, targets[b, t]] for b in range(2) for t in range(3) if targets[b, t] >= 0) / 5
    assert cross_entropy(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy(outputs[:, 0], targets[:, 0]).item() == pytest.approx(
        -(logs[0, 0, 1] + logs[1, 0, 0]).item() / 2, rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cnn", (1, 4, 4)), ("cnn", (1, 8, 8)), ("cnn", (2, 40, 64)), ("lenet", (1, 16, 16)), ("lenet", (1, 40, 64)),
        ("cnn6", (1, 8, 11)), ("resnet8", (1, 8, 8)), ("resnet20", (3, 9, 13)), ("resnet18", (1, 8, 8)), ("vgg11", (1, 40, 64)),
        ("vgg11", (3, 64, 64)), ("mlp", (43,)), ("mlp", (8, 8)),
    ],
)  # fmt: skip
def test_models_adapt_to_the_images(name, shape):
    spec = build(Model(name=name), shape, 7)
    assert spec.module.eval()(torch.ones(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("model", "shape", "tokens", "says"),
    [
        ({"name": "resnet2"}, CIFAR, False, "did you mean 'resnet20'"),
        ({"name": "zzz"}, CIFAR, False, "unknown model 'zzz'"),
        ({"name": "mlp", "norm": "batch"}, MNIST, False, "Models with it: lenet, cnn6, resnet8"),
        ({"name": "cnn", "hidden": (5,)}, MNIST, False, "Models with it: mlp, tabular"),
        ({"name": "lenet"}, (1, 8, 8), False, r"16 x 16 or larger;\n.*\(1, 8, 8\)"),
        ({"name": "vgg16"}, (1, 8, 8), False, r"32 x 32 or larger;\n.*\(1, 8, 8\)"),
        ({"name": "vgg11"}, (3, 32, 31), False, "32 x 32 or larger"),
        ({"name": "cnn"}, (1, 3, 9), False, "4 x 4 or larger"),
        ({"name": "cnn"}, (43,), False, r"shape \(43,\)"),
        ({"name": "tabular"}, MNIST, False, r"rows of features.*\(1, 28, 28\)"),
        ({"name": "mlp"}, (20,), True, "takes values; one example of the data is tokens"),
        ({"name": "charlstm"}, (20,), False, "takes tokens; one example of the data is values"),
        ({"name": "charlstm"}, MNIST, True, r"sequences of tokens.*\(1, 28, 28\)"),
        ({"name": "mlp", "dense": ("fc4.weight",)}, MNIST, False, "nearest names: fc3.weight"),
        ({"name": "nets:Missing"}, MNIST, False, "has no callable 'Missing'"),
        ({"name": "nets:Smal"}, MNIST, False, "did you mean 'Small'"),
        ({"name": "nowhere_at_all:Net"}, MNIST, False, "cannot import 'nowhere_at_all'"),
        ({"name": "./nets.py:Small"}, MNIST, False, "write it as package.module:callable"),
        ({"name": "nets:number"}, MNIST, False, "has no callable 'number'"),
        ({"name": "nets:text"}, MNIST, False, "returns str; it must return a torch.nn.Module"),
        ({"name": "nets:needy"}, MNIST, False, "needs depth"),
        ({"name": "nets:needy", "norm": "group"}, MNIST, False, "no option 'norm'"),
        ({"name": "nets:narrow"}, MNIST, False, r"scores of shape \(1, 3\)"),
        ({"name": "nets:wrong"}, MNIST, False, r"does not run on one example of shape \(1, 1, 28, 28\), .*:\nRuntimeError"),
        ({"name": "nets:pair"}, MNIST, False, "returns tuple"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(model, shape, tokens, says, own_nets):
    with pytest.raises(UsageError, match=says) as refused:
        build(Model(**model), shape, 10, tokens=tokens)
    assert len(str(refused.value).splitlines()) <= 8


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (nn.Linear(4, 2).double(), {}, "weight of model 'Linear' is torch.float64"),
        (nn.Linear(4, 2).requires_grad_(False), {}, "no trained parameter"),
        (nn.LazyLinear(2), {}, "lazy layers"),
        (nn.Linear(3, 2), {}, r"does not run on one example of shape \(1, 4\)"),
        (nn.LSTM(4, 2), {}, "returns tuple"),
        (nn.Linear(4, 2), {"maskable": "wieghts"}, "use 'weights' or 'all'"),
        (nn.Linear(4, 2), {"dense": ["wieght"]}, "nearest names: weight"),
    ],
)
def test_a_module_that_cannot_be_described_is_refused(module, options, says):
    with pytest.raises(UsageError, match=says):
        ModelSpec.of(module, torch.ones(1, 4), **options)


def test_a_module_that_cannot_be_copied_is_refused():
    module = nn.Linear(4, 2)
    module.cache = module.weight * 2  # part of a graph: torch cannot copy it
    with pytest.raises(UsageError, match="cannot be copied"):
        ModelSpec.of(module, torch.ones(1, 4))


def test_an_unknown_start_is_refused():
    with pytest.raises(UsageError, match="'module', 'kaiming' or 'glorot'"):
        make("mlp").initial("he", Streams(0))


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from math import prod\n"
        "from torch import nn\n"
        "number = 3\n"
        "class Small(nn.Sequential):\n"
        "    def __init__(self, *, classes, shape, hidden=(6,), rate=0.0):\n"
        "        width = prod(shape)\n"
        "        super().__init__(nn.Flatten(), nn.Linear(width, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], classes))\n"
        "def lazy(classes, **unused): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))\n"
        "def text(): return 'net'\n"
        "def needy(shape, depth): return nn.Identity()\n"
        "def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))\n"
        "def wrong(): return nn.Linear(3, 3)\n"
        "class pair(nn.Linear):\n"
        "    def __init__(self): super().__init__(28, 10)\n"
        "    def forward(self, x): return x, x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    monkeypatch.delitem(sys.modules, "nets", raising=False)


def test_your_own_callable_is_given_what_it_names(own_nets):
    spec = build(Model(name="nets:Small", hidden=(9,), dense=("3.weight",)), MNIST, 4)
    assert {slot.name: slot.shape for slot in spec.layout.slots} == {
        "1.weight": (9, 784), "1.bias": (9,), "3.weight": (4, 9), "3.bias": (4,),
    }  # fmt: skip
    assert spec.name == "nets:Small"
    assert [slot.name for slot in spec.layout.masked_slots] == ["1.weight"]
    assert build(Model(name="nets:Small"), MNIST, 4).layout.size == 784 * 6 + 6 + 6 * 4 + 4
    lazy = build(Model(name="nets:lazy"), MNIST, 4)
    torch.manual_seed(5)
    again = build(Model(name="nets:lazy"), MNIST, 4)
    assert torch.equal(lazy.initial("module", Streams(0)).flat, again.initial("module", Streams(0)).flat)


@given(widths=st.lists(st.integers(1, 5), min_size=1, max_size=4), features=st.integers(1, 6), classes=st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_the_layout_holds_each_element_once(widths, features, classes):
    spec = build(Model(name="mlp", hidden=tuple(widths)), (features,), classes)
    sides = [features, *widths, classes]
    assert spec.layout == Layout.of(spec.layout.slots)
    assert spec.layout.maskable == sum(a * b for a, b in pairwise(sides))
    assert spec.layout.size == sum(prod(p.shape) for p in spec.module.parameters())
    assert [s.block for s in spec.layout.masked_slots] == list(range(len(sides) - 1))
    flat = spec.initial("module", Streams(0))
    for key, value in spec.module.state_dict().items():
        assert torch.equal(flat[key], value)
