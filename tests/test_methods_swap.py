"""FedTiny, FedDST and PruneFL: masks that move. Values worked out by hand, and what the released code gets wrong."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import same
from fedsieve import (
    Data,
    Engine,
    FedAvg,
    Kind,
    Layout,
    Local,
    Masks,
    Message,
    Model,
    ModelSpec,
    Params,
    Slot,
    Streams,
    UsageError,
    WireError,
    build,
    federate,
    fit,
    load,
    pack,
    unpack,
)
from fedsieve.aggregate.mean import HeldMean, StatisticsMean
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.feddst import FedDST
from fedsieve.algorithms.fedtiny import FedTiny
from fedsieve.algorithms.prunefl import PruneFL, _times, paying
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.handle import Device, Plan, handle
from fedsieve.init import kaiming_uniform
from fedsieve.local.executor import Client, Executor, Trained
from fedsieve.local.memory import training_memory
from fedsieve.models.candidates import Pool
from fedsieve.sparsity.allocate import allocate
from fedsieve.sparsity.regrow import exchanges, lowered
from fedsieve.sparsity.schedule import exchanged
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot
from fedsieve.wire.sections import indices, mask, number, values, vector
from fedsieve.wire.versions import Versions

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = Local(epochs=1, batch=16, lr=0.1, momentum=0.5, weight_decay=0.01)
MOVERS = [
    FedTiny(density=0.2, every=2, stop=100, selection="loss"),
    FedDST(density=0.2, every=2),
    PruneFL(density=0.2, every=2, initial=2),
]
movers = pytest.mark.parametrize("algorithm", MOVERS, ids=lambda each: type(each).__name__)


def network(norm, channels=4):
    norms = {"batch": nn.BatchNorm2d(channels), "group": nn.GroupNorm(2, channels), "none": nn.Identity()}
    layers = (
        nn.Conv2d(1, channels, 3, padding=1),
        norms[norm],
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 6, 3),
        nn.ReLU(),
    )
    return ModelSpec.of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10)), torch.zeros(1, 1, 8, 8))


def client_of(spec, digits, client=0, round=1, local=LOCAL, rounds=20):
    streams = Streams(3).at(round=round, client=client)
    parts = (digits.train, digits.parts[client], digits.test, digits.shares[client])
    return Client(client, Executor(spec, local, rounds), *parts, streams)


def some(layout, share, seed=0):
    return Masks(layout, torch.from_numpy(Streams(seed)("some").uniform(layout.maskable) < share))


def sized(*sizes, bias=1):
    slots = [Slot(f"w{i}", (size,), Kind.WEIGHT, True, i) for i, size in enumerate(sizes)]
    return Layout.of([*slots, Slot("b", (bias,), Kind.BIAS, False, len(sizes))])


def job_of(layout, start, rounds=20, clients=3, **more):
    spec = type("Spec", (), {"layout": layout, "flops": {slot.name: 2 * slot.numel for slot in layout.slots}})
    return Job(spec, start, rounds, clients, Streams(0), **more)


def kept(layout, *positions):
    return Masks(layout, torch.zeros(layout.maskable, dtype=torch.bool).index_fill_(0, torch.tensor(positions), True))


# ---- gradients of pruned weights in little memory


@pytest.mark.parametrize(
    "spec", [network("batch"), network("group"), build(Model(name="cnn6"), (1, 8, 8), 10)], ids=["batch", "group", "cnn6"]
)
@pytest.mark.parametrize("training", [False, True])
def test_top_gradients_are_the_largest_of_the_whole_gradient_at_pruned_weights(spec, training, digits):
    client, layout = client_of(spec, digits), spec.layout
    params, masks = spec.initial("kaiming", Streams(0)), some(layout, 0.3)
    counts = {slot.name: 1 + slot.numel // 9 for slot in layout.masked_slots[1:]}
    places, found = client.top_gradients(params, masks, counts, training=training, purpose="grow")
    whole = client.gradients(params, masks, training=training, purpose="grow").maskable
    assert (places.diff() > 0).all()
    assert not masks.kept[places].any()
    torch.testing.assert_close(found, whole[places], rtol=1e-3, atol=1e-6)
    for slot in layout.masked_slots:
        begin, end = layout.spans[slot.name]
        chosen = places[(places >= begin) & (places < end)]
        assert len(chosen) == counts.get(slot.name, 0)
        if len(chosen):
            rest = torch.ones(slot.numel, dtype=torch.bool).index_fill(0, chosen - begin, False) & ~masks.kept[begin:end]
            assert whole[chosen].abs().min() >= whole[begin:end][rest].abs().max() * (1 - 1e-3)


def test_positions_are_in_the_whole_vector_not_ranks_among_pruned_weights(digits):
    """Released code: the rank of a pruned weight among the pruned ones was taken for its position."""
    spec = ModelSpec.of(nn.Linear(64, 10), torch.zeros(1, 64))
    flat = replace(digits, train=replace(digits.train, x=digits.train.x.flatten(1)))
    client = client_of(spec, flat)
    masks = Masks(spec.layout, torch.arange(640) < 320)
    params = spec.initial("kaiming", Streams(0))
    whole = client.gradients(params, masks).maskable.abs()
    places, _ = client.top_gradients(params, masks, {"weight": 5})
    assert set(places.tolist()) == set((320 + whole[320:].argsort(descending=True)[:5]).tolist())
    assert set(places.tolist()) != set(whole[320:].argsort(descending=True)[:5].tolist())


def test_fewer_pruned_weights_than_asked_and_tensors_without_gradient(digits):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    spec = ModelSpec.of(Spare(), torch.zeros(1, 1, 8, 8))
    client, params = client_of(spec, digits), spec.initial("kaiming", Streams(0))
    masks = Masks(spec.layout, torch.arange(649) != 7)
    places, found = client.top_gradients(params, masks, {"used.weight": 4})
    assert places.tolist() == [7]
    assert len(found) == 1
    places, found = client.top_gradients(params, Masks(spec.layout, torch.arange(649) < 640), {"unused.weight": 4})
    assert (places >= 640).all()
    assert found.tolist() == [0.0] * 4
    places, found = client.top_gradients(params, masks, {})
    assert len(places) == len(found) == 0


def test_top_gradients_leave_no_trace(digits):
    spec = network("batch")
    client, params = client_of(spec, digits), spec.initial("kaiming", Streams(0))
    expected = client.train(params).params.flat.clone()
    for _ in range(2):
        client.top_gradients(params, some(spec.layout, 0.5), {"7.weight": 3}, training=True)
        assert same(client.train(params).params.flat, expected)
    assert all(each.requires_grad and each.grad is None for each in client._executor._all.bound.parameters)


class Live(TorchDispatchMode):
    """Follows how many blocks of memory of exactly so many bytes are alive at a time, of those that are made meanwhile."""

    def __init__(self, size):
        super().__init__()
        self.size, self.now, self.most, self._seen = size, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() == self.size and storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.now += 1
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr())
        return made

    def _freed(self, pointer):
        self._seen.discard(pointer)
        self.now -= 1


def test_one_tensor_of_the_gradient_is_held_at_a_time(digits):
    """By count of what the backward pass makes and what of it is alive: of six weights of 192 x 192 one, or its copy."""
    hidden = 192
    spec = build(Model(name="mlp", hidden=(hidden,) * 7), digits.shape, digits.classes)
    client, params, masks = client_of(spec, digits), spec.initial("kaiming", Streams(0)), some(spec.layout, 0.1)
    client.top_gradients(params, masks, {})  # makes the form
    batch = next(client._batches(1, "g"))
    with Live(4 * hidden * hidden) as live:
        ties = {slot.name: Streams(0)(slot.name) for slot in spec.layout.masked_slots}
        counts = dict.fromkeys(ties, 10)
        client._executor.top_gradients(params, batch, masks, counts, stream=Streams(0)("s"), ties=ties.__getitem__)
    assert live.most <= 2
    with Live(4 * hidden * hidden) as dense:
        client.gradients(params, masks)
    assert dense.most >= 6


@pytest.mark.parametrize("algorithm", [FedTiny(density=0.3, every=2, pool=1, alpha=1.0, stop=20), FedDST(density=0.3, every=2)])
def test_a_client_with_one_example_grows_by_that_one(algorithm, digits):
    """Released code: an example alone was taken twice, so that BatchNorm could normalise it. In evaluation it need not be."""
    layers = nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)
    spec = ModelSpec.of(nn.Sequential(*layers), torch.zeros(1, 1, 8, 8))
    client = client_of(spec, replace(digits, parts=[digits.parts[0][:1]]), round=2)
    client.train = lambda params, masks: Trained(params.under(masks), 1, 0.5, None, 1)  # nor could it train
    state = algorithm.init(Job(spec, spec.initial("kaiming", Streams(0)), 20, 1, Streams(0)))
    state, masks = replace(state, round=1), state.versions.masks
    swaps = algorithm._swaps(state)
    reply, _ = algorithm.client_update(algorithm.broadcast(state, [0])[0], client, None)
    spent = client._executor.flops
    assert spent == 2 * spec.density_flops(masks) + sum(spec.flops[name] for name in swaps)  # of one example
    slope, sent = client.gradients(state.params, masks).maskable, algorithm.read(state, reply)
    grown = sent[2] if isinstance(algorithm, FedTiny) else (sent[1].kept & ~masks.kept).nonzero().flatten()
    for name, count in swaps.items():
        begin, end = spec.layout.spans[name]
        here = grown[(grown >= begin) & (grown < end)]
        steep = slope[begin:end].abs().masked_fill(masks.kept[begin:end], -1)
        assert sorted(steep[here - begin].tolist()) == pytest.approx(sorted(steep.topk(count).values.tolist()), rel=1e-5)


def test_flops_of_growing_are_one_dense_weight_gradient_of_the_block(digits, small):
    executor = client_of(small, digits)._executor
    client, masks = client_of(small, digits, local=Local(batch=16)), some(small.layout, 0.25)
    executor, params = client._executor, small.initial("kaiming", Streams(0))
    last = small.layout.masked_slots[-1].name
    client.top_gradients(params, masks, {last: 3})
    assert executor.flops == 16 * (2 * small.density_flops(masks) + 2 * 16 * 10)


@pytest.mark.parametrize("lacks", [1, 8])
def test_statistics_that_are_not_those_of_all_candidates_are_refused(digits, lacks):
    spec = network("batch")
    algorithm = FedTiny(density=0.2, pool=2)
    state = algorithm.init(Job(spec, spec.initial("kaiming", Streams(0)), 20, 6, Streams(0)))
    width = spec.layout.size - spec.layout.trainable
    asked = algorithm.broadcast(replace(state, statistics=torch.ones(2, width)), [0])[0]
    short = asked.sections | {"statistics": vector(torch.ones(2 * width - lacks))}
    with pytest.raises(WireError, match=f"{2 * width - lacks} numbers of 2 candidates, not {width} each"):
        algorithm.client_update(Message("setup", 1, spec.layout, short), client_of(spec, digits), None)


def test_flops_of_the_choice_are_forward_passes_over_all_examples(digits, small):
    """Of 1184 weights 237 are kept; 240 examples go forward once for each of 3 candidates; an epoch is 3 times as much."""
    engine = Engine(rounds=2, eval_clients=0)
    rows = fit(
        FedTiny(density=0.2, pool=3, alpha=0.0, selection="loss"), model=small, data=digits, local=LOCAL, engine=engine
    ).rows
    assert [row["flops"] for row in rows] == [240 * 2 * 237 * (3 + 3), 240 * 2 * 237 * 3]


def test_flops_of_statistics_and_of_losses_are_counted_but_not_those_of_tests(digits):
    spec = network("batch")
    client, masks, params = client_of(spec, digits), some(spec.layout, 0.5), spec.initial("kaiming", Streams(0))
    forward, executor = spec.density_flops(masks), client._executor
    for batches, seen in ((None, client.examples), (1, 16)):
        executor.flops = 0
        client.statistics(params, masks, batches=batches)
        assert executor.flops == seen * forward
    executor.flops = 0
    client.evaluate_training(params, masks)
    assert executor.flops == client.examples * forward
    client.evaluate_training(params)
    assert executor.flops == client.examples * (forward + sum(spec.flops.values()))
    client.evaluate(params, masks)
    assert executor.flops == client.examples * (forward + sum(spec.flops.values()))


# ---- how many, and how much memory


def test_shares_that_are_exchanged():
    """Released code with T_end = 300: 19.95 % at 10, 15 % at 100, 5 % at 200; recalled law to 100: 29.3 %, 15 %, 0."""
    code = [exchanged(t, last=300, share=FedTiny().alpha) for t in (10, 100, 200)]
    assert code == pytest.approx([0.1995, 0.15, 0.05], abs=5e-5)
    recalled = [exchanged(t, last=100, share=0.3) for t in (10, 50, 100)]
    assert recalled == pytest.approx([0.2927, 0.15, 0.0], abs=5e-5)


def test_exchanges_are_rounded_down_and_no_more_than_are_pruned():
    layout = sized(10, 8, 4)
    masks = kept(layout, *range(5), *range(10, 17), 18)
    assert exchanges(masks, 0.5) == {"w0": 2, "w1": 1}  # 2.5, 3.5 of which one is pruned, 0.5
    assert exchanges(masks, 0.5, ["w1"]) == {"w1": 1}
    assert exchanges(masks, 0.5, []) == {}
    assert lowered(masks, torch.arange(22.0), {"w1": 3}, Streams(0)("t")).counts() == {"w0": 5, "w1": 4, "w2": 1}


def test_memory_by_hand():
    layout = Layout.of([Slot("w", (100,), Kind.WEIGHT, True, 0), Slot("v", (60,), Kind.WEIGHT, True, 1),
                        Slot("b", (3,), Kind.BIAS, False, 1), Slot("m", (2,), Kind.BUFFER, False, 1)])  # fmt: skip
    masks = kept(layout, *range(16))
    held = 4 * (16 + 3 + 2) + 20
    assert training_memory(masks, momentum=False) == held + 4 * 19
    assert training_memory(masks, momentum=True) == held + 8 * 19
    assert training_memory(masks, momentum=True, top={"v": 4}) == held + 12 * 4 + 4 * 60
    assert training_memory(masks, momentum=True, top={"v": 4, "w": 5}) == held + 12 * 9 + 4 * 100
    assert training_memory(masks, momentum=False, dense=160) == held + 4 * 19 + 4 * 160


def test_allocation_around_a_rule_keeps_exactly_as_many():
    layout = sized(10, 20, 30)
    assert allocate(layout, 12, factors=[1, 1, 1]) == allocate(layout, 12)
    assert allocate(layout, 12, factors=[1.5, 0.5, 1]) == {"w0": 3, "w1": 2, "w2": 7}  # 15 : 10 : 30 of 12
    full = allocate(layout, 40, factors=[30, 1, 1])
    assert full["w0"] == 10
    assert sum(full.values()) == 40


# ---- FedTiny at the server


def trained(layout, masks, weights, steepest=None, examples=1):
    flat = torch.zeros(layout.size)
    flat[: layout.maskable][masks.kept] = torch.tensor(weights, dtype=torch.float32)
    sections = {"weights": values(Params(layout, flat), masks), "examples": number(examples), "loss": number(0.5)}
    if steepest:
        places, gradient = zip(*steepest, strict=True)
        sections |= {"places": indices(places, layout), "gradient": vector(torch.tensor(gradient, dtype=torch.float32))}
    return Message("train", 2, layout, sections)


def tiny(layout, masks, **settings):
    """FedTiny before round 2, in which everything is exchanged but for what is less than half of a tensor."""
    algorithm = FedTiny(**{"density": 0.5, "pool": 1, "every": 2, "stop": 4, "alpha": 1.0, "progress": "all"} | settings)
    state = algorithm.init(job_of(layout, Params.zeros(layout)))
    return algorithm, replace(state, versions=Versions.start(masks, 3), round=1)


def test_the_smallest_weights_go_and_the_steepest_come_by_hand():
    """Weights 1 and 3 of clients with 1 and 3 examples; w0 keeps 0..3 and exchanges floor(0.5 * 4) = 2, w1 keeps 8, 9: one."""
    layout = sized(8, 4)
    masks = kept(layout, 0, 1, 2, 3, 8, 9)
    algorithm, state = tiny(layout, masks)
    assert algorithm._swaps(state) == {"w0": 2, "w1": 1}
    replies = [
        trained(layout, masks, [4, 0, -8, 4, 1, 2], [(4, 9.0), (5, -5.0), (10, 1.0)], examples=1),
        trained(layout, masks, [0, 4, -8, 4, 1, 2], [(5, -4.0), (6, 3.0), (11, -1.0)], examples=3),
    ]
    contents = [(client, algorithm.read(state, unpack(pack(reply), layout))) for client, reply in enumerate(replies)]
    after = algorithm.aggregate(state, contents)
    # means: 1, 3, -8, 4 | 1, 2; gradients (over 4): 4: 9/4, 5: -17/4, 6: 9/4 | 10: 1/4, 11: -3/4
    assert after.params.maskable.tolist()[:4] == [0, 0, -8, 4]
    assert after.params.maskable.tolist()[8:] == [0, 2, 0, 0]
    grown = after.versions.masks.kept.nonzero().flatten().tolist()
    assert grown in ([2, 3, 4, 5, 9, 11], [2, 3, 5, 6, 9, 11])  # 4 and 6 are equal: drawn
    assert after.versions.masks.counts() == masks.counts()
    assert after.versions.version == 2
    assert after.versions.held.tolist() == [1, 1, 0]
    assert after.round == 2


def test_a_weight_dropped_just_now_comes_back_only_if_that_is_asked_for():
    layout = sized(4)
    masks = kept(layout, 0, 1)
    reply = [trained(layout, masks, [1, 2], [(0, 9.0)])]
    algorithm, state = tiny(layout, masks)
    with pytest.raises(WireError, match="kept"):
        algorithm.read(state, reply[0])
    again = FedTiny(density=0.5, pool=1, every=2, stop=4, alpha=1.0, progress="all", exclude_just_pruned=False)
    after = again.aggregate(state, [(0, again.read(state, reply[0]))])
    assert after.versions.masks.kept.tolist() == [True, True, False, False]
    assert after.params.maskable.tolist() == [1, 2, 0, 0]
    fair = [trained(layout, masks, [1, 2], [(3, 0.1)])]
    moved = algorithm.aggregate(state, [(0, algorithm.read(state, fair[0]))])
    assert moved.versions.masks.kept.tolist() == [False, True, False, True]
    assert moved.params.maskable.tolist() == [0, 2, 0, 0]


def test_a_client_ranks_what_it_would_drop_too_if_that_may_come_back(digits, small):
    algorithm = FedTiny(density=0.2, pool=1, every=2, alpha=1.0, exclude_just_pruned=False)
    state = replace(algorithm.init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0))), round=1)
    reply, _ = algorithm.client_update(algorithm.broadcast(state, [0])[0], client_of(small, digits, round=2), None)
    places = reply.indices("places")
    assert len(places) == sum(algorithm._swaps(state).values())
    assert state.versions.masks.kept[places].any()
    algorithm.read(state, reply)


HOSTILE = {
    "kept": [(0, 1.0), (5, 1.0), (10, 1.0)],
    "other tensor": [(4, 1.0), (10, 1.0), (11, 1.0)],
    "too few": [(4, 1.0), (10, 1.0)],
    "too many": [(4, 1.0), (5, 1.0), (6, 1.0), (10, 1.0)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_places_that_were_not_asked_for_are_refused(name):
    layout = sized(8, 4)
    masks = kept(layout, 0, 1, 2, 3, 8, 9)
    algorithm, state = tiny(layout, masks)
    with pytest.raises(WireError):
        algorithm.read(state, trained(layout, masks, [1] * 6, HOSTILE[name]))
    short = trained(layout, masks, [1] * 6, [(4, 1.0), (5, 1.0), (10, 1.0)])
    wrong = Message("train", 2, layout, dict(short.sections) | {"gradient": vector(torch.ones(2))})
    with pytest.raises(WireError):
        algorithm.read(state, wrong)


@pytest.mark.parametrize(
    "algorithm", [FedTiny(density=0.5, pool=1, every=2, alpha=0.5), FedDST(density=0.5, every=2, alpha=0.5)]
)
def test_the_share_falls_to_nothing_by_the_last_round_or_by_stop(algorithm):
    """Of 400 kept weights 0.25 (1 + cos(pi t / last)) are exchanged, rounded down."""
    layout = sized(800)

    def moves(rounds, **settings):
        chosen = replace(algorithm, **settings)
        state = chosen.init(job_of(layout, Params.zeros(layout), rounds=rounds))
        found = {t: chosen._swaps(replace(state, round=t - 1)).get("w0", 0) for t in range(1, rounds + 1)}
        return {t: count for t, count in found.items() if count}

    assert moves(6) == {2: 150, 4: 50}  # cos of pi / 3 and of 2 pi / 3
    assert moves(12) == {2: 186, 4: 150, 6: 100, 8: 50, 10: 13}
    assert moves(12, stop=6) == moves(6)
    assert moves(6, stop=12) == {2: 186, 4: 150}  # in the last round, the sixth, masks stand whatever the share is


def test_blocks_take_turns_from_the_output_to_the_input():
    layout = Layout.of([Slot(f"w{i}", (20,), Kind.WEIGHT, True, block) for i, block in enumerate((0, 0, 1, 3))])
    algorithm = FedTiny(density=0.5, pool=1, every=2, stop=100)
    state = algorithm.init(job_of(layout, Params.zeros(layout), rounds=13))
    turns = {t: set(algorithm._swaps(replace(state, round=t - 1))) for t in range(1, 14)}
    expected = {2: {"w3"}, 4: {"w2"}, 6: {"w0", "w1"}, 8: {"w3"}, 10: {"w2"}, 12: {"w0", "w1"}}
    assert turns == {t: expected.get(t, set()) for t in range(1, 14)}
    assert not algorithm._swaps(replace(state, round=11, rounds=12))  # nobody would train what grows in the last round
    every = replace(algorithm, progress="all")
    assert set(every._swaps(replace(state, round=3))) == {"w0", "w1", "w2", "w3"}
    ended = replace(algorithm, stop=8, alpha=1.0)
    assert ended._swaps(replace(state, round=5))
    assert not ended._swaps(replace(state, round=7))


@movers
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_density_is_kept_and_no_weight_drifts_under_the_mask(algorithm, norm, digits):
    """Momentum and weight decay are on: what a client sends, and what the server holds, is zero where pruned."""
    spec = network(norm)
    device = Device(Plan(algorithm, spec, digits, LOCAL, 9, 0))
    state, mine, moved = algorithm.init(Job(spec, spec.initial("kaiming", Streams(0)), 20, 6, Streams(0))), {}, 0
    wanted = round(0.2 * spec.layout.maskable)
    while state.round < 9:
        before = state.versions.masks
        contents = []
        for client, message in algorithm.broadcast(state, [0, 3]).items():
            reply, mine[client] = handle(device, client, pack(message), mine.get(client))
            contents.append((client, algorithm.read(state, unpack(reply, spec.layout))))
        state = algorithm.aggregate(state, contents)
        params, masks = algorithm.finalize(state)
        assert (params.maskable[~masks.kept] == 0).all()
        if state.round:
            assert masks.count == wanted
            moved += not same(before.kept, masks.kept)
            if isinstance(algorithm, FedTiny | FedDST):
                assert masks.counts() == before.counts()
            grown = masks.kept & ~before.kept
            if isinstance(algorithm, FedTiny | PruneFL):
                assert (params.maskable[grown] == 0).all()
    assert moved >= 3


# ---- FedTiny's choice


def set_up(algorithm, spec, digits, cohort=(0, 1, 2)):
    """Play the set-up; return the states, and what was read in each exchange."""
    device = Device(Plan(algorithm, spec, digits, LOCAL, 20, 3))
    states, heard = [algorithm.init(Job(spec, spec.initial("kaiming", Streams(5)), 20, 6, Streams(0)))], []
    while states[-1].pool is not None:
        messages = {c: pack(m) for c, m in algorithm.broadcast(states[-1], cohort).items()}
        replies = {c: handle(device, c, payload, None)[0] for c, payload in messages.items()}
        assert unpack(replies[0], spec.layout).kind == "setup"
        contents = [(c, algorithm.read(states[-1], unpack(reply, spec.layout))) for c, reply in replies.items()]
        heard.append(contents)
        states.append(algorithm.aggregate(states[-1], contents))
        assert states[-1].round == 0
    return states, heard


@pytest.mark.parametrize("origin", ["seeds", "start"])
def test_statistics_are_measured_sent_and_averaged_by_examples_for_each_candidate(origin, digits):
    """Released code: running statistics were not sent, and averaging wrote into its first operand."""
    spec = network("batch")
    algorithm = FedTiny(density=0.2, pool=3, origin=origin)
    states, heard = set_up(algorithm, spec, digits)
    assert len(states) == 3
    candidates = [states[0].pool.candidate(index) for index in range(3)]
    sizes = [len(digits.parts[client]) for client in range(3)]
    for index, (params, masks) in enumerate(candidates):
        own = [client_of(spec, digits, client, round=1).statistics(params, masks).statistics.double() for client in range(3)]
        mean = sum(size * each for size, each in zip(sizes, own, strict=True)) / sum(sizes)
        torch.testing.assert_close(states[1].statistics[index].double(), mean, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(mean.float(), params.statistics, atol=1e-3)  # they differ from where BatchNorm starts
    again = algorithm.aggregate(states[0], heard[0])
    assert freeze(again) == freeze(states[1])
    losses = torch.stack([content[1] for _, content in heard[1]]).mean(0).flatten()
    best = int(losses.argmin())
    assert same(states[2].versions.masks.kept, candidates[best][1].kept)
    assert same(states[2].params.trainable, candidates[best][0].trainable)
    assert same(states[2].params.statistics, states[1].statistics[best])
    assert losses.min() < losses.max()


def test_losses_are_those_of_training_examples_under_the_averaged_statistics(digits):
    spec = network("batch")
    states, heard = set_up(FedTiny(density=0.2, pool=2), spec, digits)
    params, masks = states[1].pool.candidate(1)
    params.statistics.copy_(states[1].statistics[1])
    found = client_of(spec, digits, 2).evaluate_training(params, masks)
    assert found.predictions == len(digits.parts[2])
    assert float(heard[1][2][1][1][1]) == pytest.approx(found.mean_loss, rel=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_selection_by_loss_takes_one_exchange_and_a_pool_of_one_none_whatever_the_network(norm, digits):
    states, heard = set_up(FedTiny(density=0.2, pool=2, selection="loss"), spec := network(norm), digits)
    assert len(states) - 1 == 1
    params, masks = states[0].pool.candidate(1)
    own = client_of(spec, digits, 2).evaluate_training(params, masks).mean_loss
    assert float(heard[0][2][1][1][1]) == pytest.approx(own, rel=1e-6)
    assert same(states[1].params.statistics, params.statistics)
    assert len(set_up(FedTiny(density=0.2, pool=1), spec, digits)[0]) == 1


@pytest.mark.parametrize(("norm", "has"), [("group", "has GroupNorm"), ("none", "has no normalisation")])
def test_selection_by_statistics_needs_batch_normalisation(norm, has):
    spec = network(norm)
    job = Job(spec, spec.initial("kaiming", Streams(5)), 20, 6, Streams(0))
    with pytest.raises(
        UsageError, match=f"(?s)selection = statistics .* 2 candidates .*{has}.*selection = loss.*lenet.*pool = 1"
    ):
        FedTiny(density=0.2, pool=2).init(job)


@pytest.mark.parametrize("pooled", [False, True])
def test_variance_over_clients_by_hand(pooled):
    """Means 0 and 4, variances 1 and 3, weights 1 and 3: mean 3, variance 2.5, pooled 2.5 + 12 - 9 + 0 = 5.5."""
    buffers = [Slot(f"n.{name}", (1,), Kind.BUFFER, False, 0) for name in ("running_mean", "running_var")]
    layout = Layout.of([Slot("w", (1,), Kind.WEIGHT, True, 0), *buffers])
    mean = StatisticsMean(layout, pooled=pooled)
    first = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    mean.add(first, 1.0)
    mean.add(torch.tensor([[4.0, 3.0], [1.0, 1.0]]), 3.0)
    assert mean.value().tolist() == [[3.0, 5.5 if pooled else 2.5], [1.0, 1.0]]
    assert first.tolist() == [[0.0, 1.0], [1.0, 1.0]]
    draws = np.random.default_rng(0)
    parts = [draws.normal(2, 3, 10), draws.normal(-1, 1, 30)]
    mean = StatisticsMean(layout, pooled=True)
    for part in parts:
        mean.add(torch.tensor([[part.mean(), part.var()]]), len(part))
    whole = np.concatenate(parts)
    assert mean.value()[0].tolist() == pytest.approx([whole.mean(), whole.var()], rel=1e-5)


def test_pooled_statistics_are_those_of_a_model_evaluated_later(digits):
    spec = network("batch")
    mean, pooled = (set_up(FedTiny(density=0.2, pool=2, variance=v), spec, digits)[0][1].statistics for v in ("mean", "pooled"))
    places = {name: spec.layout.spans[f"1.{name}"] for name in ("running_mean", "running_var")}
    where = {name: slice(begin - spec.layout.trainable, end - spec.layout.trainable) for name, (begin, end) in places.items()}
    assert same(mean[:, where["running_mean"]], pooled[:, where["running_mean"]])
    assert (pooled[:, where["running_var"]] >= mean[:, where["running_var"]]).all()
    assert (pooled[:, where["running_var"]] > mean[:, where["running_var"]]).any()


@pytest.mark.parametrize("origin", ["seeds", "start"])
@pytest.mark.parametrize("layers", ["uniform", "erk"])
def test_both_ends_make_the_same_candidates_of_exactly_the_density(origin, layers):
    spec = build(Model(name="resnet8"), (1, 8, 8), 10)
    algorithm = FedTiny(density=0.02, origin=origin, layers=layers, selection="loss")
    start = spec.initial("glorot", Streams(1))
    state = algorithm.init(Job(spec, start, 20, 6, Streams(0)))
    assert len(state.pool.counts) == 5  # 0.1 / 0.02
    payload = pack(algorithm.broadcast(state, [0])[0])
    theirs = Pool.of(unpack(payload, spec.layout))
    for index in range(5):
        (params, masks), (again, other) = state.pool.candidate(index), theirs.candidate(index)
        assert same(params.flat, again.flat)
        assert same(masks.kept, other.kept)
        assert masks.count == round(0.02 * spec.layout.maskable)
        assert min(masks.counts().values()) >= 1
        if origin == "start":
            assert same(params.flat, start.under(masks).flat)
    kinds = {tuple(masks.counts().values()) for masks in (state.pool.candidate(index)[1] for index in range(5))}
    assert len(kinds) == 5
    assert list(state.pool.candidate(0)[1].counts().values()) == list(
        allocate(spec.layout, round(0.02 * spec.layout.maskable), layers, floor=1).values()
    )
    extras = 4 * (spec.layout.size - spec.layout.maskable)
    if origin == "seeds":
        assert len(payload) < extras + 8 + 4 * state.pool.counts.numel() + 100
    else:
        assert state.pool.among.count < 1.6 * 0.02 * spec.layout.maskable
        assert len(payload) < extras + 4 * state.pool.among.count + spec.layout.maskable // 8 + 400


@pytest.mark.parametrize("maskable", ["weights", "all"])
def test_candidates_are_those_of_whole_draws_made_in_the_memory_of_one_tensor(maskable):
    """By count of whole vectors that are made: the parameters that are returned and no other."""
    spec = build(Model(name="mlp", hidden=(64,) * 6, maskable=maskable), (1, 8, 8), 10)
    layout, wanted = spec.layout, round(0.1 * spec.layout.maskable)
    pool = (
        FedTiny(density=0.1, pool=3, selection="loss")
        .init(Job(spec, spec.initial("glorot", Streams(1)), 20, 6, Streams(0)))
        .pool
    )
    for index in range(3):
        counts = dict(zip((slot.name for slot in layout.masked_slots), pool.counts[index].tolist(), strict=True))
        streams = Streams(pool.seed, round=index)
        whole = kaiming_uniform(layout, streams)
        expected = select_by_slot(magnitude(whole), counts, within=Masks.full(layout), ties=streams("ties"))
        with Live(4 * layout.size) as vectors:
            params, masks = pool.candidate(index)
        assert vectors.most == 1
        if maskable == "weights":
            with Live(4 * layout.maskable) as vectors:
                pool.candidate(index)
            assert vectors.most == 0
        assert masks.count == wanted
        assert same(masks.kept, expected.kept)
        assert same(params.maskable, whole.under(expected).maskable)
        assert same(params.dense, pool.given.dense)


def test_set_up_is_in_round_one_counted_apart_and_waits_for_an_answer(digits):
    spec = network("batch")
    settings = {"model": spec, "data": digits, "local": LOCAL, "start": spec.initial("kaiming", Streams(0))}
    engine = Engine(rounds=4, eval_clients=0, seed=1)
    algorithm = FedTiny(density=0.2, pool=3, every=2)
    result = fit(algorithm, engine=engine, **settings)
    phases = [set(row["phases"]) for row in result.rows]
    assert phases == [{"setup", "train", "masks"}, {"train", "masks"}, {"train", "masks"}, {"train"}]
    statistics = spec.layout.size - spec.layout.trainable
    up = result.rows[0]["phases"]["setup"]["up"] / 6
    assert 3 * (4 * statistics + 8) < up < 3 * (4 * statistics + 8) + 200
    shared = fit(algorithm, engine=replace(engine, workers=2), **settings)
    assert same(shared.params.flat, result.params.flat)
    state = algorithm.init(Job(spec, settings["start"], 20, 6, Streams(0)))
    waited = algorithm.aggregate(state, iter(()))
    assert (waited.round, waited.pool is None) == (1, False)
    assert algorithm.broadcast(waited, [4])[4].kind == "setup"
    assert algorithm.broadcast(waited, [4])[4].round == 2


def test_losses_of_clients_count_alike():
    """As published: 0 and 0.9 make 0.45, less than 1 and 0 do; by examples, 1 and 3, it would be 0.675 and 0.25."""
    layout = sized(20, 20)
    algorithm = FedTiny(density=0.5, pool=2, selection="loss")
    state = algorithm.init(job_of(layout, Params.zeros(layout)))
    answers = [([0.0, 1.0], 1), ([0.9, 0.0], 3)]
    replies = [Message("setup", 1, layout, {"measured": vector(losses), "examples": number(n)}) for losses, n in answers]
    after = algorithm.aggregate(state, [(client, algorithm.read(state, reply)) for client, reply in enumerate(replies)])
    assert after.pool is None
    assert after.round == 0
    assert same(after.versions.masks.kept, state.pool.candidate(0)[1].kept)
    assert not same(after.versions.masks.kept, state.pool.candidate(1)[1].kept)


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_set_up_answers_of_other_lengths_are_refused(count, digits):
    algorithm, spec = FedTiny(density=0.2, pool=3, selection="loss"), network("none")
    state = algorithm.init(Job(spec, spec.initial("kaiming", Streams(0)), 20, 6, Streams(0)))
    with pytest.raises(WireError):
        algorithm.read(state, Message("setup", 1, spec.layout, {"measured": vector([1.0] * count), "examples": number(3)}))


# ---- FedDST


def test_weights_are_averaged_over_those_that_keep_them():
    layout = sized(4)
    mean = HeldMean(layout)
    for weights, keeps, share in (([4, 8, 0, 0], (0, 1), 1.0), ([0, 4, 2, 0], (1, 2), 3.0)):
        flat = torch.tensor([*weights, weights[0] + 1], dtype=torch.float32)
        mean.add(Params(layout, flat), kept(layout, *keeps), share)
    assert mean.value(Params(layout, torch.full((5,), 7.0))).flat.tolist() == [4.0, 5.0, 2.0, 7.0, 2.0]  # bias (5 + 3) / 4
    assert mean.holders.kept.tolist() == [True, True, True, False]


def test_the_server_keeps_the_largest_of_what_anybody_keeps():
    """w0 keeps two of 0, 1 (before) and exchanges one; the old weight 9 of place 1, which nobody keeps, is gone."""
    layout = sized(6)
    masks = kept(layout, 0, 1)
    algorithm = FedDST(density=1 / 3, every=2, alpha=1.0)
    start = Params(layout, torch.tensor([1.0, 9.0, 0, 0, 0, 0, 0]))
    state = replace(algorithm.init(job_of(layout, start)), versions=Versions.start(masks, 3), params=start, round=1)
    contents = []
    for client, (places, weights) in enumerate([((0, 2), [2.0, 3.0]), ((0, 4), [4.0, -6.0])]):
        own = kept(layout, *places)
        flat = torch.zeros(7).index_copy(0, torch.tensor(places), torch.tensor(weights))
        sections = {"weights": values(Params(layout, flat), own), "moved": mask(Masks(layout, masks.kept ^ own.kept))}
        reply = Message("train", 2, layout, sections | {"examples": number(1), "loss": number(1.0)})
        contents.append((client, algorithm.read(state, unpack(pack(reply), layout))))
    after = algorithm.aggregate(state, contents)
    assert algorithm._swaps(state)  # (0.5 * (1 + cos(pi / 10))) of 2: one
    drawn = after.versions.masks.kept.nonzero().flatten().tolist()
    assert drawn in ([0, 4], [2, 4])  # 3, 3, -6: a tie, where averages with zeros would be 3, 1.5, -3
    assert after.params.maskable[4] == -6
    assert after.versions.masks.count == 2
    wrong = Message("train", 2, layout, dict(reply.sections) | {"moved": mask(kept(layout, 5))})
    with pytest.raises(WireError, match="masks of"):
        algorithm.read(state, wrong)


def test_a_client_drops_its_smallest_and_grows_its_steepest(digits, small):
    algorithm = FedDST(density=0.2, every=2, alpha=0.5)
    state = replace(algorithm.init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0))), round=1)
    client, swaps = client_of(small, digits, round=2), algorithm._swaps(state)
    reply, _ = algorithm.client_update(algorithm.broadcast(state, [0])[0], client, None)
    params, own, _ = algorithm.read(state, reply)
    before, gradient = state.versions.masks, client.gradients(state.params, state.versions.masks, purpose="grow").maskable.abs()
    for name, count in swaps.items():
        begin, end = small.layout.spans[name]
        dropped, grown = ((before.kept & ~own.kept)[begin:end], (own.kept & ~before.kept)[begin:end])
        assert int(dropped.sum()) == int(grown.sum()) == count
        size, steep, kept_ = state.params.maskable[begin:end].abs(), gradient[begin:end], own.kept[begin:end]
        assert size[dropped].max() <= size[before.kept[begin:end] & kept_].min()
        assert steep[grown].min() >= steep[~kept_ & ~before.kept[begin:end]].max() * (1 - 1e-4)
    assert (params.maskable[own.kept & ~before.kept] != 0).any()  # it trains what it grew


def test_the_first_mask_is_random_with_densities_by_erk(small):
    state = FedDST(density=0.2).init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0)))
    assert state.versions.masks.counts() == allocate(small.layout, round(0.2 * small.layout.maskable), "erk", floor=1)
    other = FedDST(density=0.2).init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(1)))
    assert not same(state.versions.masks.kept, other.versions.masks.kept)


# ---- PruneFL


def test_weights_are_added_while_they_raise_the_ratio():
    """Protected: 6 / 3. Ratios 8 / 2, 2 / 1, 2 / 1: 4 > 2 pays and makes 14 / 5 = 2.8; 2 does not."""
    layout = sized(5)
    importance, times = torch.tensor([6.0, 2, 8, 2, 0]), torch.tensor([3.0, 1, 2, 1, 1]).double()
    assert paying(importance, times, kept(layout, 0), 0.0) == 1
    # with a constant time of 2 the protected ones are worth 6 / 5: then 14 / 7 = 2, which 2 / 1 does not exceed
    assert paying(importance, times, kept(layout, 0), 2.0) == 1
    assert paying(importance, times, kept(layout, 0), 3.0) == 3  # 14 / 8, then 16 / 9, then 18 / 10; 0 does not
    assert paying(importance, times, Masks(layout, torch.zeros(5, dtype=torch.bool)), 0.0) == 1
    assert paying(torch.zeros(5), times, kept(layout, 0), 0.0) == 0


def test_reconfiguration_protects_the_largest_and_adds_by_importance_for_time():
    layout = sized(8)
    params = Params(layout, torch.tensor([5.0, -4, 1, 0.5, 0, 0, 0, 0, 0]))
    importance, times = torch.tensor([0, 0, 1.0, 2, 8, 5, 0, 0]).double(), torch.tensor([1.0] * 5 + [3.0] + [1.0] * 2).double()
    ties = Streams(0)("t")
    target = PruneFL(density=0.5)
    masks = target.reconfigure(params, kept(layout, 0, 1, 2, 3), importance, times, 0.5, 4, ties)
    assert masks.kept.nonzero().flatten().tolist() == [0, 1, 3, 4]  # 8 / 1, then 2 / 1 before 5 / 3
    cap = replace(target, budget="cap")
    masks = cap.reconfigure(params, kept(layout, 0, 1, 2, 3), importance, times, 0.5, 4, ties)
    assert masks.kept.nonzero().flatten().tolist() == [0, 1, 4]  # 8 / 1 > 0 makes 8 / 3, which 2 / 1 does not exceed
    still = target.reconfigure(params, kept(layout, 0, 1, 2, 3), importance, times, 0.0, 4, ties)
    assert still.kept.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_the_time_of_a_weight_is_what_its_tensor_costs():
    spec = network("none")
    times = _times(spec)
    first, second, last = (times[spec.layout.spans[f"{name}.weight"][0]] for name in (0, 4, 7))
    assert float(times.sum()) == pytest.approx(1)
    assert float(first / last) == pytest.approx(64)  # 8 x 8 output positions
    assert float(second / last) == pytest.approx(4)


def test_one_client_prunes_and_the_others_are_asked_to_train(digits, small):
    algorithm = PruneFL(density=0.1, initial=3)
    engine = Engine(rounds=3, cohort=4, eval_clients=0, seed=2)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine, start=small.initial("glorot", Streams(0)))
    assert result.rows[0]["phases"]["setup"]["down"] // (4 * small.layout.size) == 1
    assert result.rows[0]["phases"]["masks"]["up"] < small.layout.maskable // 8 + 20  # the mask alone
    assert "setup" not in result.rows[1]["phases"]
    assert [row["density"] for row in result.rows] == [round(0.1 * small.layout.maskable) / small.layout.maskable] * 3
    dense = training_memory(Masks.full(small.layout), momentum=True, dense=small.layout.maskable)
    assert [row["client_memory"] == dense for row in result.rows] == [True, False, False]
    state = algorithm.init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0)))
    assert len({next(iter(algorithm.broadcast(replace(state, round=t), range(6)))) for t in range(20)}) > 2


def test_what_the_first_client_may_not_say_is_refused(small):
    algorithm = PruneFL(density=0.1, every=10)
    state = algorithm.init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0)))
    for masks in (Masks.full(small.layout), kept(small.layout, 1)):
        with pytest.raises(WireError):
            algorithm.read(state, Message("setup", 1, small.layout, {"mask": mask(masks)}))
    moving = replace(state, pruned=1, round=9)
    right = {"weights": values(state.params, state.versions.masks), "examples": number(1), "loss": number(1.0)}
    for importance in (torch.ones(3), torch.full((small.layout.maskable,), -1.0)):
        with pytest.raises(WireError, match="squared"):
            algorithm.read(moving, Message("train", 10, small.layout, right | {"importance": vector(importance)}))


# ---- all three


@movers
def test_clients_that_missed_rounds_and_lost_replies_hold_the_masks_of_the_server(algorithm, digits, small):
    """Client 1 takes part in rounds 1, 4, 5 and 8, and its reply of round 4 is lost; client 2 comes first in round 7."""
    module = type(algorithm).__module__
    device = Device(Plan(algorithm, small, digits, LOCAL, 9, 0))
    state, mine = algorithm.init(Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0))), {}
    parts = {0: range(1, 9), 1: (1, 4, 5, 8), 2: (7, 8)}
    while state.round < 8:
        t, contents = state.round + 1, []
        for client, message in algorithm.broadcast(state, [c for c in parts if t in parts[c]]).items():
            reply, own = handle(device, client, pack(message), mine.get(client))
            mine[client] = mine.get(client) if own is None else own
            if message.kind == "train":
                known = thaw(mine[client], small.layout, module)
                assert same(known.masks[state.versions.version].kept, state.versions.masks.kept)
                assert len(known.masks) <= 2
            if (t, client) != (4, 1):
                contents.append((client, algorithm.read(state, unpack(reply, small.layout))))
        state = algorithm.aggregate(state, contents)
    assert state.versions.version >= 4


@movers
def test_density_that_leaves_a_tensor_empty_is_refused(algorithm, small):
    job = Job(small, small.initial("glorot", Streams(0)), 20, 6, Streams(0))
    with pytest.raises(UsageError, match=r"algorithm\.density = 0\.001 keeps 1 of 1184"):
        replace(algorithm, density=0.001).init(job)


def test_client_memory_is_in_the_record(digits, small):
    engine = Engine(rounds=3, cohort=2, eval_clients=0)
    rows = fit(FedTiny(density=0.2, every=2, pool=1, alpha=1.0), model=small, data=digits, local=LOCAL, engine=engine).rows
    kept_, dense = round(0.2 * 1184), 26
    training = 4 * (kept_ + dense) + 148 + 8 * (kept_ + dense)
    assert [row["client_memory"] for row in rows] == [training] * 3
    assert fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=engine).rows[0]["client_memory"] is None


@pytest.fixture(scope="module")
def ten():
    settings = Data(name="digits", clients=10, partition="dirichlet", alpha=1.0, min_examples=5)
    data = federate(load(settings), settings, Streams(0))
    return data, build(Model(name="mlp", hidden=(64,)), data.shape, data.classes)


def accuracy(algorithm, ten):
    data, spec = ten
    local = Local(epochs=2, batch=16, lr=0.1, momentum=0.5)
    engine = Engine(rounds=20, cohort=5, eval_clients=0, eval_every=20)
    result = fit(algorithm, model=spec, data=data, local=local, engine=engine, start=spec.initial("glorot", Streams(0)))
    assert result.density == pytest.approx(algorithm.density, abs=1e-4)
    return result.accuracy


@pytest.mark.parametrize(
    ("algorithm", "bar"),
    [
        (FedTiny(density=0.2, every=3, stop=18, selection="loss"), 0.91),
        (FedTiny(density=0.2, every=3, stop=18, progress="all", origin="start", selection="loss"), 0.91),
        (FedDST(density=0.2, every=3), 0.93),
        (PruneFL(density=0.2, every=5), 0.93),
    ],
    ids=["fedtiny", "fedtiny-all-start", "feddst", "prunefl"],
)
def test_digits_are_learned_at_a_fifth_of_the_weights(algorithm, bar, ten):
    assert accuracy(algorithm, ten) > bar


@pytest.mark.parametrize(
    "algorithm",
    [FedTiny(density=0.05, every=3, stop=18, selection="loss"), FedDST(density=0.05, every=3)],
    ids=["fedtiny", "feddst"],
)
def test_masks_that_move_are_better_than_masks_that_stand(algorithm, ten):
    assert accuracy(algorithm, ten) > accuracy(replace(algorithm, alpha=0.0), ten) + 0.05
