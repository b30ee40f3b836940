"""Values worked out by hand, or given with the published methods."""

import numpy as np
import pytest
import torch

from conftest import same
from fedsieve import (
    DataError,
    FedAvg,
    FedSparsify,
    Kind,
    Layout,
    Masks,
    Message,
    Model,
    Params,
    Slot,
    Streams,
    UsageError,
    WireError,
    build,
    pack,
    unpack,
)
from fedsieve.aggregate.mean import Votes, WeightedMean
from fedsieve.aggregate.optim import Moments, ServerOptim, step
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.fedavg import State
from fedsieve.local.executor import Trained
from fedsieve.local.optim import rate
from fedsieve.settings import Local
from fedsieve.sparsity.allocate import uniform
from fedsieve.sparsity.schedule import polynomial
from fedsieve.sparsity.select import select
from fedsieve.wire.sections import dense, number


def reply(layout, section, value, examples):
    return Message("train", 1, layout, {section: value, "examples": number(examples), "loss": number(0.5)})


# ---- FedAvg


def test_fedavg_of_two_clients_and_three_weights(three, vector):
    """Weights 1 and 3: w + (1 * u + 3 * v) / 4."""
    algorithm, start = FedAvg(), vector(three, 1, 2, 3, 0)
    state = State(start, Moments.start(algorithm.server, 4), 0)
    u, v = vector(three, 4, 0, -4, 8), vector(three, 0, 4, 4, 0)
    replies = [(0, reply(three, "update", dense(u), 1)), (1, reply(three, "update", dense(v), 3))]
    contents = [(client, algorithm.read(state, message)) for client, message in replies]
    assert algorithm.aggregate(state, contents).params.flat.tolist() == [2.0, 5.0, 5.0, 2.0]
    alike = FedAvg(weighting="uniform")
    contents = [(client, alike.read(state, message)) for client, message in replies]
    assert alike.aggregate(state, contents).params.flat.tolist() == [3.0, 4.0, 3.0, 4.0]


@pytest.mark.parametrize("examples", [0, -1, 2**48 + 1])
def test_impossible_example_counts_are_refused(three, vector, examples):
    with pytest.raises(WireError, match="examples"):
        FedAvg().read(None, reply(three, "update", dense(vector(three, 0, 0, 0, 0)), examples))


def test_mean_does_not_overflow_or_lose_small_terms(three):
    """Float64 sums: 10,000 clients with a tiny update beside one with a large one."""
    mean = WeightedMean(three)
    mean.add(Params(three, torch.tensor([1.0, 0, 0, 0])), 1e8)
    for _ in range(1000):
        mean.add(Params(three, torch.tensor([0.0, 1, 0, 0])), 1)
    assert mean.value().flat[1] == pytest.approx(1000 / (1e8 + 1000), rel=1e-6)


SERVER = {
    # after updates of +1 and then +1 with lr 0.1, decays 0.9 and 0.99, eps 1e-3 (v starts at 1e-6)
    "sgd": [0.1, 0.2],
    "momentum": [0.1, 0.1 + 0.19],
    "adagrad": [0.1 * 0.1 / (1.0000005 + 1e-3), None],
    "adam": [0.1 * 0.1 / ((0.99e-6 + 0.01) ** 0.5 + 1e-3), None],
    "yogi": [0.1 * 0.1 / ((1e-6 + 0.01) ** 0.5 + 1e-3), None],
}


@pytest.mark.parametrize("name", SERVER)
def test_server_optimisers_by_hand(name, three, vector):
    optim = ServerOptim(name=name, lr=0.1)
    params, moments = vector(three, 0, 0, 0, 0), Moments.start(optim, 4)
    for expected in SERVER[name]:
        params, moments = step(optim, params, vector(three, 1, 1, 1, 1), moments)
        if expected is not None:
            assert params.flat.tolist() == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.parametrize("name", SERVER)
def test_server_optimisers_only_average_statistics(name):
    layout = Layout.of([Slot("w", (1,), Kind.WEIGHT, True, 0), Slot("mean", (1,), Kind.BUFFER, False, 0)])
    optim = ServerOptim(name=name, lr=0.01)
    start, update = Params(layout, torch.tensor([0.0, 5.0])), Params(layout, torch.tensor([1.0, 2.0]))
    moved, _ = step(optim, start, update, Moments.start(optim, 1))
    assert moved["mean"].item() == 7.0
    assert moved["w"].item() != 1.0


# ---- schedules and selection


def test_cubic_schedule_of_fedsparsify():
    """Check values for final sparsity 0.95 over 200 rounds."""
    expected = {1: 0.0, 2: 0.0142, 10: 0.1232, 25: 0.3039, 50: 0.5431, 100: 0.8295, 150: 0.9349, 200: 0.95}
    for t, sparsity in expected.items():
        assert 1 - polynomial(t, first=1, last=200, start=1.0, end=0.05) == pytest.approx(sparsity, abs=5e-5)


def test_schedule_steps_every_so_many_rounds():
    by_five = [polynomial(t, first=1, last=20, start=1.0, end=0.1, every=5) for t in range(1, 21)]
    assert by_five[:4] == [1.0] * 4
    assert len(set(by_five)) == 5
    assert by_five[-1] == pytest.approx(0.1)
    assert by_five == sorted(by_five, reverse=True)


def test_learning_rates_over_the_rounds():
    cosine = [rate(Local(lr=0.4, schedule="cosine"), t, 4) for t in (1, 2, 3, 4)]
    assert cosine == pytest.approx([0.4, 0.4 * 0.8535534, 0.2, 0.4 * 0.1464466])
    assert rate(Local(lr=0.4, schedule="exponential", decay=0.5), 3, 9) == pytest.approx(0.1)
    assert rate(Local(lr=0.4), 7, 9) == 0.4


def test_selection_keeps_the_largest_and_draws_among_equals(three):
    full = Masks.full(three)
    kept = select(torch.tensor([0.3, 0.1, 0.2]), 2, within=full, ties=Streams(0)("t")).kept
    assert kept.tolist() == [True, False, True]
    drawn = {tuple(select(torch.ones(3), 2, within=full, ties=Streams(s)("t")).kept.tolist()) for s in range(40)}
    assert len(drawn) == 3


def test_uniform_allocation_adds_up():
    layout = Layout.of([Slot(f"w{n}", (n,), Kind.WEIGHT, True, 0) for n in (3, 5, 7)])
    assert uniform(layout, 7) == {"w3": 2, "w5": 2, "w7": 3}  # 1.4, 2.33 and 3.27: the largest remainder gets the last one
    for keep in range(16):
        counts = uniform(layout, keep)
        assert sum(counts.values()) == keep
        assert all(abs(counts[f"w{n}"] - keep * n / 15) < 1 for n in (3, 5, 7))


# ---- FedSparsify


@pytest.mark.parametrize(("voters", "repo", "majority"), [(1, 0, 1), (2, 1, 2), (3, 1, 2), (10, 5, 6)])
def test_votes_that_keep_a_weight(three, voters, repo, majority):
    """Published code: floor(n / 2); majority: floor(n / 2) + 1. What nobody kept is zero, so it is gone either way."""
    assert voters // 2 == repo
    for vote, needed in (("repo", repo), ("majority", majority)):
        algorithm = FedSparsify(variant="local", vote=vote, density=0.5)
        spec = type("Spec", (), {"layout": three})
        state = algorithm.init(Job(spec, Params(three, torch.ones(4)), 3, max(2, voters), Streams(0)))
        for yes in range(voters + 1):
            contents = []
            for voter in range(voters):
                kept = torch.tensor([True, voter < yes, False])
                contents.append((voter, (Params(three, torch.ones(4)).under(Masks(three, kept)), Masks(three, kept), 1.0)))
            masks = algorithm.aggregate(state, contents).masks
            assert masks.kept.tolist() == [True, yes >= max(1, needed), False]


def test_zeros_of_those_who_purged_are_averaged_in(three):
    algorithm = FedSparsify(variant="local", density=0.5)
    state = algorithm.init(Job(type("Spec", (), {"layout": three}), Params(three, torch.ones(4)), 3, 3, Streams(0)))
    votes = ([True, True, True], [True, True, False], [True, False, True])
    contents = []
    for voter, kept in enumerate(votes):
        masks = Masks(three, torch.tensor(kept))
        contents.append((voter, (Params(three, torch.full((4,), 3.0)).under(masks), masks, 1.0)))
    assert algorithm.aggregate(state, contents).params.flat.tolist() == [3.0, 2.0, 2.0, 3.0]


def test_votes_count(three):
    votes = Votes(three)
    for kept in ([1, 1, 0], [1, 0, 0]):
        votes.add(Masks(three, torch.tensor(kept, dtype=torch.bool)))
    assert votes.at_least(2).kept.tolist() == [True, False, False]
    assert votes.voters == 2


@pytest.mark.parametrize("variant", ["global", "local"])
def test_saving_of_fedsparsify_lies_between_the_published_bounds(variant):
    """Real payloads of 40 rounds to density 0.05: 2.98 with a full map in each direction, 3.27 for the values alone."""
    spec = build(Model(name="mlp"), (1, 28, 28), 10)
    layout = spec.layout
    algorithm = FedSparsify(variant=variant, density=0.05)
    state = algorithm.init(Job(spec, spec.initial("glorot", Streams(0)), 40, 2, Streams(0)))
    carried, mine = 0, None
    for t in range(1, 41):
        payload = pack(algorithm.broadcast(state, [0])[0])
        client = Untrained(layout, rounds=40, round=t)
        message, mine = algorithm.client_update(unpack(payload, layout), client, mine)
        answer = pack(message)
        carried += len(payload) + len(answer)
        state = algorithm.aggregate(state, [(0, algorithm.read(state, unpack(answer, layout)))])
    assert state.masks.count == round(0.05 * layout.maskable)
    saving = 40 * 2 * 4 * layout.size / carried
    if variant == "global":
        assert 2.98 < saving < 3.27
    else:  # the client sends its weights after the purge, so a round's uplink is one step sparser
        assert 3.1 < saving < 3.6


class Untrained:
    """A client whose training changes nothing but adds noise, to exercise messages without the cost of training."""

    def __init__(self, layout, rounds, round):
        self.layout, self.rounds, self.id = layout, rounds, 0
        self.stream = Streams(0, round=round, client=0)
        self.examples = 1

    def train(self, params, masks=None, momentum=None, **_):
        noise = torch.from_numpy(self.stream("noise").uniform(self.layout.size) - 0.5).float() * 1e-3
        moved = Params(self.layout, params.flat + noise)
        return Trained(moved.under(masks), 1, 0.0, None, 1)


def test_a_client_that_missed_rounds_pays_for_what_it_lacks():
    """Client 1 takes part in rounds 1 and 4; its reply of round 4 is lost; in round 5 the server builds on round 1 again."""
    spec = build(Model(name="mlp"), (1, 28, 28), 10)
    layout, algorithm = spec.layout, FedSparsify(density=0.05)
    state = algorithm.init(Job(spec, spec.initial("glorot", Streams(0)), 8, 2, Streams(0)))
    mine, sizes = {}, {}
    for t in range(1, 7):
        cohort = [0, 1] if t in (1, 4, 5, 6) else [0]
        requests = algorithm.broadcast(state, cohort)
        contents = []
        for client in cohort:
            request = unpack(pack(requests[client]), layout)
            sizes[t, client] = len(request.sections["mask"].body)
            message, mine[client] = algorithm.client_update(request, Untrained(layout, 8, t), mine.get(client))
            assert mine[client].masks[t].kept.equal(state.masks.kept)
            if (t, client) != (4, 1):
                contents.append((client, algorithm.read(state, unpack(pack(message), layout))))
        state = algorithm.aggregate(state, contents)
    assert sizes[4, 1] > sizes[4, 0]
    assert sizes[5, 1] > sizes[5, 0]
    assert sizes[6, 1] == sizes[6, 0]
    assert len(mine[1].masks) == 2


def test_a_client_without_the_mask_that_the_server_builds_on_says_so():
    spec = build(Model(name="mlp", hidden=(8,)), (4,), 3)
    algorithm = FedSparsify(density=0.5)
    state = algorithm.init(Job(spec, spec.initial("glorot", Streams(0)), 4, 1, Streams(0)))
    client = Untrained(spec.layout, 4, 1)
    message, _ = algorithm.client_update(unpack(pack(algorithm.broadcast(state, [0])[0]), spec.layout), client, None)
    state = algorithm.aggregate(state, [(0, algorithm.read(state, unpack(pack(message), spec.layout)))])
    with pytest.raises(DataError, match="does not hold the mask of round 1"):
        algorithm.client_update(unpack(pack(algorithm.broadcast(state, [0])[0]), spec.layout), client, None)


def test_masks_only_shrink_and_are_those_of_the_schedule():
    spec = build(Model(name="mlp", hidden=(32,)), (20,), 5)
    for ranking in ("global", "layer"):
        algorithm = FedSparsify(density=0.1, ranking=ranking)
        state = algorithm.init(Job(spec, spec.initial("glorot", Streams(1)), 10, 1, Streams(1)))
        mine = None
        for t in range(1, 11):
            before = state.masks
            message, mine = algorithm.client_update(algorithm.broadcast(state, [0])[0], Untrained(spec.layout, 10, t), mine)
            state = algorithm.aggregate(state, [(0, algorithm.read(state, message))])
            assert state.masks <= before
            wanted = polynomial(t, first=1, last=10, start=1.0, end=0.1)
            assert state.masks.count == round(wanted * spec.layout.maskable)
            if ranking == "layer":
                assert max(state.masks.densities().values()) - min(state.masks.densities().values()) < 0.01
            assert same(np.flatnonzero(state.params.maskable != 0), np.flatnonzero(state.masks.kept))


def test_all_trained_tensors_can_be_ranked_as_in_the_published_code():
    spec = build(Model(name="mlp", maskable="all"), (1, 28, 28), 10)
    assert spec.layout.maskable == spec.layout.trainable == 118_282
    assert build(Model(name="mlp"), (1, 28, 28), 10).layout.maskable == 118_282 - 266


def test_a_schedule_without_a_round_to_purge_in_is_refused(three):
    job = Job(type("Spec", (), {"layout": three}), Params(three, torch.ones(4)), 1, 1, Streams(0))
    with pytest.raises(UsageError, match=r"engine\.rounds = 1"):
        FedSparsify().init(job)
