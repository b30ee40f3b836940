"""ProgFed: stages of networks, when they grow, what travels, and that what is compressed is right on average."""

import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import same
from fedsieve import (
    Data,
    Dataset,
    Engine,
    FedAvg,
    Local,
    Message,
    Model,
    ModelSpec,
    Params,
    Stream,
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
from fedsieve.aggregate.optim import ServerOptim
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.progfed import ProgFed
from fedsieve.config import from_name
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.handle import Device, Plan, handle
from fedsieve.finish.export import final
from fedsieve.local.executor import Trained
from fedsieve.models.growth import growth
from fedsieve.models.stages import cut, stage_spec, stages
from fedsieve.models.unet import unet
from fedsieve.wire.lossy import Lossy
from fedsieve.wire.message import Reason
from fedsieve.wire.sections import integers, number, vector
from test_conformance import comparable

LOCAL = Local(batch=16, lr=0.1)
BLOCKS = {
    "mlp": ((1, 8, 8), ("relu1",)),
    "tabular": ((13,), ("relu1",)),
    "lenet": ((1, 28, 28), ("relu1", "relu2", "relu3")),
    "cnn": ((1, 8, 8), ("relu1", "relu2")),
    "cnn6": ((1, 8, 8), ("stage1", "stage2", "stage3")),
    "resnet8": ((1, 8, 8), ("stage1", "stage2")),
    "resnet18": ((1, 8, 8), ("stage1", "stage2", "stage3")),
    "vgg16": ((1, 32, 32), ("stage2", "stage3", "stage4")),
}
RESNET18 = [156_324, 688_292, 2_800_804, 11_220_132]


def made(name="cnn", classes=10, **options):
    return build(Model(name=name, **options), BLOCKS[name][0], classes)


@pytest.fixture(scope="module")
def deep(digits):
    """An MLP of three hidden layers: three stages."""
    return build(Model(name="mlp", hidden=(16, 14, 12)), digits.shape, digits.classes)


# ---- stages of networks


def test_stages_of_resnet18_have_the_published_sizes():
    spec = build(Model(name="resnet18"), (3, 32, 32), 100)
    ends = cut(spec)
    found = [stage_spec(spec, ends, number) for number in (1, 2, 3, 4)]
    assert [each.layout.size for each in found] == RESNET18
    assert [stage.layout(spec.layout).size for stage in stages(spec, ends)] == RESNET18
    assert found[3] is spec
    eighths = cut(spec, ("stage1.0", "stage1", "stage2.0", "stage2", "stage3.0", "stage3", "stage4.0"))
    halves = [stage_spec(spec, eighths, number).layout.size for number in range(1, 9)]
    assert halves == sorted(set(halves))
    assert halves[1::2] == RESNET18


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_built_in_networks(name):
    spec = made(name)
    assert cut(spec) == BLOCKS[name][1]
    assert cut(spec, count=1) == ()
    assert cut(spec, count=2) == BLOCKS[name][1][-1:]


@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn6", "resnet8"])
def test_a_stage_computes_what_the_network_does_up_to_its_head(name):
    """The stage's own tensors, in the layout that both ends have, in its module: its head sees the network's own features."""
    spec = made(name)
    start, ends = spec.initial("kaiming", Streams(1)), cut(spec)
    x = torch.randn(3, *BLOCKS[name][0], generator=torch.Generator().manual_seed(0))
    for rank, end in enumerate(ends, start=1):
        stage, network = stages(spec, ends)[rank - 1], stage_spec(spec, ends, rank)
        assert stage.layout(spec.layout).fingerprint == network.layout.fingerprint
        params = stage.join(start, stage.fresh_head(Streams(1)))
        network.module.load_state_dict({key: params[key] for key in params}, strict=False)
        spec.module.load_state_dict({key: start[key] for key in start}, strict=False)
        features = []
        for module in (network.module, spec.module):
            hook = module.get_submodule(end).register_forward_hook(lambda *call, seen=features: seen.append(call[-1].detach()))
            scores = module.eval()(x)
            hook.remove()
        assert same(*features)
        assert network.module(x).shape == scores.shape
        mean = features[0].flatten(2).mean(-1) if features[0].dim() == 4 else features[0]
        head = mean @ params[f"{stage.head}.weight"].T + params[f"{stage.head}.bias"]
        assert torch.allclose(head, network.module(x), atol=1e-5)


def test_stages_share_names_with_the_network_and_can_be_put_back():
    spec = made("cnn6")
    start, ends = spec.initial("glorot", Streams(0)), cut(spec)
    for stage in stages(spec, ends):
        head = stage.fresh_head(Streams(0))
        params = stage.join(start, head)
        moved = Params(params.layout, params.flat + 1)
        whole, back = stage.split(moved, start)
        assert same(back, head + 1)
        for name in spec.layout.named:
            assert same(whole[name], start[name] + 1 if name in stage.names else start[name])
        kept, own = stage.split(params, start)
        assert same(kept.flat, start.flat)
        assert same(own, head)


def test_heads_come_from_named_streams_and_differ_between_stages():
    spec = made("cnn", classes=7)
    first, second, whole = stages(spec, cut(spec))
    assert same(first.fresh_head(Streams(3)), first.fresh_head(Streams(3)))
    assert not same(first.fresh_head(Streams(3)), first.fresh_head(Streams(4)))
    assert first.head != second.head
    head = first.fresh_head(Streams(3))
    assert head[-7:].abs().sum() == 0
    assert 0 < head[:-7].abs().max() <= (6 / (32 + 7)) ** 0.5
    assert whole.fresh_head(Streams(3)).numel() == 0


def test_a_network_that_has_a_child_of_the_heads_name_can_be_cut():
    module = nn.Sequential(OrderedDict(head1=nn.Linear(6, 6), relu=nn.ReLU(), head2=nn.Linear(6, 6), fc=nn.Linear(6, 3)))
    spec = ModelSpec.of(module, torch.zeros(1, 6))
    assert cut(spec) == ("relu",)
    assert stages(spec, cut(spec))[0].names == ("head1.weight", "head1.bias")


def test_what_may_be_pruned_is_the_same_in_a_stage():
    spec = made("cnn", maskable="all", dense=("conv1.weight",))
    first = stage_spec(spec, cut(spec), 1).layout.named
    assert not first["conv1.weight"].maskable
    assert first["conv1.bias"].maskable


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("charlstm", {}, "CharLSTM"),
        ("cnn", {"stages": 4}, "relu1, relu2, the network"),
        ("cnn", {"boundaries": ("conv3",)}, "no part 'conv3'"),
        ("cnn", {"boundaries": ("relu2", "relu1")}, "not in the order"),
        ("cnn", {"boundaries": ("relu1", "relu1")}, "not in the order"),
        ("cnn", {"boundaries": ("fc2",)}, "last part"),
        ("cnn", {"boundaries": ("conv1.0",)}, "no part 'conv1.0'"),
        ("cnn", {"boundaries": ("relu1",), "stages": 3}, "algorithm.stages = 3"),
        ("resnet8", {"boundaries": ("stage1.5",)}, "stage1.5"),
        ("bottleneck", {}, "has 610 numbers with its head, the whole network 606"),
        ("cnn", {"schedule": "list"}, "2 rounds"),
        ("cnn", {"schedule": "list", "grow_at": (3,)}, "grow_at = 3"),
        ("cnn", {"schedule": "list", "grow_at": (4, 3)}, "grow_at = 4, 3"),
        ("cnn", {"schedule": "list", "grow_at": (1, 3)}, "from 2"),
        ("cnn", {"schedule": "list", "grow_at": (3, 11)}, "engine.rounds = 10"),
        ("cnn", {"schedule": "list", "grow_at": (3, 5), "warmup": 2}, "warmup = 2"),
        ("cnn", {"schedule": "list", "grow_at": (3, 9), "warmup": 2}, "warmup = 2"),
        ("cnn", {"grow_at": (3, 5)}, "schedule = list"),
        ("cnn", {"warmup": 4}, "too few"),
    ],
)
def test_what_does_not_fit_is_refused_before_round_1(name, settings, said):
    if name == "charlstm":
        spec = build(Model(name=name), (20,), 65, tokens=True)
    elif name == "bottleneck":
        spec = build(Model(name="mlp", hidden=(8, 4)), (64,), 10)
    else:
        spec = made(name)
    with pytest.raises(UsageError, match=said):
        ProgFed(**settings).init(Job(spec, Params.zeros(spec.layout), 10, 4, Streams(0)))


def test_too_few_rounds_for_the_stages_are_refused():
    spec = made("cnn")
    with pytest.raises(UsageError, match=r"engine\.rounds = 2"):
        ProgFed().init(Job(spec, Params.zeros(spec.layout), 2, 4, Streams(0)))
    ProgFed().init(Job(spec, Params.zeros(spec.layout), 3, 4, Streams(0)))


# ---- when they grow


def ratio(plan, main):
    return sum(RESNET18[plan.stage(t) - 1] for t in range(1, plan.rounds + 1)) / (main * RESNET18[-1])


def test_traffic_is_the_published_share_of_the_whole_networks():
    """Stage sizes times rounds over T = 3000 rounds of the whole: T_s = 375, 750, and 375 with 25 rounds of warm-up."""
    assert growth(3000, 4, "half").starts == (1, 376, 751, 1126)
    assert ratio(growth(3000, 4, "half"), 3000) == pytest.approx(0.6656, abs=5e-5)
    assert ratio(growth(3000, 4, "equal"), 3000) == pytest.approx(0.3312, abs=5e-5)
    assert ratio(growth(3075, 4, "half", warmup=25), 3000) == pytest.approx(0.6765, abs=5e-5)
    assert ratio(growth(3000, 4, "list", grow_at=(376, 751, 1126)), 3000) == pytest.approx(0.6656, abs=5e-5)


@pytest.mark.parametrize(("rounds", "stages", "each"), [(3000, 2, 750), (3000, 3, 500), (3000, 5, 300), (4000, 3, 666)])
def test_rounds_of_a_stage_are_those_of_the_published_configs(rounds, stages, each):
    assert growth(rounds, stages, "half").starts == tuple(1 + s * each for s in range(stages))


def test_rounds_of_warm_up_stand_between_the_main_ones():
    plan = growth(16, 3, "half", warmup=2)  # 12 main rounds: 2, 2 and 8
    assert plan.starts == (1, 3, 7)
    assert [plan.stage(t) for t in range(17)] == [1, 1, 1, 2, 2, 2, 2, *[3] * 10]
    assert [t for t in range(1, 17) if plan.warming(t)] == [3, 4, 7, 8]
    assert [plan.main(t) for t in range(1, 17) if not plan.warming(t)] == [(t, 12) for t in range(1, 13)]


def test_every_schedule_ends_with_the_whole_network():
    for stages_ in range(1, 6):
        for warmup in range(3):
            for rounds in range(stages_ + warmup * (stages_ - 1), 40):
                for schedule in ("half", "equal"):
                    plan = growth(rounds, stages_, schedule, warmup)
                    assert plan.stage(rounds) == stages_
                    assert not plan.warming(rounds)
                    assert list(plan.starts) == sorted(set(plan.starts))


# ---- rounds by hand


class Plus:
    """A client whose training adds 1 to what may move."""

    def __init__(self, spec, round, rounds, id=0):
        self.spec, self.layout, self.rounds, self.id = spec, spec.layout, rounds, id
        self.stream = Streams(0, round=round, client=id)
        self.said = {}

    def rate(self, round, rounds):
        return round / rounds

    def train(self, params, **settings):
        self.said = settings | {"layout": params.layout}
        flat = params.flat + 1
        if (moves := settings["moves"]) is not None:
            still = params.layout.trainable
            flat[:still] = torch.where(moves, flat[:still], params.flat[:still])
        return Trained(Params(params.layout, flat), 3, 0.5, torch.ones(params.layout.trainable), 1)


def play(algorithm, spec, rounds, clients=2, lost=()):
    """Play rounds of such clients; yield state, clients and the sizes of the messages after each."""
    state = algorithm.init(Job(spec, spec.initial("glorot", Streams(0)), rounds, clients, Streams(0)))
    mine = {}
    for t in range(1, rounds + 1):
        contents, players, sizes = [], [], []
        for client, message in algorithm.broadcast(state, range(clients)).items():
            down = pack(message)
            player = Plus(spec, t, rounds, client)
            reply, mine[client] = algorithm.client_update(unpack(down, spec.layout), player, mine.get(client))
            up = pack(reply)
            players.append(player)
            sizes.append((len(down), len(up)))
            if t not in lost:
                contents.append((client, algorithm.read(state, unpack(up, spec.layout))))
        state = thaw(freeze(algorithm.aggregate(state, contents)), spec.layout, ProgFed.__module__)
        yield state, players, sizes


def test_a_new_block_starts_where_the_job_does_and_what_was_trained_stays(deep):
    start = deep.initial("glorot", Streams(0))
    first, second, _ = stages(deep, cut(deep))
    for state, _, _ in play(ProgFed(schedule="list", grow_at=(3, 5)), deep, 6):
        expected = {
            1: {"fc1": 1, "fc2": 0, "fc3": 0, "fc4": 0}, 2: {"fc1": 2, "fc2": 0, "fc3": 0, "fc4": 0},
            3: {"fc1": 3, "fc2": 1, "fc3": 0, "fc4": 0}, 4: {"fc1": 4, "fc2": 2, "fc3": 0, "fc4": 0},
            5: {"fc1": 5, "fc2": 3, "fc3": 1, "fc4": 1}, 6: {"fc1": 6, "fc2": 4, "fc3": 2, "fc4": 2},
        }[state.round]  # fmt: skip
        for name, steps in expected.items():
            assert torch.allclose(state.params[f"{name}.weight"], start[f"{name}.weight"] + steps, atol=1e-6)
        heads = {1: (first, 1), 2: (first, 2), 3: (second, 1), 4: (second, 2)}
        if state.round in heads:
            stage, steps = heads[state.round]
            assert torch.allclose(state.head, stage.fresh_head(Streams(0)) + steps, atol=1e-6)
        else:
            assert state.head.numel() == 0
    params, masks = ProgFed().finalize(state)
    assert params.layout.fingerprint == deep.layout.fingerprint
    assert masks.density == 1


def test_warm_up_moves_the_new_block_and_head_alone_at_the_first_rate(deep):
    start = deep.initial("glorot", Streams(0))
    before = start
    for state, players, sizes in play(ProgFed(warmup=1), deep, 8):  # 6 main rounds: starts 1, 2, 4
        assert state.growth.starts == (1, 2, 4)
        moved = [
            name for name in ("fc1", "fc2", "fc3", "fc4") if not same(state.params[f"{name}.bias"], before[f"{name}.bias"])
        ]
        expected = {1: ["fc1"], 2: ["fc2"], 3: ["fc1", "fc2"], 4: ["fc3", "fc4"]}
        assert moved == expected.get(state.round, ["fc1", "fc2", "fc3", "fc4"])
        rate = {1: 1 / 6, 2: 1 / 8, 3: 2 / 6, 4: 1 / 8}.get(state.round, (state.round - 2) / 6)
        assert players[0].said["lr"] == pytest.approx(rate)
        size = stages(deep, cut(deep))[state.growth.stage(state.round) - 1].layout(deep.layout).size
        assert all(0 <= down - 4 * size < 64 and 0 <= up - 4 * size < 128 for down, up in sizes)  # what is frozen is sent too
        before = state.params


def test_growing_resets_the_server_optimiser_and_the_velocity_of_clients(deep):
    algorithm = ProgFed(schedule="list", grow_at=(3, 5), client_momentum="kept", server=ServerOptim(name="momentum", lr=1.0))
    for state, players, _ in play(algorithm, deep, 6):
        since = state.round - state.growth.starts[state.growth.stage(state.round) - 1]
        assert state.moments.first.shape == (players[0].said["layout"].trainable,)
        assert torch.allclose(state.moments.first, torch.tensor(1 + 0.9 * since))
        assert (players[0].said["momentum"] is None) == (since == 0)
    fresh = list(play(ProgFed(), deep, 6))
    assert all(player.said["momentum"] is None for _, players, _ in fresh for player in players)


def test_the_network_grows_though_nobody_answers(deep):
    """Lost replies of the round of growth, and of every later one: the final model is whole all the same."""
    start = deep.initial("glorot", Streams(0))
    *_, (state, _, _) = play(ProgFed(schedule="list", grow_at=(3, 5)), deep, 6, lost=(3, 5, 6))
    params, _ = ProgFed().finalize(state)
    assert params.layout.fingerprint == deep.layout.fingerprint
    assert torch.allclose(params["fc1.weight"], start["fc1.weight"] + 3)
    assert torch.allclose(params["fc2.weight"], start["fc2.weight"] + 1)
    assert same(params["fc4.weight"], start["fc4.weight"])


def test_clients_count_alike_unless_examples_are_asked_for(deep):
    for weighting, mean in (("uniform", 2.0), ("examples", 2.5)):
        algorithm = ProgFed(weighting=weighting)
        state = algorithm.init(Job(deep, Params.zeros(deep.layout), 6, 2, Streams(0)))
        size = state.network.layout.size
        contents = []
        for client, (value, examples) in enumerate([(1.0, 1), (3.0, 3)]):
            sections = {"update": vector(torch.full((size,), value)), "examples": number(examples), "loss": number(0.1)}
            contents.append((client, algorithm.read(state, Message("train", 1, deep.layout, sections))))
        before = state.network
        after = algorithm.aggregate(state, contents).network
        assert torch.allclose(after.flat - before.flat, torch.full((size,), mean))


# ---- compression


SIZES = (40, 1, 300)


@pytest.mark.parametrize(("bits", "keep"), [(8, 1.0), (2, 1.0), (32, 0.25), (4, 0.1), (2, 0.5)])
def test_what_is_compressed_is_right_on_average(bits, keep):
    """The mean over 4000 draws is within 5 standard errors of the vector, in nearly every element; so is no biased rule."""
    flat = torch.randn(341, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 341)
    lossy, layout = Lossy(SIZES, bits, keep), made("mlp").layout
    draws = []
    for seed in range(4000):
        streams = Streams(seed)
        message = Message("train", 1, layout, lossy.sections(flat, streams("positions"), streams("levels")))
        draws.append(lossy.spread(lossy.read(unpack(pack(message), layout)), streams("positions")).double())
    found = torch.stack(draws)
    error = (found.mean(0) - flat).abs() / (found.std(0) / len(draws) ** 0.5 + flat.abs() * 1e-6 + 1e-12)
    assert float(error.max()) < 5
    assert found.std(0).max() > 0


@pytest.mark.parametrize("words", [2**63, 5])
def test_a_choice_is_the_beginning_of_a_permutation(words, monkeypatch):
    """Also where words are equal, which 64 bits hardly ever are."""
    draw = Stream.words
    monkeypatch.setattr(Stream, "words", lambda self, n: draw(self, n) % np.uint64(words))
    for n, k in ((1, 1), (7, 0), (7, 3), (7, 7), (200, 40), (200, 199)):
        for seed in range(20):
            chosen = Streams(seed)("c").choice(n, k)
            assert same(chosen, np.sort(Streams(seed)("c").permutation(n)[:k]))


def test_levels_by_hand():
    """Two bits between -1 and 2 are the levels -1, 0, 1, 2; what lies on one is exact, 0.25 becomes 0 or 1."""
    lossy, layout = Lossy((4,), bits=2), made("mlp").layout
    seen = set()
    for seed in range(60):
        message = Message(
            "train", 1, layout, lossy.sections(torch.tensor([-1.0, 0.25, 1.0, 2.0]), Streams(0)("p"), Streams(seed)("l"))
        )
        low, middle, high, top = lossy.read(message).tolist()
        assert (low, high, top) == (-1.0, 1.0, 2.0)
        seen.add(middle)
    assert seen == {0.0, 1.0}


def test_positions_never_travel_and_each_client_has_its_own(deep):
    lossy, layout = Lossy((1000, 50), bits=8, keep=0.1), deep.layout
    sections = lossy.sections(torch.randn(1050, generator=torch.Generator().manual_seed(0)), Streams(1)("p"), Streams(1)("l"))
    assert set(sections) == {"update", "ranges"}
    message = Message("train", 1, layout, sections)
    assert len(message.integers("update")) == 105
    assert len(pack(message)) < 105 + 16 + 90
    first, second = (lossy.positions(Streams(0, round=1, client=client)("positions")) for client in (0, 1))
    assert len(first) == 105
    assert not same(first, second)
    assert first.tolist() == sorted(set(first.tolist()))
    assert int((first < 1000).sum()) == 100


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_of_a_compressed_update_are_at_most_those_of_its_bits(bits):
    """Down the whole stage as float32, up at most so many bits for each number that is sent and two ends for each tensor."""
    spec = made("cnn")
    for state, players, sizes in play(ProgFed(bits=bits, keep=0.25), spec, 3, clients=1):
        layout = players[0].said["layout"]
        ((down, up),) = sizes
        assert 0 <= down - 4 * layout.size < 64
        assert up < layout.trainable * 0.25 * bits / 8 + 8 * len(layout.slots) + 200
        assert state.growth.starts == (1, 2, 3)


def test_statistics_of_batch_norm_are_never_compressed():
    """Rounded between the least and the largest update, a small variance could turn negative, and its root NaN."""
    spec = made("cnn6")
    for state, _, _ in play(ProgFed(bits=2, keep=0.1), spec, 4):
        stage = state.stage(state.round).layout(spec.layout)
        spans = [spec.layout.spans[slot.name] for slot in stage.slots if slot.name.endswith("running_var")]
        assert spans
    assert all(
        torch.equal(state.params.flat[slice(*span)], torch.full((span[1] - span[0],), v))
        for span, v in zip(spans, (5.0, 4.0), strict=True)
    )


def hostile(deep):
    """Sections that no honest client sends in round 1, for 8 bits."""
    layout = stages(deep, cut(deep))[0].layout(deep.layout)
    n, tensors = layout.trainable, sum(slot.kind.value != "buffer" for slot in layout.slots)
    fine = {
        "update": integers(torch.arange(n) % 256),
        "ranges": vector(torch.tensor([0.0, 1.0] * tensors)),
        "statistics": vector(torch.zeros(0)),
    }
    return {
        "fine": fine,
        "short": fine | {"update": integers(torch.zeros(n - 1, dtype=torch.int64))},
        "level": fine | {"update": integers(torch.full((n,), 256))},
        "negative": fine | {"update": integers(torch.full((n,), -1))},
        "backward": fine | {"ranges": vector(torch.tensor([1.0, 0.0] * tensors))},
        "ranges": fine | {"ranges": vector(torch.zeros(2))},
        "huge": fine | {"ranges": vector(torch.tensor([-1e308, 1e308] * tensors, dtype=torch.float64))},
        "statistics": fine | {"statistics": vector(torch.zeros(3))},
        "missing": {"ranges": fine["ranges"], "statistics": fine["statistics"]},
    }


@pytest.mark.parametrize("what", ["short", "level", "negative", "backward", "ranges", "huge", "statistics", "missing"])
def test_hostile_replies_are_refused(what, deep):
    algorithm = ProgFed(bits=8)
    state = algorithm.init(Job(deep, deep.initial("glorot", Streams(0)), 6, 2, Streams(0)))
    cases, plain = hostile(deep), {"examples": number(2), "loss": number(0.1)}
    algorithm.read(state, Message("train", 1, deep.layout, cases["fine"] | plain))
    with pytest.raises(WireError):
        algorithm.read(state, Message("train", 1, deep.layout, cases[what] | plain))


def test_a_plain_update_of_wide_numbers_or_of_another_stage_is_refused(deep):
    algorithm = ProgFed()
    state = algorithm.init(Job(deep, deep.initial("glorot", Streams(0)), 6, 2, Streams(0)))
    size, plain = state.network.layout.size, {"examples": number(2), "loss": number(0.1)}
    for update in (torch.full((size,), 1e300, dtype=torch.float64), torch.zeros(deep.layout.size)):
        with pytest.raises(WireError) as found:
            algorithm.read(state, Message("train", 1, deep.layout, {"update": vector(update)} | plain))
        assert found.value.reason is Reason.COUNT


def test_bits_are_whole_numbers_of_a_few_as_text_too():
    assert from_name("progfed", {"algorithm.bits": "8"}).algorithm.bits == 8
    for wrong in (3, "3", "many"):
        with pytest.raises(UsageError, match=r"algorithm\.bits = .*32, 8, 4 or 2"):
            from_name("progfed", {"algorithm.bits": wrong})


# ---- runs


RUNS = {
    "plain": ProgFed(),
    "warm": ProgFed(warmup=1, client_momentum="kept", server=ServerOptim(name="adam", lr=0.05)),
    "lossy": ProgFed(schedule="equal", bits=4, keep=0.5, weighting="examples"),
}
MOMENTUM = replace(LOCAL, momentum=0.5, schedule="cosine")


def engine(**settings):
    return Engine(**{"rounds": 8, "cohort": 4, "seed": 3, "dropout": 0.2, "eval_clients": 3, "eval_tune": 1} | settings)


@pytest.mark.parametrize("name", RUNS)
def test_runs_that_grow_do_not_depend_on_workers_and_groups_or_on_an_interruption(name, digits, deep, tmp_path):
    settings = {"model": deep, "data": digits, "local": MOMENTUM, "start": deep.initial("glorot", Streams(3))}
    whole = fit(RUNS[name], engine=engine(), **settings)
    assert comparable(fit(RUNS[name], engine=engine(workers=2), **settings)) == comparable(whole)
    for stop in (1, 3, 5):
        out = tmp_path / str(stop)

        def interrupt(row, stop=stop):
            if row["round"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(RUNS[name], engine=engine(checkpoint_every=2), out=out, watch=interrupt, **settings)
        resumed = fit(RUNS[name], engine=engine(checkpoint_every=2, workers=2), out=out, resume=True, **settings)
        assert comparable(resumed) == comparable(whole)
        assert {name: tuple(t.shape) for name, t in final(out).items()} == {s.name: s.shape for s in deep.layout.slots}
    assert whole.rows[0]["flops"] < whole.rows[-1]["flops"]
    assert whole.rows[0]["tuned_accuracy"] is not None
    grouped = fit(RUNS[name], engine=engine(group=2), **settings)
    assert torch.allclose(grouped.params.flat, whole.params.flat, atol=1e-3)


def test_clients_evaluate_the_network_of_the_stage(digits, deep):
    """Every client has all test examples: the mean over clients of what they report is what the server finds."""
    alike = replace(digits, shares=tuple(np.arange(len(digits.test)) for _ in digits.shares))
    result = fit(ProgFed(), model=deep, data=alike, local=LOCAL, engine=engine(eval_clients=6, eval_tune=0))
    for row in result.rows:
        assert row["client_accuracy"]["mean"] == pytest.approx(row["accuracy"])
        assert row["client_accuracy"]["std"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_a_client_makes_the_stage_from_what_it_has(name, digits, deep):
    """A device of its own, which shares nothing but what a client holds, answers the same in every stage."""
    algorithm, state = RUNS[name], None
    device = Device(Plan(algorithm, deep, digits, MOMENTUM, 8, 3))
    state, mine = algorithm.init(Job(deep, deep.initial("glorot", Streams(3)), 8, 6, Streams(3))), None
    for _ in range(8):
        payload = pack(algorithm.broadcast(state, [2])[2])
        fresh = Device(pickle.loads(pickle.dumps(Plan(algorithm, deep, digits, MOMENTUM, 8, 3))))
        reply, kept = handle(device, 2, payload, mine)
        assert handle(fresh, 2, payload, mine) == (reply, kept)
        mine = kept if kept is not None else mine
        state = algorithm.aggregate(state, [(2, algorithm.read(state, unpack(reply, deep.layout)))])


def test_one_stage_is_fedavg(digits, small):
    settings = {"model": small, "data": digits, "local": LOCAL, "engine": engine()}
    grown, plain = fit(ProgFed(), **settings), fit(FedAvg(weighting="uniform"), **settings)
    assert same(grown.params.flat, plain.params.flat)
    assert grown.summary["bytes_up"] == plain.summary["bytes_up"]


@pytest.fixture(scope="module")
def ten():
    settings = Data(name="digits", clients=10)
    return federate(load(settings), settings, Streams(0))


@pytest.mark.parametrize(
    ("model", "algorithm", "least"),
    [
        ("cnn", ProgFed(), 0.9),
        ("cnn", ProgFed(warmup=1), 0.88),
        ("cnn", ProgFed(bits=4, keep=0.25), 0.88),
        ("resnet8", ProgFed(), 0.93),
    ],
)
def test_it_learns_digits_at_less_traffic(ten, model, algorithm, least):
    """14 rounds of 10 clients; FedAvg takes 4 bytes a parameter, client and direction."""
    spec = build(Model(name=model), ten.shape, ten.classes)
    result = fit(
        algorithm,
        model=spec,
        data=ten,
        local=LOCAL,
        engine=Engine(rounds=14, eval_clients=0),
        start=spec.initial("glorot", Streams(0)),
    )
    assert result.accuracy > least
    whole = 4 * spec.layout.size * 14 * 10
    plan = growth(14, 3, "half", algorithm.warmup)
    sizes = [stage.layout(spec.layout).size for stage in stages(spec, cut(spec))]
    expected = 4 * 10 * sum(sizes[plan.stage(t) - 1] for t in range(1, 15))
    assert expected < 0.85 * whole
    assert result.summary["bytes_down"] == pytest.approx(expected, rel=0.002)
    assert (
        result.summary["bytes_up"]
        <= result.summary["bytes_down"] * 1.001 * (algorithm.bits / 32) * algorithm.keep + 14 * 10 * 500
    )


def test_statistics_of_batch_norm_are_averaged_in_every_stage(ten):
    spec = build(Model(name="cnn6", dropout=0.0), ten.shape, ten.classes)
    small = replace(ten, parts=tuple(part[:32] for part in ten.parts[:3]), shares=ten.shares[:3])
    result = fit(
        ProgFed(stages=2, boundaries=("stage1",), bits=4),
        model=spec,
        data=small,
        local=LOCAL,
        engine=Engine(rounds=3, eval_clients=0),
    )
    mean, var = (result.params[f"stage2.norm.running_{which}"] for which in ("mean", "var"))
    assert mean.abs().max() > 0
    assert (var > 0).all()
    assert torch.isfinite(result.params.flat).all()


# ---- from the command line


def command(*words, folder):
    done = subprocess.run(
        [sys.executable, "-m", "fedsieve", *map(str, words)], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_runs_resumes_reports_and_exports_from_the_command_line(tmp_path):
    values = {
        "data.train_limit": 300, "data.clients": 4, "model.name": "cnn", "engine.rounds": 4, "engine.checkpoint_every": 1,
        "algorithm.schedule": "list", "algorithm.grow_at": [2, 3], "algorithm.boundaries": ["relu1", "relu2"],
        "algorithm.bits": 8,
    }  # fmt: skip
    words = ["run", "progfed", "--engine.workers", "2", "--out", tmp_path / "whole"]
    for key, value in values.items():
        words += [f"--{key}", *(value if isinstance(value, list) else [value])]
    command(*words, folder=tmp_path)

    def interrupt(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_name("progfed", values).run(tmp_path / "run", watch=interrupt)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    command("resume", tmp_path / "run", folder=tmp_path)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]
    command("report", tmp_path / "run", folder=tmp_path)
    command("export", tmp_path / "run", folder=tmp_path)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert "--algorithm.grow_at" in command("run", "progfed", "--help", folder=tmp_path)


# ---- U-Nets


def strokes():
    """Digits whose every pixel is to be told apart: more than half as dark as can be, or not. Seen is a noisy picture."""
    settings = Data(name="digits")
    raw = load(settings)
    noise = torch.Generator().manual_seed(0)
    seen, wanted = [], []
    for x in (raw.x_train, raw.x_test):
        pixels = x.float() / x.max()
        wanted.append((pixels > 0.5).flatten(1).long())
        seen.append(pixels + 0.3 * torch.randn(pixels.shape, generator=noise))
    return Dataset("strokes", seen[0], wanted[0], seen[1], wanted[1], 2)


def test_u_nets_grow_from_both_ends_and_keep_their_output_path():
    spec = ModelSpec.of(unet((1, 8, 8), 2, (4, 6, 8)), torch.zeros(1, 1, 8, 8), name="unet")
    assert cut(spec) == ("down.0", "down.1")
    first, second, whole = stages(spec, cut(spec))
    parts = [
        {".".join(name.split(".")[: 2 if name[:2] in ("do", "up") else 1]) for name in stage.names}
        for stage in (first, second, whole)
    ]
    assert parts[0] == {"down.0", "out"}
    assert parts[1] == {"down.0", "down.1", "up.0", "out"}
    assert parts[2] == {"down.0", "down.1", "down.2", "up.0", "up.1", "out"}
    assert all(stage.head == "" for stage in (first, second, whole))
    assert whole.layout(spec.layout).fingerprint == spec.layout.fingerprint
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert stage_spec(spec, cut(spec), 2).module(x).shape == (2, 64, 2)
    assert cut(spec, ("down.1",)) == ("down.1",)
    for wrong in ("down.2", "up.0", "out"):
        with pytest.raises(UsageError, match=r"There are: down\.0, down\.1"):
            cut(spec, (wrong,))


def test_a_u_net_that_grows_learns_to_segment_strokes():
    """A threshold on the noisy pixel itself is right in 0.877 of the pixels; the network has to look at its neighbours."""
    raw = strokes()
    data = federate(raw, Data(clients=6), Streams(0))
    spec = build(Model(name="fedsieve.models.unet:unet", hidden=(8, 12, 16)), data.shape, 2)
    algorithm = ProgFed(schedule="list", grow_at=(3, 5), warmup=1)
    result = fit(
        algorithm,
        model=spec,
        data=data,
        local=replace(LOCAL, momentum=0.9, lr=0.05),
        engine=Engine(rounds=9, eval_clients=2),
        start=spec.initial("kaiming", Streams(0)),
    )
    alone = float(((raw.x_test > 0.5).flatten(1).long() == raw.y_test).float().mean())
    assert result.params.layout.fingerprint == spec.layout.fingerprint
    assert result.accuracy > max(0.9, alone + 0.02)
    assert result.rows[0]["bytes_down"] < result.rows[3]["bytes_down"] < result.rows[-1]["bytes_down"]


def test_a_network_of_two_lists_that_do_not_fit_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x):
            return self.up[0](self.down[0](x))

    with pytest.raises(UsageError, match="shorter by one"):
        cut(ModelSpec.of(Odd(), torch.zeros(1, 2)))
