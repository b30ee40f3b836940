"""SNIP and its kin, SSFL, OneShot, LotteryFL, SparsyFed: values worked out by hand, and what is sent."""

from itertools import pairwise
from math import ceil, log

import numpy as np
import pytest
import torch
from torch import nn

from conftest import same
from fedsieve import (
    Data,
    DataError,
    Engine,
    Layout,
    Local,
    Masks,
    Message,
    Model,
    ModelSpec,
    Params,
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
from fedsieve.aggregate.mean import HeldMean
from fedsieve.algorithms import lotteryfl, snip, sparsyfed, ssfl
from fedsieve.algorithms.base import Job, Personal, counts
from fedsieve.algorithms.fedsparsify import FedSparsify
from fedsieve.algorithms.lotteryfl import LotteryFL
from fedsieve.algorithms.oneshot import OneShot
from fedsieve.algorithms.snip import Snip
from fedsieve.algorithms.sparsyfed import SparsyFed
from fedsieve.algorithms.ssfl import Ssfl
from fedsieve.data.batches import Examples
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.transports import Sequential
from fedsieve.local.executor import Client, Executor, Metrics, Trained
from fedsieve.params import Kind, Slot
from fedsieve.reparam.power import Power
from fedsieve.sparsity.allocate import allocate
from fedsieve.wire.sections import mask, number, values
from fedsieve.wire.sections import vector as numbers
from fedsieve.wire.versions import Known

LOCAL = Local(batch=16, lr=0.1, momentum=0.5)


def job_of(layout, start=None, *, rounds=5, clients=3):
    spec = type("Spec", (), {"layout": layout})
    return Job(spec, start or Params(layout, torch.ones(layout.size)), rounds, clients, Streams(0))


def told(message, layout):
    """A message as the other end reads it."""
    return unpack(pack(message), layout)


def tiny():
    """A linear network of 2 x 2 weights, no biases, and a client with one example: x = (1, 2), label 0."""
    spec = ModelSpec.of(nn.Linear(2, 2, bias=False), torch.zeros(1, 2))
    examples = Examples(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), (), ())
    here, streams = np.array([0]), Streams(0).at(round=1, client=0)
    return spec, Client(0, Executor(spec, Local(), 1), examples, here, examples, here, streams)


class Still:
    """A client that writes down what it is asked to train, and answers what it is told to."""

    def __init__(self, layout, *, id=0, round=1, accuracy=1.0, learned=None):
        self.layout, self.id, self.accuracy, self.learned = layout, id, accuracy, learned
        self.rounds, self.examples, self.stream = 10, 5, Streams(0).at(round=round, client=id)
        self.began = None

    def train(self, params, *, masks=None, reparam=None, **_):
        self.began = params
        params = params if self.learned is None else self.learned
        return Trained(params.under(masks) if masks else params, self.examples, 0.5, None, 1)

    def evaluate_training(self, params, masks=None):
        return Metrics(round(self.accuracy * 100), 0.0, 100)

    def evaluate(self, params, masks=None, spec=None):
        self.began = params.under(masks) if masks else params
        return Metrics(int(self.began.maskable.ne(0).sum()), 0.0, 100)


# ---- SNIP and its kin


def test_snip_keeps_the_largest_products_of_gradient_and_weight():
    """Scores are (3, 3), so p = (1/2, 1/2) and g = (p - (1, 0)) x' = [[-1/2, -1], [1/2, 1]]; |g w| = [[1/2, 1], [3/2, 0]]."""
    spec, client = tiny()
    start = Params(spec.layout, torch.tensor([1.0, 1.0, 3.0, 0.0]))
    for density, kept in ((0.25, [0, 0, 1, 0]), (0.5, [0, 1, 1, 0]), (0.75, [1, 1, 1, 0])):
        algorithm = Snip(density=density)
        state = algorithm.init(Job(spec, start, 3, 1, Streams(0)))
        request = told(algorithm.broadcast(state, [0])[0], spec.layout)
        assert request.kind == "setup"
        reply, mine = algorithm.client_update(request, client, None)
        assert mine is None
        later = algorithm.aggregate(state, [(0, algorithm.read(state, told(reply, spec.layout)))])
        params, masks = algorithm.finalize(later)
        assert masks.kept.int().tolist() == kept
        assert params.flat.tolist() == [w * k for w, k in zip([1.0, 1.0, 3.0, 0.0], kept, strict=True)]
        assert later.round == 0


def test_grasp_keeps_what_carries_the_gradient():
    """The same network: g x = (-5/2, 5/2), (diag p - p p') (g x) = (-5/4, 5/4), so H g = [[-5/4, -5/2], [5/4, 5/2]]."""
    spec, client = tiny()
    start = Params(spec.layout, torch.tensor([1.0, 1.0, 3.0, 0.0]))
    algorithm = Snip(score="grasp", density=0.5, temperature=1.0)
    found = algorithm._saliency(start, Masks.full(spec.layout), client)
    assert found.tolist() == pytest.approx([-1.25, -2.5, 3.75, 0.0])
    warm = Snip(score="grasp", temperature=200.0)._saliency(start, Masks.full(spec.layout), client)
    # outputs are equal, so p is as before; each derivative by the weights brings 1 / 200, of which g has one and H two
    assert warm.tolist() == pytest.approx([-1.25 / 200**3, -2.5 / 200**3, 3.75 / 200**3, 0.0], rel=1e-4)


def test_the_mask_is_sent_once_and_then_only_values_on_the_support(digits, small):
    result = fit(Snip(density=0.2), model=small, data=digits, local=LOCAL, engine=Engine(rounds=3, eval_clients=0, seed=2))
    layout, clients = small.layout, 6
    kept = round(0.2 * layout.maskable)
    weights = 4 * (kept + layout.size - layout.maskable)
    first, second, third = (row["phases"] for row in result.rows)
    assert first["masks"]["down"] % clients == 0
    assert 0 < first["masks"]["down"] // clients < 1.02 * layout.maskable / 8
    assert first["masks"]["up"] == first["masks"]["down"] // clients  # one client chose it
    assert 4 * layout.size < first["setup"]["down"] < 4 * layout.size + 100
    assert set(second) == set(third) == {"train"}
    for row in (second, third):
        assert weights * clients < row["train"]["up"] < (weights + 150) * clients
        assert weights * clients < row["train"]["down"] < (weights + 150) * clients


@pytest.mark.parametrize("score", ["synflow", "magnitude", "random"])
def test_scores_that_need_no_data_need_no_exchange(score, digits, small):
    algorithm = Snip(score=score, density=0.1)
    state = algorithm.init(Job(small, small.initial("glorot", Streams(3)), 3, 6, Streams(3)))
    masks = algorithm.finalize(state)[1]
    assert masks.count == round(0.1 * small.layout.maskable)
    assert {message.kind for message in algorithm.broadcast(state, [1, 2]).values()} == {"train"}
    if score == "magnitude":
        weights = state.params.maskable.abs()
        assert weights[masks.kept].min() >= small.initial("glorot", Streams(3)).maskable.abs()[~masks.kept].max()


def test_scoring_in_steps_costs_no_exchange_and_finds_another_mask(digits, small):
    start = small.initial("glorot", Streams(3))
    chosen = {}
    for iterations in (1, 8):
        settings = {"model": small, "data": digits, "local": LOCAL, "start": start}
        result = fit(Snip(density=0.05, iterations=iterations), engine=Engine(rounds=1, eval_clients=0), **settings)
        chosen[iterations] = result.masks, result.rows[0]["phases"]["setup"]
    assert chosen[1][1] == chosen[8][1]
    assert chosen[1][0].count == chosen[8][0].count
    assert not same(chosen[1][0].kept, chosen[8][0].kept)


@pytest.mark.parametrize("rule", ["uniform", "erk", "er", "balanced", "pyramidal"])
def test_random_masks_keep_what_the_rule_says_in_each_tensor(rule, small):
    start = small.initial("glorot", Streams(3))
    for paper in (False, True):
        algorithm = Snip(score="random", density=0.5, allocation=rule, paper=paper)
        masks = algorithm.finalize(algorithm.init(Job(small, start, 3, 6, Streams(3))))[1]
        wanted = allocate(small.layout, round(0.5 * small.layout.maskable), rule, paper=paper, floor=0 if paper else 1)
        assert {slot.name: int(masks[slot.name].sum()) for slot in small.layout.masked_slots} == wanted
    lossy = Snip(score="random", density=0.5, allocation="balanced", paper=True)
    assert lossy.finalize(lossy.init(Job(small, start, 3, 6, Streams(3))))[1].density < 0.4
    assert lossy.promises == "at most"


def test_a_tensor_that_would_be_cut_off_keeps_its_floor(small):
    start = small.initial("glorot", Streams(3))
    first, last = (small.layout.masked_slots[place].name for place in (0, -1))
    start[first].mul_(1000)
    for floor in (0, 7):
        algorithm = Snip(score="magnitude", density=0.1, floor=floor)
        masks = algorithm.finalize(algorithm.init(Job(small, start, 3, 6, Streams(3))))[1]
        assert int(masks[last].sum()) == floor
        assert masks.count == round(0.1 * small.layout.maskable)


def test_masks_of_several_clients_are_put_to_the_vote(three):
    """Two of three keep the second weight, one each the first and the third: a stream draws the other one."""
    algorithm = Snip(density=0.67, clients=3)
    state = algorithm.init(job_of(three))
    assert len(algorithm.broadcast(state, [0, 1, 2])) == 3
    sent = [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
    contents = []
    for client, kept in enumerate(sent):
        reply = Message("setup", 1, three, {"mask": mask(Masks(three, torch.tensor(kept).bool()))})
        contents.append((client, algorithm.read(state, told(reply, three))))
    assert algorithm.finalize(algorithm.aggregate(state, contents))[1].kept.tolist() == [True, True, False]


def test_a_mask_of_another_count_is_refused_and_another_client_is_asked(three):
    algorithm = Snip(density=0.34)
    state = algorithm.init(job_of(three, clients=30))
    reply = Message("setup", 1, three, {"mask": mask(Masks(three, torch.tensor([True, True, False])))})
    with pytest.raises(WireError, match="keeps 2 weights, not 1"):
        algorithm.read(state, reply)
    asked = set()
    for _ in range(6):
        (client,) = algorithm.broadcast(state, list(range(30)))
        asked.add(client)
        state = algorithm.aggregate(state, [])
    assert state.round == 6
    assert state.versions is None
    assert len(asked) > 2


def test_settings_that_cannot_be_used_are_refused(three):
    for settings, said in (
        ({"clients": 4}, "algorithm.clients = 4"),
        ({"density": 0.01}, "algorithm.density = 0.01 keeps 0 of 3"),
        ({"paper": True}, "algorithm.allocation"),
        ({"allocation": "erk", "iterations": 5}, "algorithm.iterations = 5"),
    ):
        with pytest.raises(UsageError, match=said):
            Snip(**{"density": 0.5, **settings}).init(job_of(three))
    with pytest.raises(UsageError, match=r"algorithm\.density = 0\.01"):
        Ssfl(density=0.01).init(job_of(three))
    with pytest.raises(UsageError, match=r"algorithm\.at = 6"):
        OneShot(at=6).init(job_of(three))
    with pytest.raises(UsageError, match=r"algorithm\.schedule = cubic"):
        OneShot(schedule="cubic").init(job_of(three, rounds=1))
    nothing = Layout.of([Slot("b", (1,), Kind.BIAS, False, 0)])
    for algorithm in (Snip(), Ssfl(), OneShot(), LotteryFL(), SparsyFed()):
        with pytest.raises(UsageError, match="no maskable weight"):
            algorithm.init(job_of(nothing))
    words = type("Spec", (), {"layout": three, "example": torch.zeros(1, 4, dtype=torch.int64)})
    with pytest.raises(UsageError, match="tokens"):
        Snip(score="synflow", density=0.5).init(Job(words, Params(three, torch.ones(4)), 3, 3, Streams(0)))


# ---- SSFL


def scored(layout, scores, examples, *, peak=1.0, wire="fp32"):
    sent = torch.tensor(scores, dtype={"fp32": torch.float32, "fp16": torch.float16}[wire])
    return Message("setup", 1, layout, {"scores": numbers(sent), "peak": number(peak), "examples": number(examples)})


def test_saliencies_are_averaged_by_examples(three):
    """Examples 1 and 3: (4, 0, 1) + 3 (0, 2, 1) over 4 is (1, 3/2, 1). Alike: (2, 1, 1)."""
    for weighting, kept in (("examples", [False, True, False]), ("uniform", [True, False, False])):
        algorithm = Ssfl(density=0.34, weighting=weighting)
        state = algorithm.init(job_of(three))
        replies = [scored(three, (4, 0, 1), 1), scored(three, (0, 2, 1), 3)]
        contents = [(client, algorithm.read(state, told(reply, three))) for client, reply in enumerate(replies)]
        later = algorithm.aggregate(state, contents)
        assert algorithm.finalize(later)[1].kept.tolist() == kept
        assert later.round == 0


def test_saliencies_are_those_of_snip():
    spec, client = tiny()
    start = Params(spec.layout, torch.tensor([1.0, 1.0, 3.0, 0.0]))
    for wire in ("fp32", "fp16"):
        algorithm = Ssfl(density=0.5, wire=wire)
        state = algorithm.init(Job(spec, start, 3, 1, Streams(0)))
        reply, _ = algorithm.client_update(told(algorithm.broadcast(state, [0])[0], spec.layout), client, None)
        scores, share = algorithm.read(state, told(reply, spec.layout))
        assert scores.flat.tolist() == pytest.approx([0.5, 1.0, 1.5, 0.0], rel=1e-3)
        assert share == 1


def test_hostile_saliencies_are_refused(three):
    algorithm = Ssfl(density=0.5)
    state = algorithm.init(job_of(three))
    for reply in (scored(three, (1, -1, 1), 1), scored(three, (1, 1, 1), 1, peak=0.0), scored(three, (1, 1, 1), 0)):
        with pytest.raises(WireError):
            algorithm.read(state, reply)
    with pytest.raises(WireError, match="not finite"):
        algorithm.read(state, scored(three, (1e30, 1, 1), 1, peak=1e30))
    for scores in ((1, 1), (1, 1, 1, 1)):
        with pytest.raises(WireError, match=f"{len(scores)} saliencies of 3 weights"):
            algorithm.read(state, scored(three, scores, 1))


def test_saliencies_of_16_bits_are_half_the_bytes(digits, small):
    sizes = {}
    for wire in ("fp32", "fp16"):
        result = fit(
            Ssfl(density=0.2, wire=wire), model=small, data=digits, local=LOCAL, engine=Engine(rounds=2, eval_clients=0)
        )
        sizes[wire] = result.rows[0]["phases"]["setup"]["up"]
        assert "setup" not in result.rows[1]["phases"]
        assert set(result.rows[1]["phases"]) == {"train"}
    assert sizes["fp32"] - sizes["fp16"] == 6 * 2 * small.layout.maskable
    assert 6 * 4 * small.layout.maskable < sizes["fp32"] < 6 * (4 * small.layout.maskable + 100)  # biases are not sent


# ---- OneShot and Random


def densities(algorithm, digits, small, rounds, **engine):
    settings = {"rounds": rounds, "eval_clients": 0, "cohort": 3, "seed": 1} | engine
    start = small.initial("glorot", Streams(3))
    return fit(algorithm, model=small, data=digits, local=LOCAL, engine=Engine(**settings), start=start)


def test_oneshot_prunes_once(digits, small):
    low = round(0.1 * small.layout.maskable) / small.layout.maskable
    result = densities(OneShot(density=0.1, at=2), digits, small, 4)
    assert [row["density"] for row in result.rows] == pytest.approx([1, low, low, low])
    late = densities(OneShot(density=0.1), digits, small, 13)
    assert [row["density"] for row in late.rows] == pytest.approx([1, 1] + 11 * [low])
    assert late.rows[0]["bytes_up"] > 5 * late.rows[-1]["bytes_up"]


def test_oneshot_leaves_no_tensor_without_weights(small):
    """A first layer of small weights is emptied by a ranking over the network; the guard keeps its largest and says so."""
    start = Params(small.layout, small.initial("glorot", Streams(3)).flat.clone())
    first, last = (small.layout.masked_slots[place].name for place in (0, -1))
    start[first].mul_(1e-3)
    for floor, schedule in ((0, "oneshot"), (1, "oneshot"), (7, "oneshot"), (7, "cubic")):
        algorithm = OneShot(density=0.05, at=2 * (schedule == "oneshot"), floor=floor, schedule=schedule)
        state, said = algorithm.init(Job(small, start, 3, 1, Streams(3))), []
        for _ in range(3):
            state = algorithm.aggregate(state, [(0, (state.params, 1.0))])
            said.append(list(state.events))
        told = f"{first} keeps {floor} of 1024 weights, as few as the guard allows"
        assert said == ([[], [told], []] if schedule == "oneshot" else [[], [], [told]])  # round 2 leaves 200
        masks = state.versions.masks
        assert masks.counts() == {first: floor, last: 59 - floor}
        assert masks[first].flatten().nonzero().flatten().tolist() == sorted(
            start[first].abs().flatten().topk(floor).indices.tolist()
        )
    with pytest.raises(UsageError, match=r"algorithm\.density = 0\.05 keeps 59 .* 60 are needed, with 30 at least"):
        OneShot(density=0.05, floor=30).init(Job(small, start, 3, 1, Streams(3)))


def test_oneshot_prunes_when_somebody_answers(three, vector):
    algorithm = OneShot(density=0.34, at=1)
    state = algorithm.aggregate(algorithm.init(job_of(three)), [])
    assert state.versions.masks.density == 1
    reply = Message(
        "train",
        2,
        three,
        {
            "weights": values(vector(three, 1, -3, 2, 9), Masks.full(three)),
            "examples": number(1),
            "loss": number(0.1),
        },
    )
    state = algorithm.aggregate(state, [(0, algorithm.read(state, told(reply, three)))])
    assert state.params.flat.tolist() == [0, -3, 0, 9]


def test_magnitude_on_the_cubic_schedule_is_fedsparsify(digits, small):
    ours = densities(OneShot(density=0.1, schedule="cubic"), digits, small, 6)
    theirs = densities(FedSparsify(density=0.1), digits, small, 6)
    assert same(ours.params.flat, theirs.params.flat)
    assert [row["bytes_up"] for row in ours.rows] == pytest.approx([row["bytes_up"] for row in theirs.rows], rel=0.05)


def test_weights_go_in_one_random_order(digits, small):
    """Whatever was learned, the same weights are gone after the same round."""
    algorithm = OneShot(density=0.1, score="random", schedule="cubic")
    states, masks = [], []
    for scale in (1.0, -3.0):
        start = Params(small.layout, small.initial("glorot", Streams(3)).flat * scale)
        state = algorithm.init(Job(small, start, 5, 1, Streams(3)))
        seen = []
        for _ in range(5):
            state = algorithm.aggregate(state, [(0, (state.params, 1.0))])
            seen.append(state.versions.masks)
        states.append(state)
        masks.append(seen)
    assert all(same(a.kept, b.kept) for a, b in zip(*masks, strict=True))
    assert all(later <= before for before, later in pairwise(masks[0]))
    assert masks[0][-1].count == round(0.1 * small.layout.maskable)


# ---- LotteryFL


def test_mean_over_those_who_hold_a_weight(three, vector):
    """Weights 1 and 3. First: (2 + 3 * 6) / 4; second: the other's 5; third: nobody's, so 9 stays; bias: (4 + 3 * 8) / 4."""
    mean = HeldMean(three)
    mean.add(vector(three, 2, 0, 0, 4), Masks(three, torch.tensor([True, False, False])), 1)
    mean.add(vector(three, 6, 5, 0, 8), Masks(three, torch.tensor([True, True, False])), 3)
    assert mean.value(vector(three, 7, 8, 9, 0)).flat.tolist() == [5, 5, 9, 7]
    assert mean.weight == 4
    stray = HeldMean(three)
    stray.add(vector(three, 2, 1, 1, 4), Masks(three, torch.tensor([True, False, False])), 1)
    assert stray.value(vector(three, 0, 0, 0, 0)).flat.tolist() == [2, 0, 0, 4]


def ten():
    return Layout.of(
        [Slot("w", (10,), Kind.WEIGHT, True, 0), Slot("v", (5,), Kind.WEIGHT, True, 1), Slot("b", (2,), Kind.BIAS, False, 0)]
    )


def played(algorithm, state, layout, client, mine, *, lost=False):
    """One round with one client: the state after it, what the client keeps, and its request."""
    request = told(algorithm.broadcast(state, [client.id])[client.id], layout)
    reply, mine = algorithm.client_update(request, client, mine)
    reply = told(reply, layout)
    contents = [] if lost else [(client.id, algorithm.read(state, reply))]
    return algorithm.aggregate(state, contents), mine, request


def test_a_lottery_ticket_is_pruned_and_rewound_to_the_start():
    layout = ten()
    start = Params(layout, torch.arange(1.0, 18.0))
    learned = Params(layout, torch.tensor([9.0, 1, 8, 2, 7, 6, 5, 4, 3, 10, 1, 5, 4, 3, 2, 50, 60]))
    algorithm = LotteryFL(density=0.3, rate=0.2, threshold=0.5)
    state = algorithm.init(job_of(layout, start, clients=2))
    client = Still(layout, accuracy=0.5, learned=learned)
    state, mine, request = played(algorithm, state, layout, client, None)
    assert "weights" not in request.sections  # the start is the model
    assert same(client.began.flat, start.flat)  # not better than the threshold
    assert state.masks[0].density == 1
    assert same(state.params.flat, learned.flat)

    client = Still(layout, round=2, accuracy=0.51)
    state, mine, request = played(algorithm, state, layout, client, mine)
    assert "start" not in request.sections
    # the smallest 2 of 10, and 1 of 5, by what was learned: 1 and 2; 1
    kept = [1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert state.masks[0].kept.int().tolist() == kept
    assert client.began.flat.tolist() == [w * k for w, k in zip(start.maskable.tolist(), kept, strict=True)] + [16, 17]
    assert state.params.maskable[1] == 1  # nobody holds it: as it was
    assert state.params.maskable[0] == 1  # start of the holder
    assert state.params.maskable[2] == 3


def test_a_ticket_ends_at_the_density_asked_for_exactly(digits, small):
    layout, start = small.layout, small.initial("glorot", Streams(3))
    algorithm = LotteryFL(density=0.1)
    state, mine, counts = algorithm.init(Job(small, start, 20, 1, Streams(3))), None, []
    for t in range(1, 14):
        client = Still(layout, round=t)
        state, mine, _ = played(algorithm, state, layout, client, mine)
        counts.append(state.masks[0].count)
        assert same(client.began.flat, start.under(state.masks[0]).flat) or t > 11
    assert counts.index(round(0.1 * layout.maskable)) + 1 == ceil(log(0.1) / log(0.8)) == 11
    assert counts[:2] == [sum(int(0.8**t * slot.numel) for slot in layout.masked_slots) for t in (1, 2)]
    assert counts[-1] == counts[10]
    assert max(state.masks[0].densities().values()) - min(state.masks[0].densities().values()) < 0.01


def test_a_ticket_whose_reply_was_lost_is_built_on_the_one_that_came():
    layout = ten()
    algorithm = LotteryFL(density=0.1, rate=0.5, threshold=0.0)
    state = algorithm.init(job_of(layout, Params(layout, torch.arange(1.0, 18.0)), clients=2))
    state, mine, _ = played(algorithm, state, layout, Still(layout, round=1), None)
    once = state.masks[0]
    after, mine, _ = played(algorithm, state, layout, Still(layout, round=2), mine, lost=True)
    assert after.round == 2
    assert same(after.masks[0].kept, once.kept)
    assert len(mine.masks) == 2
    _, mine, request = played(algorithm, after, layout, Still(layout, round=3), mine)
    assert request.number("base") == 1
    assert set(mine.masks) == {1, 3}
    with pytest.raises(DataError, match="does not hold its mask of round 1"):
        algorithm.client_update(request, Still(layout, round=3), None)


def test_a_client_cannot_speak_for_another(digits):
    layout = ten()
    algorithm = LotteryFL(density=0.5, threshold=0.0)
    state = algorithm.init(job_of(layout, clients=2))
    request = told(algorithm.broadcast(state, [0])[0], layout)
    reply, _ = algorithm.client_update(request, Still(layout), None)
    content = algorithm.read(state, told(reply, layout))
    after = algorithm.aggregate(state, [(1, content)])
    assert after.masks == {}
    assert after.round == 1
    for claimed in (2, -1, 0.5):
        wrong = Message("train", 1, layout, {**reply.sections, "client": number(claimed)})
        with pytest.raises(WireError, match="there are 2"):
            algorithm.read(state, wrong)


def test_clients_are_evaluated_with_their_own_tickets():
    layout = ten()
    algorithm = LotteryFL(density=0.4, rate=0.6, threshold=0.0)
    state = algorithm.init(job_of(layout, clients=2))
    state, mine, _ = played(algorithm, state, layout, Still(layout), None)
    assert isinstance(algorithm, Personal)
    messages = algorithm.evaluation(state, [0, 1], 0)
    found = {}
    for client, known in ((0, mine), (1, None)):
        answer = algorithm.client_evaluate(told(messages[client], layout), Still(layout, id=client), known)
        found[client] = counts(told(answer, layout))[0].correct
    assert found == {0: 6, 1: 15}
    assert len(pack(messages[0])) == len(pack(messages[1])) - 4 * 9


# ---- SparsyFed


@pytest.mark.parametrize("beta", [1.15, 1.25, 1.5, 2.0])
def test_powers_give_back_the_weights_they_were_made_of(beta):
    weights, power = torch.from_numpy(Streams(0)("w").numpy().normal(0, 0.1, 20_000)).float(), Power(beta)
    spacing = torch.from_numpy(np.spacing(weights.abs().numpy()))
    learned = power.latent(weights)
    exact = power.effective(learned.double()).float()
    assert ((exact - weights).abs() <= spacing).all()  # what is learned is right to 1 unit in the last place
    assert ((power.effective(learned) - weights).abs() <= 2 * spacing).all()  # and arithmetic in float32 adds one
    assert power.effective(power.latent(torch.zeros(3))).tolist() == [0, 0, 0]


def stepped(power, value, gradient, lr, steps):
    learned, seen = torch.tensor([value]), []
    for _ in range(steps):
        slope = torch.tensor([gradient])
        power.backward(learned, slope)
        learned = learned - lr * slope
        seen.append(float(learned))
    return seen


def test_zero_stays_zero_and_signs_turn_below_two_only():
    assert stepped(Power(1.25), 0.0, 1.0, 0.1, 100) == [0.0] * 100
    path = stepped(Power(1.5), 0.3, 1.0, 0.05, 200)
    assert next(i for i, value in enumerate(path) if value < 0) == 12
    assert min(stepped(Power(2.0), 0.3, 1.0, 0.05, 200)) > 0


def sent(layout, weights, kept):
    masks = Masks(layout, torch.tensor(kept).bool())
    params = Params(layout, torch.tensor([*weights, 0.0]))
    return Message(
        "train", 1, layout, {"mask": mask(masks), "weights": values(params, masks), "examples": number(1), "loss": number(0.1)}
    )


def test_what_is_learned_is_averaged_zeros_included_and_the_union_stays(three):
    """beta = 2: w = v |v|. Two clients have 4 and 16 for a weight: v = 2 and 4, mean 3, w = 9; the mean of weights is 10."""
    for average, expected in (("learned", 9.0), ("weights", 10.0)):
        algorithm = SparsyFed(density=0.34, beta=2, average=average)
        state = algorithm.init(job_of(three))
        contents = [
            (client, algorithm.read(state, told(sent(three, (w, 0, 0), (1, 0, 0)), three)))
            for client, w in enumerate((4.0, 16.0))
        ]
        assert algorithm.aggregate(state, contents).params.flat.tolist() == pytest.approx([expected, 0, 0, 0])
    algorithm = SparsyFed(density=0.34, beta=2)
    state = algorithm.init(job_of(three))
    apart = [sent(three, (4, 0, 0), (1, 0, 0)), sent(three, (0, 0, -16), (0, 0, 1))]
    state = algorithm.aggregate(state, [(c, algorithm.read(state, told(m, three))) for c, m in enumerate(apart)])
    assert state.versions.masks.kept.tolist() == [True, False, True]
    assert state.params.flat.tolist() == pytest.approx([1, 0, -4, 0])  # v: (2 + 0) / 2 and (0 - 4) / 2
    params, masks = algorithm.finalize(state)
    assert masks.kept.tolist() == [False, False, True]
    assert params.flat.tolist() == pytest.approx([0, 0, -4, 0])
    union = SparsyFed(density=0.34, beta=2, final="union").finalize(state)[1]
    assert union.kept.tolist() == [True, False, True]
    with pytest.raises(WireError, match="pruned before"):
        algorithm.read(state, sent(three, (0, 1, 0), (0, 1, 0)))
    with pytest.raises(WireError, match="keeps 2 weights, not 1"):
        algorithm.read(state, sent(three, (1, 0, 1), (1, 0, 1)))


def test_a_union_of_all_weights_is_pruned_to_the_density_too():
    """Two clients keep one diagonal each of a 2 x 2 weight; of the means 2, 1, -1/2, 1.5 the first and the last are largest."""
    layout = Layout.of([Slot("w", (2, 2), Kind.WEIGHT, True, 0), Slot("b", (1,), Kind.BIAS, False, 0)])
    algorithm = SparsyFed(density=0.5, beta=1)
    state = algorithm.init(job_of(layout, clients=2))
    assert algorithm.finalize(state)[1].density == 1  # nobody answered yet
    apart = [sent(layout, (4, 0, 0, 3), (1, 0, 0, 1)), sent(layout, (0, 2, -1, 0), (0, 1, 1, 0))]
    state = algorithm.aggregate(state, [(c, algorithm.read(state, told(m, layout))) for c, m in enumerate(apart)])
    assert state.versions.masks.density == 1
    params, masks = algorithm.finalize(state)
    assert masks.kept.tolist() == [True, False, False, True]
    assert params.flat.tolist() == [2, 0, 0, 1.5, 0]


@pytest.mark.parametrize("beta", [1.0, 1.25])
def test_pruned_weights_stay_pruned_above_one(beta, digits, small):
    algorithm, unions = SparsyFed(density=0.1, beta=beta, final="union"), []
    for rounds in range(1, 5):
        engine = Engine(rounds=rounds, cohort=3, seed=1, eval_clients=0)
        start = small.initial("glorot", Streams(3))
        unions.append(fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine, start=start).masks)
    assert all(union.count > round(0.1 * small.layout.maskable) for union in unions[:1])
    shrinks = [later <= before for before, later in pairwise(unions)]
    assert all(shrinks) == (beta > 1)


def test_training_powers_is_what_the_client_does(digits, small):
    """One step of plain SGD with learning rate lr moves v by lr beta |v|^(beta - 1) g, so w to the power of that."""
    start, local = small.initial("glorot", Streams(3)), Local(epochs=1, batch=10_000, lr=0.1)
    executor, streams = Executor(small, local, 1), Streams(0).at(round=1, client=2)
    client = Client(2, executor, digits.train, digits.parts[2], digits.test, digits.shares[2], streams)
    algorithm = SparsyFed(density=1.0, beta=1.25)
    state = algorithm.init(Job(small, start, 1, 6, Streams(0)))
    reply, mine = algorithm.client_update(told(algorithm.broadcast(state, [2])[2], small.layout), client, None)
    assert isinstance(mine, Known)
    gradient = client.gradients(start, batches=None).maskable
    v = start.maskable.sign() * start.maskable.abs() ** 0.8
    v = v - 0.1 * 1.25 * v.abs() ** 0.25 * gradient
    expected = v.sign() * v.abs() ** 1.25
    torch.testing.assert_close(reply.values("weights", Masks.full(small.layout)).maskable, expected, rtol=1e-4, atol=1e-6)


# ---- shared


def test_a_state_may_hold_a_tensor_twice(three):
    params = Params(three, torch.ones(4))
    state = lotteryfl.State(params, params, {}, params.flat[1:3], 0)
    again = thaw(freeze(state), three, lotteryfl.__name__)
    assert same(again.params.flat, again.start.flat)
    assert again.held.tolist() == [1, 1]


@pytest.mark.parametrize("method", [snip, ssfl, sparsyfed])
def test_what_a_client_keeps_can_be_read_back(method, three):
    known = Known({1: Masks.full(three)})
    assert thaw(freeze(known), three, method.__name__).masks[1].density == 1


@pytest.mark.parametrize("algorithm", [Snip(density=0.2), Snip(density=0.2, score="grasp", clients=2), Ssfl(density=0.2)])
def test_set_ups_that_are_not_valid_end_no_run(algorithm, digits, small, monkeypatch):
    exchange = Sequential.exchange

    def hostile(self, requests):
        for client, reply in exchange(self, requests):
            bad = {0: b"", 1: reply[:-9], 2: pack(Message("setup", 1, small.layout, {})), 3: bytes(len(reply))}
            yield client, bad.get(client, reply) if unpack(reply, small.layout).kind == "setup" else reply

    monkeypatch.setattr(Sequential, "exchange", hostile)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=Engine(rounds=12, seed=5, eval_clients=0))
    assert result.masks.count == round(0.2 * small.layout.maskable)
    assert "setup" in result.rows[0]["phases"]
    assert result.rows[0]["lost"]
    assert not result.rows[-1]["lost"]
    asked = [row for row in result.rows if "setup" in row["phases"]]
    assert asked == result.rows[: len(asked)]
    assert all("train" not in row["phases"] for row in asked[:-1])  # no mask yet: nobody trains


@pytest.fixture(scope="module")
def federation():
    settings = Data(name="digits", clients=10, partition="dirichlet", alpha=1.0)
    data = federate(load(settings), settings, Streams(0))
    return data, build(Model(name="mlp", hidden=(64,)), data.shape, data.classes)


LEARNED = [
    pytest.param(Snip(density=0.2), 0.93, id="snip"),
    pytest.param(Snip(density=0.2, score="grasp"), 0.9, id="grasp"),
    pytest.param(Snip(density=0.2, score="synflow"), 0.9, id="synflow"),
    pytest.param(Snip(density=0.2, score="magnitude"), 0.9, id="magnitude"),
    pytest.param(Snip(density=0.2, score="random"), 0.85, id="random"),
    pytest.param(Ssfl(density=0.2), 0.93, id="ssfl"),
    pytest.param(OneShot(density=0.2), 0.93, id="oneshot"),
    pytest.param(OneShot(density=0.2, score="random", schedule="cubic"), 0.85, id="random-cubic"),
    pytest.param(LotteryFL(density=0.2), 0.75, id="lotteryfl"),
    pytest.param(SparsyFed(density=0.2), 0.9, id="sparsyfed"),
]


@pytest.mark.parametrize(("algorithm", "bar"), LEARNED)
def test_digits_are_learned_at_a_fifth_of_the_weights(algorithm, bar, federation):
    data, spec = federation
    local, engine = Local(epochs=2, batch=16, lr=0.1, momentum=0.5), Engine(rounds=20, cohort=5, seed=1)
    result = fit(algorithm, model=spec, data=data, local=local, engine=engine)
    assert result.accuracy > bar
    if getattr(algorithm, "promises", "exactly") == "exactly":
        assert result.masks.count == round(0.2 * spec.layout.maskable)


def test_tickets_do_better_at_their_clients_than_the_whole_model(federation):
    """After enough rounds every client has pruned to its density, and its own model is the better one for it."""
    settings = Data(name="digits", clients=10, partition="classes", per_client=2)
    data, spec = federate(load(settings), settings, Streams(0)), federation[1]
    local, engine = Local(epochs=2, batch=16, lr=0.1, momentum=0.5), Engine(rounds=30, cohort=5, seed=1)
    result = fit(LotteryFL(density=0.2), model=spec, data=data, local=local, engine=engine)
    assert result.rows[-1]["client_accuracy"]["mean"] > result.accuracy + 0.1
    assert result.rows[-1]["bytes_up"] < 0.35 * result.rows[0]["bytes_up"]


def test_ranking_by_layer_cuts_no_layer_off(federation):
    """A first layer that starts small loses all its weights in a ranking over the whole network, and gets none back."""
    data, spec = federation
    start = Params(spec.layout, spec.initial("glorot", Streams(0)).flat.clone())
    start["fc1.weight"].mul_(0.05)
    found = {
        ranking: fit(
            SparsyFed(density=0.05, ranking=ranking),
            model=spec,
            data=data,
            local=Local(batch=16, lr=0.05),
            engine=Engine(rounds=3),
            start=start,
        )
        for ranking in ("layer", "global")
    }
    assert all(result.masks.count == round(0.05 * spec.layout.maskable) for result in found.values())
    assert not found["global"].masks["fc1.weight"].any()
    assert found["global"].rows[0]["events"] == ["fc1.weight keeps none of its 4096 weights"]
    assert min(found["layer"].masks.densities().values()) > 0.04
