"""Local training: equal to a plain loop, on the support, repeatable, and leaving no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import same
from fedsieve import Diverged, Local, Masks, Model, ModelSpec, Params, Streams, build
from fedsieve.local.executor import Executor

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10))


RULES = [
    Local(lr=0.05),
    Local(lr=0.05, momentum=0.9),
    Local(lr=0.05, momentum=0.9, nesterov=True),
    Local(lr=0.05, momentum=0.5, weight_decay=0.01),
    Local(lr=0.05, weight_decay=0.01),
]


@pytest.mark.parametrize("local", RULES, ids=str)
def test_training_equals_a_plain_loop_with_torch_optim(local, digits):
    module = network()
    spec = ModelSpec.of(module, digits.example())
    executor = Executor(spec, local, rounds=1)
    streams, part = Streams(5).at(round=1, client=2), digits.parts[2]
    trained = executor.train(spec.initial("module", streams), digits.train, part, streams)

    plain = copy.deepcopy(module)
    optim = torch.optim.SGD(
        plain.parameters(), lr=local.lr, momentum=local.momentum, nesterov=local.nesterov, weight_decay=local.weight_decay
    )
    order = part[streams("train/shuffle/0").permutation(len(part))]
    losses = []
    for x, y in digits.train.epoch(order, local.batch):
        optim.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        optim.step()
        losses += [loss.item()] * len(y)
    state = plain.state_dict()
    for name in trained.params:
        torch.testing.assert_close(trained.params[name], state[name], rtol=2e-4, atol=2e-6)
    assert trained.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert trained.examples == len(part)


@pytest.mark.parametrize("local", RULES, ids=str)
def test_masked_training_stays_on_the_support(local, digits):
    spec = ModelSpec.of(network(), digits.example())
    executor = Executor(spec, local, rounds=1)
    streams = Streams(5).at(round=1, client=2)
    kept = torch.from_numpy(streams("mask").uniform(spec.layout.maskable) < 0.3)
    masks = Masks(spec.layout, kept)
    momentum = torch.ones(spec.layout.trainable) if local.momentum else None
    trained = executor.train(
        spec.initial("module", streams), digits.train, digits.parts[2], streams, masks=masks, epochs=2, momentum=momentum
    )
    assert trained.params.maskable[~kept].abs().max() == 0
    assert trained.params.maskable[kept].ne(0).all()
    if momentum is not None:
        assert trained.momentum[: spec.layout.maskable][~kept].abs().max() == 0
        assert trained.momentum[: spec.layout.maskable][kept].ne(0).all()
    start = spec.initial("module", streams)
    assert trained.params.dense.ne(start.dense).any()


def test_momentum_that_is_kept_goes_on(digits, small):
    """Two epochs at once, and one after the other with the velocity handed over, are the same."""
    streams = Streams(1).at(round=1, client=0)
    executor = Executor(small, Local(lr=0.05, momentum=0.9, batch=64), rounds=1)
    part = digits.parts[0]

    class Fixed(Streams):
        __slots__ = ()

        def __call__(self, purpose):
            return super().__call__(purpose.replace("shuffle/1", "shuffle/0"))

    fixed = Fixed(1, 1, 0)
    start = small.initial("glorot", streams)
    both = executor.train(start, digits.train, part, fixed, epochs=2)
    first = executor.train(start, digits.train, part, fixed, epochs=1)
    second = executor.train(first.params, digits.train, part, fixed, epochs=1, momentum=first.momentum)
    assert same(both.params.flat, second.params.flat)


def test_proximal_term_pulls_towards_the_start(digits, small):
    streams = Streams(1).at(round=1, client=0)
    executor = Executor(small, Local(lr=0.1), rounds=1)
    start = small.initial("glorot", streams)
    distances = []
    for weight in (0.0, 1.0, 5.0):
        moved = executor.train(start, digits.train, digits.parts[0], streams, epochs=3, proximal=weight)
        distances.append(float((moved.params - start).flat.norm()))
    assert distances[0] > distances[1] > distances[2] > 0


def test_one_proximal_step_by_hand(three, vector):
    """w - lr * (g + mu * (w - anchor)), after a first step without distance to the anchor."""
    from fedsieve.local.optim import Sgd

    weights, gradient = torch.tensor([1.0, 2.0]), torch.zeros(2)
    optim = Sgd(Local(), 0.5, (weights, [weights]), (gradient, [gradient]), None, None, proximal=2.0)
    optim.step((torch.tensor([1.0, 0.0]),))
    assert weights.tolist() == [0.5, 2.0]
    optim.step((torch.tensor([0.0, 0.0]),))
    assert weights.tolist() == [1.0, 2.0]


def test_calls_leave_no_trace(digits):
    """The same call gives the same whatever was done before, and torch's global stream is as it was."""
    spec = build(Model(name="cnn6", norm="batch"), (1, 8, 8), 10)
    streams, part = Streams(2).at(round=3, client=1), digits.parts[1]
    start = spec.initial("kaiming", streams)
    executor = Executor(spec, Local(momentum=0.9), rounds=5)
    before = torch.random.get_rng_state()
    first = executor.train(start, digits.train, part, streams)
    assert torch.random.get_rng_state().equal(before)
    executor.train(first.params, digits.train, digits.parts[0], streams, masks=Masks.full(spec.layout))
    executor.evaluate(start, digits.test, digits.shares[0])
    again = executor.train(start, digits.train, part, streams)
    assert same(first.params.flat, again.params.flat)
    fresh = Executor(spec, Local(momentum=0.9), rounds=5).train(start, digits.train, part, streams)
    assert same(first.params.flat, fresh.params.flat)
    assert same(start.flat, spec.initial("kaiming", streams).flat)
    other = executor.train(start, digits.train, part, streams.at(client=4))
    assert not same(first.params.flat, other.params.flat)


def test_evaluation_equals_a_plain_one(digits):
    module = network()
    spec = ModelSpec.of(module, digits.example())
    trained = Executor(spec, Local(), 1).train(
        spec.initial("module", Streams(0)), digits.train, digits.parts[0], Streams(0).at(round=1, client=0)
    )
    found = Executor(spec, Local(), 1).evaluate(trained.params, digits.test, np.arange(len(digits.test)))
    module.load_state_dict({name: trained.params[name] for name in trained.params}, strict=False)
    module.eval()
    x, y = next(digits.test.epoch(np.arange(len(digits.test)), 1000))
    with torch.no_grad():
        outputs = module(x)
    assert found.correct == int((outputs.argmax(1) == y).sum())
    assert found.mean_loss == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-5)
    assert found.predictions == len(y)
    assert Executor(spec, Local(), 1).evaluate(trained.params, digits.test, np.arange(0)).predictions == 0


def test_a_loss_that_is_not_finite_is_reported(digits, small):
    streams = Streams(0).at(round=2, client=3)
    with pytest.raises(Diverged, match="client 3, round 2"):
        Executor(small, Local(lr=1e30), 1).train(
            small.initial("glorot", streams), digits.train, digits.parts[3], streams, epochs=3
        )


def test_bf16_trains_and_differs(digits, small):
    streams = Streams(0).at(round=1, client=0)
    start = small.initial("glorot", streams)
    runs = [
        Executor(small, Local(precision=p), 1).train(start, digits.train, digits.parts[0], streams, epochs=4)
        for p in ("fp32", "bf16")
    ]
    assert not same(runs[0].params.flat, runs[1].params.flat)
    assert runs[1].loss == pytest.approx(runs[0].loss, rel=0.05)
    assert runs[1].params.flat.dtype == torch.float32


def test_flops_count_what_the_mask_leaves(digits, small):
    streams = Streams(0).at(round=1, client=0)
    start, part = small.initial("glorot", streams), digits.parts[0]
    executor = Executor(small, Local(), 1)
    executor.train(start, digits.train, part, streams)
    assert executor.flops == 3 * len(part) * 2 * (64 * 16 + 16 * 10)
    half = Masks(small.layout, torch.arange(small.layout.maskable) % 2 == 0)
    executor.flops = 0
    executor.train(start, digits.train, part, streams, masks=half)
    assert executor.flops == 3 * len(part) * (64 * 16 + 16 * 10)


def test_unused_parameters_stay(digits):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    spec = ModelSpec.of(Spare(), digits.example())
    streams = Streams(0).at(round=1, client=0)
    start = spec.initial("module", streams)
    trained = Executor(spec, Local(), 1).train(start, digits.train, digits.parts[0], streams)
    assert same(trained.params["unused.weight"], start["unused.weight"])
    assert not same(trained.params["used.weight"], start["used.weight"])


def test_parameters_are_named_views_of_one_vector(small):
    params = Params.zeros(small.layout)
    params["fc1.weight"][2, 3] = 7
    assert params.flat.sum() == 7
    assert params.maskable.sum() == 7
    assert set(params) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    batch = Params(small.layout, torch.zeros(5, small.layout.size))
    assert batch["fc2.weight"].shape == (5, 10, 16)
