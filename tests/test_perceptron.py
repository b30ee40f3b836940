"""Training steps that are written out: those of autograd, up to rounding, for one client or several."""

from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from conftest import same
from fedsieve import Local, Masks, Model, ModelSpec, Streams, build
from fedsieve.data.batches import Examples
from fedsieve.local.executor import Executor
from fedsieve.local.perceptron import SIZES, perceptron
from fedsieve.params import Params

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2e-6
"""largest difference after a few steps, over the largest parameter"""


def written(spec, flat, gradient=None):
    """The network on parameters of one client (a vector) or several (rows)."""
    gradient = torch.zeros_like(flat) if gradient is None else gradient
    return perceptron(spec, Params(spec.layout, flat), Params(spec.layout, gradient))


def net(*widths, flat=False, bias=True):
    layers = [nn.Flatten()] if flat else []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def test_a_step_worked_out_by_hand():
    """2 inputs, hidden unit h = relu(x1 + x2 - 1), scores (h, -h). Example (1, 2) of class 0: h = 2, scores (2, -2).

    With p = 1 / (1 + e^4): loss = log(1 + e^-4), gradient of the scores (-p, p), of h -2p. At learning rate 1 the last weights
    (1, -1) become (1 + 2p, -1 - 2p), its biases (p, -p), the first weights (1 + 2p, 1 + 4p), its bias -1 + 2p.
    """
    spec = ModelSpec.of(net(2, 1, 2), torch.zeros(1, 2))
    params = Params.zeros(spec.layout)
    for name, value in {"0.weight": [[1, 1]], "0.bias": [-1], "2.weight": [[1], [-1]], "2.bias": [0, 0]}.items():
        params[name].copy_(torch.tensor(value))
    x, y, p = torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 1 / (1 + np.exp(4))
    after = params.flat.clone()
    loss = written(spec, after).step(x, y, 1.0)
    assert float(loss) == pytest.approx(log(1 + np.exp(-4)), rel=1e-5)
    expected = {"0.weight": [[1 + 2 * p, 1 + 4 * p]], "0.bias": [-1 + 2 * p]}
    expected |= {"2.weight": [[1 + 2 * p], [-1 - 2 * p]], "2.bias": [p, -p]}
    for name, value in expected.items():
        assert Params(spec.layout, after)[name].numpy() == pytest.approx(np.array(value), rel=1e-5)
    still, gradient = params.flat.clone(), torch.full_like(params.flat, 7)
    written(spec, still, gradient).step(x, y, 0.0)
    assert same(still, params.flat)
    assert (params.flat - gradient).numpy() == pytest.approx(after.numpy(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    clients=st.integers(0, 4),
    examples=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_autograd(widths, clients, examples, bias, seed):
    draw = Streams(seed)("test").numpy()
    spec = ModelSpec.of(net(*widths, bias=bias), torch.zeros(1, widths[0]))
    rows = max(1, clients)
    flat = torch.from_numpy(draw.normal(size=(rows, spec.layout.size)).astype(np.float32))
    x = torch.from_numpy(draw.normal(size=(rows * examples, widths[0])).astype(np.float32))
    y = torch.from_numpy(draw.integers(0, widths[-1], rows * examples))
    found = torch.full_like(flat, 7)
    given = (flat, found) if clients else (flat[0], found[0])
    with torch.no_grad():
        losses = written(spec, *given).step(x, y, 0.0)
    for row, loss in enumerate(losses.view(-1)):
        mine = Params(spec.layout, flat[row])
        leaves = {name: mine[name].clone().requires_grad_() for name in mine}
        part = slice(row * examples, (row + 1) * examples)
        expected = F.cross_entropy(torch.func.functional_call(spec.module, leaves, (x[part],)), y[part])
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
        for name, gradient in zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True):
            off = (Params(spec.layout, found[row])[name] - gradient).abs().max()
            assert off <= 1e-4 * max(1.0, float(gradient.abs().max()))


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def squared(outputs, targets):
    return (outputs.squeeze(-1) - targets).square().mean()


def rows(examples=90, features=13, classes=3, shape=()):
    draw = Streams(3)("table").numpy()
    x = torch.from_numpy(draw.normal(size=(examples, *shape, features)).astype(np.float32))
    return Examples(x, torch.from_numpy(draw.integers(0, classes, (examples, *shape))), (), ())


def ignored():
    """Sequences, whose last symbol is left out of the loss."""
    found = rows(shape=(5,))
    found.y[:, 4] = -100
    return found


def flattened():
    found = rows(shape=(5,))
    return Examples(found.x, found.y[:, 0].contiguous(), (), ())


CASES = {
    "digits": (None, None),
    "tabular": (lambda: build(Model(name="tabular"), (13,), 3), rows),
    "one layer": (lambda: ModelSpec.of(nn.Linear(13, 3), torch.zeros(1, 13)), rows),
    "no bias": (lambda: ModelSpec.of(net(13, 8, 3, bias=False), torch.zeros(1, 13)), rows),
    "ends in relu": (lambda: ModelSpec.of(nn.Sequential(nn.Linear(13, 3), nn.ReLU()), torch.zeros(1, 13)), rows),
    "sequences": (lambda: ModelSpec.of(net(13, 8, 3), torch.zeros(1, 5, 13)), ignored),
    "flattened": (lambda: ModelSpec.of(net(65, 8, 3, flat=True), torch.zeros(1, 5, 13)), flattened),
    "another loss": (lambda: ModelSpec.of(net(13, 8, 3), torch.zeros(1, 13), loss=smoothed), rows),
    "a number": (lambda: ModelSpec.of(net(13, 8, 1), torch.zeros(1, 13), loss=squared), lambda: rows(classes=2)),
}


RULES = [
    Local(batch=8),
    Local(batch=8, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    Local(batch=7, lr=0.05, weight_decay=0.01),
]


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("local", RULES, ids=["plain", "nesterov", "decay"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_autograd(case, local, masked, small, digits):
    made, held = CASES[case]
    spec, examples = (small, digits.train) if made is None else (made(), held())
    masks = Masks(spec.layout, torch.from_numpy(Streams(1)("mask").uniform(spec.layout.maskable) < 0.6)) if masked else None
    start, order, streams = spec.initial("kaiming", Streams(5)), np.arange(60), Streams(0).at(round=1, client=2)
    arguments = {"masks": masks, "epochs": 2, "proximal": 0.1 if local.batch == 7 else 0.0}
    fast, library = Executor(spec, local, 1), Executor(spec, changed(local, linear="library"), 1)
    found, expected = (each.train(start, examples, order, streams, **arguments) for each in (fast, library))
    assert fast._all.perceptron is not None
    assert library._all.perceptron is None
    assert (found.params.flat - expected.params.flat).abs().max() <= ROUNDING * expected.params.flat.abs().max()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert not same(found.params.flat, start.flat)
    if masked:
        assert found.params.maskable[~masks.kept].abs().max() == 0
    again = fast.train(start, examples, order, streams, **arguments)
    assert same(again.params.flat, found.params.flat)
    assert again.loss == found.loss


def changed(local, **settings):
    return Local(**{**{name: getattr(local, name) for name in local.__dataclass_fields__}, **settings})


def test_what_was_trained_before_makes_no_difference(small, digits):
    """More sizes of a batch than are kept, one after another, twice."""
    local, start = Local(batch=64), small.initial("kaiming", Streams(5))
    executor = Executor(small, local, 1)

    def train(examples):
        return executor.train(start, digits.train, np.arange(examples), Streams(0).at(round=1, client=2)).params.flat

    sizes = range(3, 2 * SIZES + 3)
    first = {size: train(size) for size in sizes}
    assert all(same(first[size], train(size)) for size in reversed(sizes))
    assert all(
        same(
            first[size],
            Executor(small, local, 1).train(start, digits.train, np.arange(size), Streams(0).at(round=1, client=2)).params.flat,
        )
        for size in (3, 18)
    )
