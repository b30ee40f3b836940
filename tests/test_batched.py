"""Clients trained in one batch: as one by one up to rounding, whatever the method, on any number of workers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import same
from fedsieve import (
    Data,
    DataError,
    Engine,
    FedAvg,
    FedSparsify,
    Local,
    Masks,
    Model,
    ModelSpec,
    Streams,
    UsageError,
    build,
    federate,
    fit,
    load,
)
from fedsieve.algorithms.base import Job, evaluation
from fedsieve.data.batches import Examples
from fedsieve.engine.handle import Device, Plan
from fedsieve.engine.transports import Sequential, groups
from fedsieve.errors import Diverged, Interrupted
from fedsieve.local import batched
from fedsieve.local.batched import TOLERANCE, Batched, Call, obstacle
from fedsieve.local.executor import Executor
from fedsieve.wire.message import WireError, pack
from fedsieve.wire.sections import dense, number

RULES = [
    Local(batch=8),
    Local(batch=8, lr=0.05, momentum=0.9),
    Local(batch=8, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    Local(batch=8, weight_decay=0.01),
]
NAMES = ["plain", "momentum", "nesterov", "decay"]
SIZES = ([40, 40, 40, 40], [40, 3, 17, 40, 0, 16, 20])


pytestmark = pytest.mark.usefixtures("one_thread")


def table(examples, features=13):
    """Rows of features, with labels of two classes."""
    draw = Streams(3)("table").numpy()
    x = draw.normal(size=(examples, features)).astype(np.float32)
    return Examples(torch.from_numpy(x), torch.from_numpy((x[:, 0] + x[:, 1] ** 2 > 1).astype(np.int64)), (), ())


def calls(spec, examples, sizes, **settings):
    """A call of each client, from different parameters, on different examples."""
    order = Streams(4)("order").permutation(len(examples))
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [
        Call(
            spec.initial("kaiming", Streams(client)),
            examples,
            part,
            Streams(0).at(round=2, client=client),
            **{key: value(client) if callable(value) else value for key, value in settings.items()},
        )
        for client, part in enumerate(parts)
    ]


def alike(together, alone):
    """Whether trained clients are equal within the tolerance that the setting states."""
    assert len(together) == len(alone)
    for found, expected in zip(together, alone, strict=True):
        for a, b in ((found.params.flat, expected.params.flat), (found.momentum, expected.momentum)):
            assert (a is None) is (b is None)
            assert a is None or (a - b).abs().max() <= TOLERANCE * b.abs().max()
        assert found.examples == expected.examples
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    return True


def both(spec, local, asked, group=10):
    """Train in one batch and one by one; return both, having seen that a batch was made, of as many operations."""
    executor, other = Executor(spec, local, 3), Executor(spec, local, 3)
    together = Batched(executor, group)
    found = together.train(asked)
    assert together._stack is not None
    alone = [call.alone(other) for call in asked]
    assert executor.flops == other.flops
    return found, alone


@pytest.mark.parametrize("sizes", SIZES, ids=["equal", "unequal"])
@pytest.mark.parametrize("local", RULES, ids=NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("network", ["digits", "table"])
def test_a_batch_of_clients_is_trained_as_one_by_one(network, masked, local, sizes, digits, small):
    spec = small if network == "digits" else build(Model(name="tabular"), (13,), 2)
    examples = digits.train if network == "digits" else table(240)
    settings = {"epochs": 2}
    if masked:
        kept = torch.from_numpy(Streams(1)("mask").uniform(spec.layout.maskable) < 0.3)
        settings["masks"] = lambda client: Masks(spec.layout, kept.clone())
    if local.momentum:
        settings["momentum"] = lambda client: torch.ones(spec.layout.trainable) * 0.01 * client if client % 2 else None
    found, alone = both(spec, local, calls(spec, examples, sizes, **settings))
    assert alike(found, alone)
    if masked:
        assert all(trained.params.maskable[~kept].abs().max() == 0 for trained in found)
    assert not same(found[0].params.flat, found[1].params.flat)


@pytest.mark.parametrize("local", RULES[:2], ids=NAMES[:2])
def test_the_proximal_term_pulls_each_client_towards_its_own_start(local, digits, small):
    asked = calls(small, digits.train, SIZES[1], epochs=3, proximal=2.0)
    found, alone = both(small, local, asked)
    assert alike(found, alone)
    free, _ = both(small, local, calls(small, digits.train, SIZES[1], epochs=3))
    moved = [[float((t.params - c.params).flat.norm()) for t, c in zip(some, asked, strict=True)] for some in (found, free)]
    assert all(pulled < far for pulled, far, size in zip(*moved, SIZES[1], strict=True) if size)


def test_sequences_and_layers_without_bias_are_trained_as_one_by_one():
    x = torch.from_numpy(Streams(0)("x").numpy().normal(size=(60, 5, 6)).astype(np.float32))
    y = torch.from_numpy(Streams(0)("y").numpy().integers(0, 3, (60, 5)))
    y[:, 4] = -100  # left out of the loss
    module = nn.Sequential(nn.Sequential(nn.Linear(6, 8, bias=False), nn.Identity(), nn.ReLU()), nn.Linear(8, 3))
    spec, examples = ModelSpec.of(module, x[:1]), Examples(x, y, (), ())
    assert obstacle(spec, Local(), examples) is None
    found, alone = both(spec, Local(batch=4), calls(spec, examples, [12, 9, 12], epochs=2))
    assert alike(found, alone)


def test_one_linear_layer_is_a_network_too(digits):
    spec = ModelSpec.of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.example())
    assert obstacle(spec, Local(), digits.train) is None
    bare = ModelSpec.of(nn.Linear(13, 2), torch.zeros(1, 13))
    assert obstacle(bare, Local(), table(20)) is None
    found, alone = both(bare, Local(batch=4), calls(bare, table(40), [10, 10], epochs=2))
    assert alike(found, alone)


def test_only_calls_that_suit_are_trained_together(digits, small, monkeypatch):
    """By epochs, masks and proximal term; the results come in the order asked, from any mixture."""
    stacked = []
    train = batched.Stack.train
    monkeypatch.setattr(
        batched.Stack, "train", lambda self, some, rounds: stacked.append(len(some)) or train(self, some, rounds)
    )
    masks = Masks(small.layout, torch.arange(small.layout.maskable) % 3 == 0)
    settings = {
        "epochs": lambda client: 2 if client in (2, 5) else 1,
        "masks": lambda client: masks if client in (1, 3) else None,
        "proximal": lambda client: 0.1 if client == 4 else 0.0,
        "purpose": lambda client: "tune" if client == 6 else "train",
    }
    found, alone = both(small, Local(batch=8), calls(small, digits.train, [30, 20, 10, 25, 30, 12, 40], **settings))
    assert alike(found, alone)
    assert sorted(stacked) == [2, 2, 2]


def test_masks_for_sparse_kernels_are_trained_one_by_one():
    spec = build(Model(name="mlp", hidden=(600,)), (1, 12, 12), 10)
    masks = Masks(spec.layout, torch.arange(spec.layout.maskable) % 20 == 0)
    draw = Streams(0)("x").numpy()
    y = torch.arange(40) % 10
    examples = Examples(torch.from_numpy(draw.normal(size=(40, 1, 12, 12)).astype(np.float32)), y, (), ())
    asked = calls(spec, examples, [20, 20], masks=masks)
    together, executor = Batched(Executor(spec, Local(sparse_least=0), 3), 2), Executor(spec, Local(sparse_least=0), 3)
    for found, call in zip(together.train(asked), asked, strict=True):
        assert same(found.params.flat, call.alone(executor).params.flat)
    assert together._stack is None


def test_a_client_that_diverges_is_told_alone(digits, small):
    asked = calls(small, digits.train, [40, 40, 40])
    wild = asked[1].params.flat.clone()
    wild[5] = float("inf")
    broken = replace(asked[1], params=replace(asked[1].params, flat=wild))
    executor = Batched(Executor(small, Local(batch=8), 3), 3)
    fine = executor.train(asked)
    found = executor.train([asked[0], broken, asked[2]])
    assert isinstance(found[1], Diverged)
    assert "client 1, round 2" in str(found[1])
    assert same(found[0].params.flat, fine[0].params.flat)
    assert same(found[2].params.flat, fine[2].params.flat)
    again = executor.train(asked)
    assert all(same(a.params.flat, b.params.flat) for a, b in zip(again, fine, strict=True))


# ---- models that it is not for


class Own(nn.Sequential):
    """A sequence that could do anything."""


def tied():
    module = nn.Sequential(nn.Linear(13, 13), nn.ReLU(), nn.Linear(13, 13), nn.ReLU(), nn.Linear(13, 2))
    module[2].weight = module[0].weight
    return module


def twice():
    layer = nn.Linear(13, 13)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(13, 2))


def frozen():
    module = nn.Sequential(nn.Linear(13, 6), nn.ReLU(), nn.Linear(6, 2))
    module[0].weight.requires_grad_(False)
    return module


def hooked():
    module = nn.Sequential(nn.Linear(13, 6), nn.ReLU(), nn.Linear(6, 2))
    module[1].register_forward_hook(double)
    return module


def double(layer, args, output):
    return 2 * output


REFUSED = [
    (nn.Sequential(nn.Linear(13, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "1 is BatchNorm1d"),
    (nn.Sequential(nn.Linear(13, 4), nn.Dropout(0.1), nn.Linear(4, 2)), "1 is Dropout"),
    (nn.Sequential(nn.Linear(13, 4), nn.GELU(), nn.Linear(4, 2)), "1 is GELU"),
    (nn.Sequential(nn.ReLU(), nn.Linear(13, 2)), "0 is ReLU"),
    (nn.Sequential(nn.Linear(13, 2), nn.Flatten()), "1 is Flatten"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(13, 2)), "0 is Flatten"),
    (Own(nn.Linear(13, 2)), "It is Own"),
    (tied(), "2.weight is shared"),
    (twice(), "2.bias is shared"),
    (frozen(), "0.weight is shared between layers, or not trained"),
    (hooked(), "1 has hooks"),
]


@pytest.mark.parametrize(("module", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_models_that_it_is_not_for_are_refused_with_a_reason_and_trained_alone_by_autograd(module, said):
    spec = ModelSpec.of(module, torch.zeros(1, 13))
    assert said in obstacle(spec, Local(), table(20))
    executor, library = Executor(spec, Local(batch=4), 1), Executor(spec, Local(batch=4, linear="library"), 1)
    asked = calls(spec, table(40), [20, 20])
    for call in asked if said != "0 is Flatten" else []:
        assert same(call.alone(executor).params.flat, call.alone(library).params.flat)


def test_runs_with_such_models_are_refused_before_round_1(digits, tmp_path):
    engine = Engine(rounds=2, group=3)
    for model in (build(Model(name="lenet"), (1, 28, 28), 10), build(Model(name="charlstm"), (5,), 9, tokens=True)):
        assert "steps are written out for linear layers" in obstacle(model, Local(), digits.train)
    model = build(Model(name="cnn"), digits.shape, digits.classes)
    with pytest.raises(UsageError, match=r"engine\.group = 3 .*\n?.*conv1 is Conv2d.*\nSet engine\.group = 1"):
        fit(FedAvg(), model=model, data=digits, engine=engine, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    small = build(Model(hidden=(4,)), digits.shape, digits.classes)
    assert "precision" in obstacle(small, Local(precision="bf16"), digits.train)
    assert "local.linear" in obstacle(small, Local(linear="library"), digits.train)
    assert "augment" in obstacle(small, Local(), replace(digits.train, augment=True))


# ---- groups of clients


def test_groups_are_even_and_in_order():
    assert groups([5, 1, 3], 1) == [[1], [3], [5]]
    assert groups(range(12), 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert groups(range(5), 5) == [[0, 1, 2, 3, 4]]
    assert groups([], 5) == []


@dataclass(frozen=True)
class Kept:
    """What a client of `Odd` keeps."""

    rounds: int


@dataclass(frozen=True)
class Odd:
    """FedAvg whose clients do what they like in between."""

    ways: tuple[str, ...]

    def client_update(self, request, client, mine):
        start, way = request.dense("weights"), self.ways[client.id]
        if way == "never":
            trained, params = None, start
        elif way == "raises first":
            raise DataError("no data today")
        else:
            trained = client.train(start)
            params = trained.params
        if way == "twice":
            params = client.train(params, purpose="second").params
        if way == "thrice after looking":
            for turn in range(2):
                client.evaluate(params)
                params = client.train(params, epochs=1 + turn, purpose=f"turn {turn}").params
        if way == "raises later":
            raise WireError("checksum", 3, "broken")
        if way == "recovers":
            try:
                client.train(replace(start, flat=start.flat * float("nan")), purpose="bad")
            except Diverged:
                params = client.train(params, purpose="good").params
        if way == "diverges":
            client.train(replace(start, flat=start.flat * float("nan")), purpose="bad")
        if way == "fails":
            raise ZeroDivisionError("a fault of the method")
        if way == "interrupts":
            raise Interrupted(2)
        update = dense(params - start)
        loss = trained.loss if trained else 0.0
        return request.reply(update=update, examples=number(client.examples), loss=number(loss)), Kept(1)


WAYS = ("twice", "never", "plain", "raises first", "thrice after looking", "diverges", "recovers", "raises later")


@pytest.fixture(scope="module")
def eight():
    """Eight clients with digits, and their network."""
    settings = Data(name="digits", clients=8, partition="quantity", alpha=2.0, train_limit=240, test_limit=90, min_examples=5)
    data = federate(load(settings), settings, Streams(0))
    return data, build(Model(name="mlp", hidden=(16,)), data.shape, data.classes)


def asked_of(spec, clients, algorithm):
    job = Job(spec, spec.initial("glorot", Streams(0)), 3, 8, Streams(0))
    return [(client, pack(message), None) for client, message in algorithm.broadcast(algorithm.init(job), clients).items()]


def answers(eight, ways, group):
    data, spec = eight
    device = Device(Plan(Odd(ways), spec, data, Local(batch=8), 3, 0, group))
    return [answer for part in groups(range(8), group) for answer in device.answers(asked_of(spec, part, FedAvg()))]


@pytest.mark.parametrize("ways", [WAYS, WAYS[::-1], ("never",) * 8, ("raises first",) * 8, ("twice",) * 8])
def test_no_method_gets_stuck_and_every_client_gets_what_it_gets_alone(ways, eight):
    alone = answers(eight, ways, 1)
    for group in (8, 3):
        together, again = (answers(eight, ways, group) for _ in range(2))
        for way, one, found, repeated in zip(ways, alone, together, again, strict=True):
            if way in ("raises first", "raises later", "diverges"):
                assert type(found) is type(one)
                assert str(found) == str(one)
                continue
            (expected, _), (reply, mine), (same_reply, _) = one, found, repeated
            a, b = expected.dense("update").flat, reply.dense("update").flat
            assert (a - b).abs().max() <= 2 * TOLERANCE
            assert (way == "never") is bool(b.eq(0).all())
            assert pack(reply) == pack(same_reply)
            assert mine is not None


@pytest.mark.parametrize(("way", "error"), [("fails", ZeroDivisionError), ("interrupts", Interrupted)])
def test_a_fault_of_a_method_ends_the_run_and_leaves_no_client_waiting(way, error, eight):
    data, spec = eight
    device = Device(
        Plan(Odd(("plain", "twice", way, "twice", "plain", "plain", "plain", "plain")), spec, data, Local(), 3, 0, 8)
    )
    with pytest.raises(error):
        list(device.answers(asked_of(spec, range(8), FedAvg())))
    well = Device(Plan(FedAvg(), spec, data, Local(), 3, 0, 8))
    assert len(list(well.answers(asked_of(spec, range(8), FedAvg())))) == 8
    device._turns._pool.shutdown()  # waits for every thread


def test_an_interrupt_while_a_batch_is_trained_leaves_no_client_waiting(eight, monkeypatch):
    data, spec = eight
    device = Device(Plan(FedAvg(), spec, data, Local(), 3, 0, 8))
    with monkeypatch.context() as context:
        context.setattr(batched.Stack, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(device.answers(asked_of(spec, range(8), FedAvg())))
    assert len(list(device.answers(asked_of(spec, range(8), FedAvg())))) == 8
    device._turns._pool.shutdown()


# ---- runs


def comparable(result):
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_memory_mb")} for row in result.rows]


METHODS = [
    (FedAvg(), Local(batch=8)),
    (FedSparsify(density=0.2), Local(batch=8, momentum=0.9)),
    (FedSparsify(density=0.2, variant="local", tune_epochs=1, client_momentum="kept"), Local(batch=8, momentum=0.5)),
]


@pytest.mark.parametrize(("algorithm", "local"), METHODS, ids=["fedavg", "global", "local"])
def test_runs_repeat_on_any_number_of_workers_and_after_an_interruption(algorithm, local, eight, tmp_path):
    data, spec = eight
    engine = Engine(rounds=4, cohort=7, group=3, dropout=0.2, checkpoint_every=2, eval_clients=4)
    counts = (0, 1, 2) if isinstance(algorithm, FedAvg) else (0, 2) if algorithm.variant == "local" else (0, 0)
    runs = [fit(algorithm, model=spec, data=data, local=local, engine=replace(engine, workers=n)) for n in counts]
    assert any(row["lost"] for row in runs[0].rows)
    for run in runs[1:]:
        assert same(run.params.flat, runs[0].params.flat)
        assert comparable(run) == comparable(runs[0])

    def stop(row):
        if row["round"] == 3:
            raise KeyboardInterrupt

    arguments = {"model": spec, "data": data, "local": local, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        fit(algorithm, **arguments, engine=engine, watch=stop)
    with pytest.raises(UsageError, match="another config"):
        fit(algorithm, **arguments, engine=replace(engine, group=2), resume=True)
    resumed = fit(algorithm, **arguments, engine=engine, resume=True)
    assert same(resumed.params.flat, runs[0].params.flat)
    assert comparable(resumed) == comparable(runs[0])


@pytest.mark.parametrize(("algorithm", "local"), METHODS, ids=["fedavg", "global", "local"])
def test_a_round_in_groups_is_the_round_one_by_one_up_to_rounding(algorithm, local, eight):
    data, spec = eight
    alone, together = (
        fit(algorithm, model=spec, data=data, local=local, engine=Engine(rounds=2, group=group, eval_clients=0))
        for group in (1, 4)
    )
    kept = alone.masks.kept == together.masks.kept
    assert float((~kept).float().mean()) < 0.005
    differs = (alone.params.flat - together.params.flat).abs()
    differs[: len(kept)][~kept] = 0
    assert differs.max() <= 1e-4 * alone.params.flat.abs().max()
    assert together.rows[0]["bytes_down"] == alone.rows[0]["bytes_down"]
    assert together.summary["flops"] == pytest.approx(alone.summary["flops"], rel=0.01)


def test_only_the_client_that_diverges_is_lost(eight):
    """One client holds a feature that is not a number."""
    data, spec = eight
    x = data.train.x.float().clone()
    x[data.parts[3]] = float("nan")
    bad = replace(data, train=replace(data.train, x=x))
    engine = Engine(rounds=2, group=8, nonfinite="drop", eval_clients=0)
    result = fit(FedAvg(), model=spec, data=bad, engine=engine)
    assert [list(row["lost"]) for row in result.rows] == [["3"], ["3"]]
    assert torch.isfinite(result.params.flat).all()
    with pytest.raises(Diverged, match="client 3, round 1"):
        fit(FedAvg(), model=spec, data=bad, engine=Engine(rounds=1, group=8))


def test_fedsparsify_learns_digits_in_groups(eight):
    data, spec = eight
    result = fit(
        FedSparsify(density=0.2),
        model=spec,
        data=data,
        local=Local(batch=8),
        engine=Engine(rounds=15, group=5, eval_clients=0),
        start=spec.initial("glorot", Streams(0)),
    )
    assert result.accuracy > 0.75
    assert result.density == pytest.approx(0.2, abs=1e-3)


def test_evaluations_in_groups_are_those_one_by_one(eight):
    data, spec = eight
    found = []
    for group in (1, 3):
        transport = Sequential(Plan(FedAvg(), spec, data, Local(), 1, 0, group))
        params = spec.initial("glorot", Streams(0))
        payload = pack(evaluation(params, Masks.full(spec.layout), 1))
        found.append(list(transport.exchange(dict.fromkeys(range(8), payload))))
        transport.close()
    assert found[0] == found[1]
