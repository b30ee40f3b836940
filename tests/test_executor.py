"""Local training: equal to a plain loop, on the support, repeatable, and leaving no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import same
from fedsieve import Diverged, Kind, Local, Masks, Model, ModelSpec, Params, Streams, build
from fedsieve.local.executor import Client, Executor
from fedsieve.reparam.bernoulli import BernoulliMask
from fedsieve.reparam.power import Power
from fedsieve.reparam.sign import SignMask
from fedsieve.reparam.threshold import ThresholdMask

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


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("local", RULES, ids=str)
def test_training_equals_a_plain_loop_with_torch_optim(local, adam, digits):
    module = network()
    spec = ModelSpec.of(module, digits.example())
    executor = Executor(spec, local, rounds=1)
    streams, part = Streams(5).at(round=1, client=2), digits.parts[2]
    lr = 0.01 if adam else local.lr
    trained = executor.train(spec.initial("module", streams), digits.train, part, streams, lr=lr, adam=adam)

    plain = copy.deepcopy(module)
    if adam:
        optim = torch.optim.Adam(plain.parameters(), lr=lr, weight_decay=local.weight_decay)
    else:
        optim = torch.optim.SGD(
            plain.parameters(), lr=lr, momentum=local.momentum, nesterov=local.nesterov, weight_decay=local.weight_decay
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
    for name in trained.params.keys() - ({"0.bias"} if adam else set()):  # its gradient is rounding before a BatchNorm
        torch.testing.assert_close(trained.params[name], state[name], rtol=2e-4, atol=2e-6)
    assert trained.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert trained.examples == len(part)


def test_adam_moves_each_weight_by_its_own_rate(digits):
    spec = ModelSpec.of(network(), digits.example())
    executor = Executor(spec, Local(batch=10_000), rounds=1)
    streams = Streams(5).at(round=1, client=2)
    start, moves = spec.initial("module", streams), torch.arange(spec.layout.trainable) % 3 / 2.0
    trained = executor.train(start, digits.train, digits.parts[2], streams, lr=0.01, moves=moves, adam=True)
    moved = (trained.params - start).trainable.abs()
    for factor in (0.0, 0.5, 1.0):  # a first step of Adam is as long as the rate, whatever the gradient
        assert float(moved[moves == factor].median()) == pytest.approx(0.01 * factor, rel=1e-3)
        assert float(moved[moves == factor].max()) <= 0.01001 * factor


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


# ---- what a method may ask besides


def flat_gradient(spec, flat, x, y, training=False):
    """The gradient by autograd, in the dumbest way."""
    module = copy.deepcopy(spec.module).train(training)
    params = Params(spec.layout, flat)
    state = {name: params[name].clone() for name in params}
    module.load_state_dict(state, strict=False)
    loss = spec.loss(module(x), y)
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [named[slot.name] for slot in spec.layout.slots if slot.kind is not Kind.BUFFER])
    return torch.cat([gradient.flatten() for gradient in found])


def plain_steps(spec, start, examples, order, streams, lr, rule):
    """Train by hand: `rule(latent, seen, gradient) -> (latent, seen)` after each gradient at `seen`."""
    flat = start.flat.clone()
    trainable = spec.layout.trainable
    shuffled = order[streams("train/shuffle/0").permutation(len(order))]
    latent, seen = flat.clone(), rule(flat.clone(), None)
    for x, y in examples.epoch(shuffled, 32):
        gradient = flat_gradient(spec, seen, x, y)
        latent[:trainable] -= lr * rule(latent, gradient)
        seen = rule(latent, None)
    return latent


def test_a_drift_is_added_to_every_gradient(digits, small):
    start, order, streams = small.initial("kaiming", Streams(1)), digits.parts[0], Streams(1).at(round=1, client=0)
    drift = torch.linspace(-1, 1, small.layout.trainable)
    trained = Executor(small, Local(lr=0.1), 1).train(start, digits.train, order, streams, drift=drift)
    expected = plain_steps(small, start, digits.train, order, streams, 0.1, lambda w, g: w.clone() if g is None else g + drift)
    torch.testing.assert_close(trained.params.flat, expected, rtol=0, atol=1e-6)
    assert trained.steps == -(-len(order) // 32)


def test_what_does_not_move_stays_as_it_is_whatever_the_rule(digits, small):
    start, order, streams = small.initial("kaiming", Streams(1)), digits.parts[0], Streams(1).at(round=1, client=0)
    moves = torch.arange(small.layout.trainable) % 2 == 0
    local = Local(lr=0.1, momentum=0.9, weight_decay=0.01)
    trained = Executor(small, local, 1).train(start, digits.train, order, streams, moves=moves)
    changed = trained.params.flat != start.flat
    assert not changed[: small.layout.trainable][~moves].any()
    assert changed.any()


REPARAMS = {
    "sign": lambda w: SignMask(w, limit=1.0),
    "sign-identity": lambda w: SignMask(w, estimator="identity", limit=0.0),
    "sign-tanh": lambda w: SignMask(w, estimator="tanh", scale=torch.full_like(w, 2.0)),
    "threshold": lambda w: ThresholdMask(w, threshold=0.1, penalty=torch.full_like(w, 0.01)),
    "power": lambda w: Power(1.5),
}
DERIVATIVES = {
    "sign": lambda w, z: w * (z.abs() <= 1),
    "sign-identity": lambda w, z: w,
    "sign-tanh": lambda w, z: 2 * w * (1 - z.tanh() ** 2),
    "threshold": lambda w, z: w,
    "power": lambda w, z: 1.5 * z.abs() ** 0.5,
}


@pytest.mark.parametrize("name", REPARAMS)
def test_a_reparametrised_network_learns_what_its_map_says(name, digits, small):
    n, order, streams = small.layout.maskable, digits.parts[0], Streams(1).at(round=1, client=0)
    weights = small.initial("kaiming", Streams(2)).maskable
    start = small.initial("kaiming", Streams(1))
    reparam = REPARAMS[name](weights)

    def rule(latent, gradient):
        if gradient is None:
            seen = latent.clone()
            seen[:n] = reparam.effective(latent[:n])
            return seen
        gradient = gradient.clone()
        gradient[:n] *= DERIVATIVES[name](weights, latent[:n])
        if name == "threshold":
            gradient[:n] += 0.01
        return gradient

    trained = Executor(small, Local(lr=0.1), 1).train(start, digits.train, order, streams, reparam=reparam)
    expected = plain_steps(small, start, digits.train, order, streams, 0.1, rule)
    if name == "sign":
        assert trained.params.maskable.abs().max() <= 1
    torch.testing.assert_close(trained.params.flat, expected, rtol=0, atol=1e-6)


def test_random_masks_are_thrown_anew_in_each_step_and_repeat(digits, small):
    order, streams = digits.parts[0], Streams(1).at(round=1, client=0)
    weights, scores = small.initial("kaiming", Streams(2)).maskable, Params.zeros(small.layout)
    executor = Executor(small, Local(lr=1.0), 1)
    trained = [executor.train(scores, digits.train, order, streams, reparam=BernoulliMask(weights)).params.flat for _ in "ab"]
    assert same(*trained)
    other = executor.train(scores, digits.train, order, streams.at(client=1), reparam=BernoulliMask(weights)).params.flat
    assert not same(trained[0], other)
    coins = BernoulliMask(weights).bound(lambda v: v, streams("x"))
    shown = [(coins.effective(torch.full_like(weights, 2.0)) != 0).float().mean() for _ in range(40)]
    assert len(set(map(float, shown))) > 10
    assert float(torch.stack(shown).mean()) == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.01)


def test_a_sign_mask_trains_over_kept_weights_as_it_does_densely(digits):
    spec = build(Model(name="cnn"), (1, 8, 8), 10)
    draws = torch.Generator().manual_seed(0)
    masks = Masks(spec.layout, torch.rand(spec.layout.maskable, generator=draws) < 0.1)
    weights = spec.initial("kaiming", Streams(0)).under(masks).maskable
    latent = Params(spec.layout, torch.rand(spec.layout.size, generator=draws) * 0.2 - 0.1)
    streams = Streams(0).at(round=1, client=0)
    found = [
        Executor(spec, Local(lr=1.0, batch=16, convolution="library", **settings), 1)
        .train(latent, digits.train, digits.parts[0], streams, masks=masks, reparam=SignMask(weights))
        .params.under(masks)
        .flat
        for settings in ({"sparse_least": 0}, {"sparse_conv": 0.0, "sparse_linear": 0.0})
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def client_of(spec, data, local=None, **settings):
    streams = Streams(1).at(round=1, client=0)
    executor = Executor(spec, local or Local(batch=16), 1)
    return Client(0, executor, data.train, data.parts[0], data.test, data.shares[0], streams, **settings)


def test_gradients_are_those_of_the_loss_and_reach_pruned_weights(digits, small):
    client, start = client_of(small, digits), small.initial("kaiming", Streams(1))
    masks = Masks(small.layout, torch.arange(small.layout.maskable) % 4 == 0)
    ((x, y),) = digits.train.epoch(digits.parts[0], len(digits.parts[0]))
    whole = client.gradients(start, masks, batches=None)
    trainable = small.layout.trainable
    torch.testing.assert_close(whole.trainable, flat_gradient(small, start.under(masks).flat, x, y), rtol=1e-4, atol=1e-6)
    assert (whole.maskable[~masks.kept] != 0).any()
    assert (whole.flat[trainable:] == 0).all()
    one, again = (client.gradients(start, batches=1) for _ in range(2))
    assert same(one.flat, again.flat)
    order = digits.parts[0][Streams(1).at(round=1, client=0)("gradients").permutation(len(digits.parts[0]))]
    parts = [flat_gradient(small, start.flat, x, y) for x, y in digits.train.epoch(order[:32], 16)]
    torch.testing.assert_close(parts[0], one.trainable, rtol=1e-4, atol=1e-6)
    squared = client.gradients(start, batches=2, power=2).trainable
    torch.testing.assert_close((parts[0] ** 2 + parts[1] ** 2) / 2, squared, rtol=1e-4, atol=1e-8)


def test_curvature_is_the_slope_of_half_the_squared_gradient(digits):
    spec = ModelSpec.of(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 10)), torch.zeros(1, 1, 8, 8))
    client, start = client_of(spec, digits), spec.initial("module", Streams(0))
    found = client.gradients(start, batches=1, curvature=True).trainable
    along = client.gradients(start, batches=1).trainable
    step = 1e-2 / float(along.norm())
    ahead, behind = (
        client.gradients(Params(spec.layout, start.flat + sign * step * along), batches=1).trainable for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=0.02, atol=2e-3 * float(found.abs().max()))


def test_statistics_are_measured_and_nothing_else_changes(digits):
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    spec = ModelSpec.of(module, torch.zeros(1, 1, 8, 8))
    start = spec.initial("kaiming", Streams(0))
    measured = client_of(spec, digits, Local(batch=1000)).statistics(start)
    ((x, _),) = digits.train.epoch(digits.parts[0], 1000)
    weight, bias = start["0.weight"], start["0.bias"]
    outputs = torch.nn.functional.conv2d(x, weight, bias)
    torch.testing.assert_close(measured["1.running_mean"], outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured["1.running_var"], outputs.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert same(measured.trainable, start.trainable)
    assert not same(measured.flat, start.flat)


def test_another_network_is_trained_by_its_own_layout(digits, small):
    other = build(Model(name="mlp", hidden=(8,)), digits.shape, digits.classes)
    client, start = client_of(small, digits), other.initial("kaiming", Streams(0))
    trained = client.train(start, spec=other)
    expected = client_of(other, digits).train(start)
    assert same(trained.params.flat, expected.params.flat)
    assert client.evaluate(trained.params, spec=other).predictions == len(digits.shares[0])
