"""Sparse kernels against dense masked layers: values, gradients, whole networks, training."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedsieve import Data, Engine, FedSparsify, federate, fit, load
from fedsieve.data.batches import Examples
from fedsieve.local.executor import Executor
from fedsieve.local.forms import Kept, sparse_layers
from fedsieve.local.lines import pieces
from fedsieve.local.patterns import Pattern
from fedsieve.local.sparse_kernels import Chain, Stage, convolve, linear
from fedsieve.local.sparse_network import sparsify
from fedsieve.models.spec import ModelSpec, build
from fedsieve.params import Masks, Params
from fedsieve.settings import Local, Model
from fedsieve.streams import Streams


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal up to a share of the largest value."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=tolerance * max(1e-3, float(b.abs().max()) if b.numel() else 0))


def kept_of(rng, shape, density):
    return rng.random(shape) < density


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 25, 28, 40, 56, 112, 113, 119, 120, 224, 256, 3000])
def test_pieces_cover_a_line_without_gap_or_overlap(length):
    end = 0
    for begin, vectors, tail in pieces(length).tolist():
        assert begin == end
        assert 1 <= vectors <= (4 if tail else 14)
        assert 0 <= tail < 8
        end = begin + (vectors - 1) * 8 + (tail or 8)
    assert end == length


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 20),
    groups=st.sampled_from([1, 1, 2, 3]),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 5),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    biased=st.booleans(),
    to_x=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_convolution_equals_the_dense_one(
    examples, groups, inputs, outputs, size, taps, stride, padding, dilation, density, biased, to_x, seed
):
    spans = [(t - 1) * d + 1 for t, d in zip(taps, dilation, strict=True)]
    padding = tuple(max(p, -(-(span - side) // 2)) for p, span, side in zip(padding, spans, size, strict=True))
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    kept = kept_of(rng, (outputs * groups, inputs, *taps), density)
    mask = torch.from_numpy(kept)
    weight = (torch.randn(kept.shape) * mask).requires_grad_()
    bias = torch.randn(len(kept), requires_grad=True) if biased else None
    x = torch.randn(examples, inputs * groups, *size, requires_grad=to_x)
    dense = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    values = weight.detach()[mask].requires_grad_()
    ours = convolve(x, values, bias, Pattern(kept, stride, padding, dilation, groups))
    gradient = torch.randn_like(dense)
    others = ([bias] if biased else []) + ([x] if to_x else [])
    theirs = torch.autograd.grad(dense, [weight, *others], gradient)
    found = torch.autograd.grad(ours, [values, *others], gradient)
    assert_close([ours.detach(), *found], [dense.detach(), theirs[0][mask], *theirs[1:]], 2e-5)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1,), (3,), (8,), (28,), (33,), (130,), (2, 5), (3, 2, 4)]),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_linear_layer_equals_the_dense_one(shape, inputs, outputs, density, seed):
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    kept = kept_of(rng, (outputs, inputs), density)
    mask = torch.from_numpy(kept)
    weight = (torch.randn(kept.shape) * mask).requires_grad_()
    bias, x = torch.randn(outputs, requires_grad=True), torch.randn(*shape, inputs, requires_grad=True)
    dense = F.linear(x, weight, bias)
    values = weight.detach()[mask].requires_grad_()
    ours = linear(x, values, bias, Pattern(kept))
    gradient = torch.randn_like(dense)
    theirs = torch.autograd.grad(dense, (x, weight, bias), gradient)
    found = torch.autograd.grad(ours, (x, values, bias), gradient)
    assert_close([ours.detach(), *found], [dense.detach(), theirs[0], theirs[1][mask], theirs[2]], 2e-5)


def test_convolution_worked_out_by_hand():
    # One input and output channel, taps at (0, 0) and (1, 1) kept with 2 and 3, no padding, on [[1, 2], [3, 4]]: 2 + 12 + 1.
    kept = np.array([[[[True, False], [False, True]]]])
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    y = convolve(x, values, torch.tensor([1.0]), Pattern(kept))
    assert y.tolist() == [[[[15.0]]]]
    to_x, to_values = torch.autograd.grad(y, (x, values), torch.tensor([[[[10.0]]]]))
    assert to_x.tolist() == [[[[20.0, 0.0], [0.0, 30.0]]]]
    assert to_values.tolist() == [10.0, 40.0]


@pytest.mark.parametrize("examples", [1, 3, 8, 13, 32])
@pytest.mark.parametrize("side", [9, 12])
def test_chain_equals_its_layers_one_by_one(examples, side):
    torch.manual_seed(examples)
    rng = np.random.default_rng(examples)
    layers = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * ((side // 2 + 1) // 2) ** 2, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip
    weights, dense, stages, masks = [], [], [], []
    for layer in layers:
        if hasattr(layer, "weight"):
            kept = kept_of(rng, tuple(layer.weight.shape), 0.4)
            layer.weight.data *= torch.from_numpy(kept)
            masks += [torch.from_numpy(kept), None]
            dense += [layer.weight, layer.bias]
            weights += [layer.weight.detach()[masks[-2]].requires_grad_(), layer.bias]
    for number, (window, relu) in enumerate([((2, 2), True), ((1, 1), True), ((1, 1), True), ((1, 1), False)]):
        layer = [each for each in layers if hasattr(each, "weight")][number]
        shape = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else ()
        stages.append(Stage(Pattern(masks[2 * number].numpy(), *shape), window, relu))
    x = torch.randn(examples, 2, side, side, requires_grad=True)
    theirs, ours = layers(x), Chain(stages)(x, weights[::2], weights[1::2]).flatten(1)
    gradient = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, [x, *dense], gradient)
    found = torch.autograd.grad(ours, [x, *weights], gradient)
    wanted = [wanted[0], *(g if m is None else g[m] for g, m in zip(wanted[1:], masks, strict=True))]
    assert_close([ours.detach(), *found], [theirs.detach(), *wanted], 2e-5)


MODELS = {
    "cnn": (Model(name="cnn"), (1, 12, 12)),
    "lenet": (Model(name="lenet"), (1, 28, 28)),
    "cnn6": (Model(name="cnn6", norm="batch", dropout=0.3), (3, 16, 16)),
    "resnet8-group": (Model(name="resnet8", norm="group"), (3, 16, 16)),
    "resnet8-batch": (Model(name="resnet8", norm="batch"), (3, 15, 15)),
    "vgg11": (Model(name="vgg11"), (3, 32, 32)),
    "mlp": (Model(name="mlp", hidden=(30, 20)), (1, 6, 6)),
    "tabular": (Model(name="tabular", dropout=0.2), (9,)),
    "charlstm": (Model(name="charlstm"), (7,)),
}


def examples_for(name, shape):
    torch.manual_seed(0)
    if name == "charlstm":
        return Examples(torch.randint(0, 5, (30, *shape)), torch.randint(0, 5, (30, *shape)), (), ())
    x = torch.randn(30, *shape)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return Examples(x, torch.randint(0, 5, (30,)), (), ())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_equals_dense_masked_training(name, momentum):
    model, shape = MODELS[name]
    examples = examples_for(name, shape)
    spec = build(model, shape, 5, tokens=name == "charlstm")
    start = spec.initial("glorot", Streams(1))
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(2), spec.layout.maskable, 0.15)))
    # Statistics of 1 x 1 images amplify rounding from step to step: one step of vgg11 says as much.
    order = np.arange(8 if name == "vgg11" else 30)
    local = Local(sparse_least=0, lr=0.05, batch=12, momentum=momentum, weight_decay=0.01 if momentum else 0.0)
    assert len(sparse_layers(spec.module, masks, local)) >= (1 if name == "charlstm" else 3)
    found = []
    for setting in (local, replace(local, sparse_conv=0.0, sparse_linear=0.0, convolution="library")):
        executor = Executor(spec, setting, 10)
        streams = Streams(3).at(round=1, client=0)
        velocity = torch.randn(spec.layout.trainable, generator=torch.Generator().manual_seed(4)) * 0.01 if momentum else None
        trained = executor.train(start, examples, order, streams, masks=masks, momentum=velocity)
        metrics = executor.evaluate(trained.params, examples, order, masks)
        found.append((trained, metrics))
    (ours, measured), (theirs, expected) = found
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert_close([ours.params.flat], [theirs.params.flat], 1e-5)
    begin = start.under(masks)
    for name in spec.layout.named:  # what was learned, too: it is small beside the start
        moved = [trained.params[name] - begin[name] for trained in (ours, theirs)]
        assert_close(moved[:1], moved[1:], 1e-3 + 3e-7 / max(1e-9, float(moved[1].abs().max())))
    assert bool((ours.params.maskable[~masks.kept] == 0).all())
    assert measured.loss == pytest.approx(expected.loss, rel=1e-4)
    if momentum:
        assert_close([ours.momentum], [theirs.momentum], 1e-4)
        assert bool((ours.momentum[: spec.layout.maskable][~masks.kept] == 0).all())


@pytest.mark.parametrize("sparse", [0.0, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_without_dead_units_equals_training_with_them(sparse, momentum):
    spec = build(Model(name="cnn"), (1, 12, 12), 5)
    start = spec.initial("glorot", Streams(1))
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(2), spec.layout.maskable, 0.3)))
    masks["conv1.weight"][::2] = False
    masks["conv2.weight"][:, 1:9] = False
    masks["fc2.weight"][:, 100:] = False
    examples, order, found = examples_for("cnn", (1, 12, 12)), np.arange(30), []
    for compact in (False, True):
        local = Local(
            sparse_least=0, lr=0.05, batch=8, momentum=momentum, sparse_conv=sparse, sparse_linear=sparse, compact=compact
        )
        executor = Executor(spec, local, 10)
        trained = executor.train(start, examples, order, Streams(3).at(round=1, client=0), masks=masks)
        again = executor.train(start, examples, order, Streams(3).at(round=1, client=0), masks=masks)
        assert torch.equal(trained.params.flat, again.params.flat)
        form = executor._form(masks, start)
        found.append((trained, form.bound.weights.numel()))
    (large, all_), (small, fewer) = found
    assert fewer < 0.5 * all_
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    assert_close([small.params.flat], [large.params.flat], 1e-5)
    if momentum:
        assert_close([small.momentum], [large.momentum], 1e-5)


def test_result_does_not_depend_on_what_was_trained_before():
    spec = build(Model(name="cnn"), (1, 12, 12), 5)
    start, order = spec.initial("glorot", Streams(1)), np.arange(30)
    examples = examples_for("cnn", (1, 12, 12))
    rng = np.random.default_rng(2)
    one, other = (Masks(spec.layout, torch.from_numpy(kept_of(rng, spec.layout.maskable, d))) for d in (0.1, 0.2))

    def train(executor, masks):
        return executor.train(start, examples, order, Streams(3).at(round=1, client=0), masks=masks).params.flat

    used = Executor(spec, Local(sparse_least=0), 10)
    for masks in (other, None, one, other):
        train(used, masks)
    assert torch.equal(train(used, one), train(Executor(spec, Local(sparse_least=0), 10), one))


def test_layers_are_chosen_by_their_own_density():
    spec = build(Model(name="cnn6", norm="none"), (3, 16, 16), 5)
    masks = Masks.full(spec.layout)
    assert sparse_layers(spec.module, masks, Local(sparse_least=0)) == []
    for name, density in (("stage1.conv2", 0.31), ("stage2.conv1", 0.2), ("fc1", 0.04)):
        masks[f"{name}.weight"].flatten()[int(density * masks[f"{name}.weight"].numel()) :] = False
    light = ["stage1.conv1", "fc2"]  # three inputs, few weights
    assert sparse_layers(spec.module, masks, Local(sparse_least=0, sparse_conv=0.3, sparse_linear=0.3)) == [
        "stage2.conv1",
        "fc1",
        *light,
    ]
    assert sparse_layers(spec.module, masks, Local(sparse_least=0, sparse_conv=0.1, sparse_linear=0.05)) == ["fc1", *light]
    assert sparse_layers(spec.module, masks, Local(sparse_least=0, sparse_conv=0.0, sparse_linear=0.05)) == ["fc1", "fc2"]
    assert sparse_layers(spec.module, masks, Local(sparse_least=0, sparse_conv=0.0, sparse_linear=0.0)) == []


def test_small_models_are_left_to_dense_kernels():
    spec = build(Model(name="mlp", hidden=(8,)), (4,), 2)
    masks = Masks(spec.layout, torch.zeros(spec.layout.maskable, dtype=torch.bool))
    assert sparse_layers(spec.module, masks, Local(sparse_least=0)) == ["fc1", "fc2"]
    assert sparse_layers(spec.module, masks, Local()) == []


def test_memory_of_training_is_proportional_to_density():
    spec = build(Model(name="cnn"), (1, 28, 28), 10)
    held = {}
    for density in (0.1, 0.01):
        masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(2), spec.layout.maskable, density)))
        bound = Kept(spec, masks, sparse_layers(spec.module, masks, Local(sparse_least=0))).bound
        held[density] = bound.weights.numel() + bound.gradient.numel()
        others = 2 * (spec.layout.size - spec.layout.maskable)
        assert held[density] == 2 * masks.count + others
    assert held[0.1] > 5 * held[0.01]


def test_a_shared_layer_and_one_outside_a_sequence_are_computed_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.body(self.body(x)))

    spec = ModelSpec.of(Twice(), torch.randn(1, 6))
    start = spec.initial("glorot", Streams(0))
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(1), spec.layout.maskable, 0.3)))
    examples, order = Examples(torch.randn(20, 6), torch.randint(0, 3, (20,)), (), ()), np.arange(20)
    found = [
        Executor(spec, setting, 1).train(start, examples, order, Streams(0).at(round=1, client=0), masks=masks).params.flat
        for setting in (Local(sparse_least=0, sparse_linear=1.0), Local(sparse_least=0, sparse_linear=0.0))
    ]
    assert_close(found[:1], found[1:])


def test_a_second_gradient_is_refused():
    values = torch.ones(4, requires_grad=True)
    y = convolve(torch.randn(3, 2, 4, 4), values, None, Pattern(np.ones((2, 2, 1, 1), bool)))
    torch.autograd.grad(y.sum(), values, retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for once"):
        torch.autograd.grad(y.sum(), values)


def test_layers_of_a_sequence_may_be_called_one_by_one():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            body = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
            self.body, self.head = nn.Sequential(*body), nn.Linear(4, 3)

        def forward(self, x):
            first = self.body[0](x)
            for layer in self.body:
                x = layer(x)
            return self.head((x + first + self.body[:2](x[:, :2])).mean((2, 3)))

    spec = ModelSpec.of(Skips(), torch.randn(1, 2, 6, 6))
    start, examples, order = spec.initial("glorot", Streams(0)), torch.randn(20, 2, 6, 6), np.arange(20)
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(1), spec.layout.maskable, 0.3)))
    data = Examples(examples.contiguous(memory_format=torch.channels_last), torch.arange(20) % 3, (), ())
    found = [
        Executor(spec, setting, 1).train(start, data, order, Streams(0).at(round=1, client=0), masks=masks).params.flat
        for setting in (
            Local(sparse_least=0, sparse_conv=1.0, sparse_linear=1.0),
            Local(sparse_least=0, sparse_conv=0.0, sparse_linear=0.0),
        )
    ]
    assert_close(found[:1], found[1:])


def test_hooks_in_a_sequence_are_called():
    spec = build(Model(name="cnn"), (1, 12, 12), 5)
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(1), spec.layout.maskable, 0.2)))
    module, seen = deepcopy(spec.module), []
    for name in ("conv2", "relu1"):
        module.get_submodule(name).register_forward_hook(lambda layer, x, y: seen.append(tuple(y.shape)))
    sparsify(module, masks, ["conv1", "conv2", "fc1", "fc2"])
    module(torch.randn(2, 1, 12, 12))
    assert seen == [(2, 32, 6, 6), (2, 64, 6, 6)]


def test_a_run_on_sparse_kernels_is_the_same_for_any_number_of_workers():
    settings = Data(name="digits", clients=5)
    data = federate(load(settings), settings, Streams(0))
    spec, local = build(Model(name="mlp", hidden=(256, 256)), data.shape, data.classes), Local(sparse_least=0, momentum=0.5)
    results = [
        fit(
            FedSparsify(density=0.1, ranking="layer"),
            model=spec,
            data=data,
            local=local,
            engine=Engine(rounds=4, workers=workers),
        )
        for workers in (0, 1, 3)
    ]
    assert sparse_layers(spec.module, results[0].masks, local) == ["fc1", "fc2", "fc3"]
    for result in results[1:]:
        assert torch.equal(result.params.flat, results[0].params.flat)
        assert [row["accuracy"] for row in result.rows] == [row["accuracy"] for row in results[0].rows]
    dense = replace(local, sparse_linear=0.0)
    other = fit(FedSparsify(density=0.1, ranking="layer"), model=spec, data=data, local=dense, engine=Engine(rounds=4))
    assert not torch.equal(other.params.flat, results[0].params.flat)
    assert other.accuracy == pytest.approx(results[0].accuracy, abs=0.01)


def test_not_a_number_comes_through():
    kept = np.ones((2, 2, 1, 1), bool)
    x = torch.randn(3, 2, 4, 4)
    x[1, 0, 2, 2] = float("nan")
    y = Chain([Stage(Pattern(kept), (2, 2), True)])(x, [torch.ones(4)], [None])
    assert torch.isnan(y[1, :, 1, 1]).all()
    assert int(torch.isnan(y).sum()) == 2


def test_frozen_order_of_params_is_untouched():
    spec = build(Model(name="resnet8", norm="batch"), (3, 16, 16), 4)
    start = spec.initial("glorot", Streams(5))
    masks = Masks(spec.layout, torch.from_numpy(kept_of(np.random.default_rng(1), spec.layout.maskable, 0.2)))
    form = Kept(spec, masks, sparse_layers(spec.module, masks, Local(sparse_least=0)))
    assert torch.equal(form.outward(form.inward(start.flat), start.flat), start.under(masks).flat)
    trainable = start.flat[: spec.layout.trainable]
    assert torch.equal(form.outward(form.inward(trainable), trainable), Params(spec.layout, start.under(masks).flat).trainable)
