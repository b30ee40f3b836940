"""Masks over frozen random weights: HideNseek, FedMask, FedPM."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import same
from fedsieve import (
    Data,
    DataError,
    Engine,
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
from fedsieve.aggregate.mean import SignVotes
from fedsieve.algorithms.base import Job, counts
from fedsieve.algorithms.fedmask import FedMask
from fedsieve.algorithms.fedpm import FedPM, _scores
from fedsieve.algorithms.hidenseek import HideNSeek
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.handle import Device, Plan, handle
from fedsieve.local.executor import Client, Executor
from fedsieve.models import drawn
from fedsieve.models.flow import pruned
from fedsieve.models.frozen import Parts, bounds, frozen, scores
from fedsieve.reparam.bernoulli import BernoulliMask
from fedsieve.reparam.sign import SignMask
from fedsieve.wire.bits import Reason
from fedsieve.wire.sections import integers, mask, number, seed, signs, vector
from fedsieve.wire.shares import read_shares, shares

pytestmark = pytest.mark.usefixtures("one_thread")
LOCAL = Local(batch=16, lr=0.1)


def job(spec, clients=6):
    return Job(spec, spec.initial("glorot", Streams(3)), 5, clients, Streams(3))


def sent(message, layout):
    """A message as it arrives."""
    return unpack(pack(message), layout)


class Federation:
    """A few clients played by hand, over the wire."""

    def __init__(self, algorithm, spec, data, local=LOCAL):
        self.algorithm, self.spec = algorithm, spec
        self.device = Device(Plan(algorithm, spec, data, local, 5, 3))
        self.state, self.mine = algorithm.init(job(spec, len(data.parts))), {}

    def play(self, cohort, lost=(), tamper=lambda client, message: message):
        """Play a round; return the requests and the replies, unpacked."""
        requests, replies = {}, {}
        for client, message in self.algorithm.broadcast(self.state, cohort).items():
            payload = pack(tamper(client, message))
            requests[client] = unpack(payload, self.spec.layout)
            reply, kept = handle(self.device, client, payload, self.mine.get(client))
            if kept is not None:
                self.mine[client] = kept
            replies[client] = unpack(reply, self.spec.layout)
        read = [(c, self.algorithm.read(self.state, reply)) for c, reply in replies.items() if c not in lost]
        self.state = self.algorithm.aggregate(self.state, iter(read))
        return requests, replies


# ---- the frozen network


def test_weights_are_those_of_the_seed_and_constants_have_the_signs_that_were_drawn(small):
    weights, constant = frozen(small, 7), frozen(small, 7, "constant", gain=3.0)
    assert same(weights.flat, frozen(small, 7).flat)
    assert not same(weights.flat, frozen(small, 8).flat)
    for slot in small.layout.masked_slots:
        assert same(constant[slot.name].sign(), weights[slot.name].sign())
        np.testing.assert_allclose(constant[slot.name].abs(), 3 / sqrt(slot.shape[1]), rtol=1e-6)
    assert not constant.dense.any()


def test_pruning_by_flow_does_not_depend_on_signs_and_keeps_the_count():
    spec = build(Model(name="mlp", hidden=(20, 12)), (30,), 5)
    weights = frozen(spec, 1)
    flipped = Params(spec.layout, weights.flat * torch.where(torch.arange(len(weights.flat)) % 3 == 0, -1.0, 1.0))
    for scope in ("global", "layer"):
        for head in (False, True):
            rule = {"scope": scope, "steps": 7, "floor": 3, "head": head}
            first, second = (pruned(spec, each, 200, ties=Streams(0)("t"), **rule) for each in (weights, flipped))
            assert same(first.kept, second.kept)
            assert first.count == 200
            shares = list(first.densities().values())
            assert min(int(first[slot.name].sum()) for slot in spec.layout.masked_slots) >= 3
            if head:
                assert shares.pop() == 1
            if scope == "layer":
                assert max(shares) - min(shares) < 0.02


def test_networks_that_masks_cannot_be_over_are_refused_before_round_1():
    batch = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    for algorithm in (HideNSeek(), FedMask(), FedPM()):
        with pytest.raises(UsageError, match=r"model\.norm"):
            algorithm.init(job(ModelSpec.of(batch, torch.zeros(1, 1, 8, 8))))
        with pytest.raises(UsageError, match=r"model\.maskable"):
            algorithm.init(job(build(Model(name="mlp", maskable="all"), (4,), 3)))
        with pytest.raises(UsageError, match="no maskable weight"):
            algorithm.init(job(build(Model(name="mlp", hidden=(4,), dense=("fc1.weight", "fc2.weight")), (4,), 3)))
        algorithm.init(job(build(Model(name="resnet8", norm="group"), (1, 16, 16), 3)))
    with pytest.raises(UsageError, match="reads tokens"):
        HideNSeek().init(job(build(Model(name="charlstm"), (5,), 30, tokens=True)))
    spec = build(Model(name="mlp", hidden=(16,)), (64,), 10)
    with pytest.raises(UsageError, match="are the head's"):
        HideNSeek(density=0.1, exclude_head=True).init(job(spec))
    with pytest.raises(UsageError, match=r"algorithm\.density"):
        HideNSeek(density=1e-9).init(job(spec))


# ---- shares on the wire


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 16))
def test_shares_come_back_within_half_a_cell_and_on_their_side_of_a_half(numbers, bits):
    layout = build(Model(name="mlp", hidden=(4,)), (4,), 3).layout
    given_ = torch.tensor([*numbers, 0.5, SignVotes.BELOW])
    found = read_shares(sent(Message("train", 1, layout, {"s": shares(given_, bits)}), layout), "s", bits, len(given_))
    assert same(found, given_) if not bits else float((found - given_).abs().max()) <= 2.0 ** -(bits + 1) + 1e-7
    assert same(found >= 0.5, given_ >= 0.5)


@pytest.mark.parametrize(
    ("bits", "section", "reason"),
    [
        (2, integers([0, 4]), Reason.RANGE),
        (2, integers([-1, 3]), Reason.RANGE),
        (2, integers([1, 2, 3]), Reason.COUNT),
        (0, vector(torch.tensor([0.5, 1.5])), Reason.RANGE),
        (0, vector([0.5, 0.5]), Reason.COUNT),
        (0, integers([0, 1]), Reason.SECTION),
    ],
)
def test_shares_that_are_none_are_refused(three, bits, section, reason):
    with pytest.raises(WireError) as found:
        read_shares(Message("train", 1, three, {"s": section}), "s", bits, 2)
    assert found.value.reason is reason


# ---- HideNseek


def test_votes_of_signs_by_hand():
    """Votes of weights 1, 2 and 1: + - +, - - -, - + + and the signs before."""
    votes = SignVotes(3)
    for each, share in (([1, -1, 1], 1.0), ([-1, -1, 1], 2.0), ([-1, 1, -1], 1.0)):
        votes.add(torch.tensor(each, dtype=torch.int8), share)
    merged, share = votes.value(torch.tensor([True, True, False]))
    assert merged.tolist() == [False, False, True]
    assert share.tolist() == [0.25, 0.25, 0.75]
    tie = SignVotes(2)
    for each in (1, -1):
        tie.add(torch.tensor([each, each], dtype=torch.int8), 5.0)
    merged, share = tie.value(torch.tensor([True, False]))
    assert merged.tolist() == [True, False]
    assert share[0] == 0.5 > share[1] > 0.4999999


def test_a_tie_keeps_the_sign_that_was_merged_before(small):
    algorithm = HideNSeek(density=0.2, weighting="uniform")
    state = algorithm.init(job(small))
    n = len(state.signs)
    plus, minus = (torch.full((n,), each, dtype=torch.int8) for each in (1, -1))
    none = torch.zeros(0)
    same_again = algorithm.aggregate(state, [(0, (plus, none, 1.0, 0)), (1, (minus, none, 1.0, 0))])
    assert same(same_again.signs, state.signs)
    down = algorithm.aggregate(same_again, [(0, (minus, none, 1.0, 0))])
    assert not down.signs.any()
    assert not algorithm.aggregate(down, [(0, (plus, none, 1.0, 0)), (1, (minus, none, 1.0, 0))]).signs.any()
    params, masks = algorithm.finalize(down)
    assert torch.equal(params.maskable, -state.params.maskable)
    assert masks.count == n == round(0.2 * small.layout.maskable)


def test_a_round_costs_a_bit_for_each_kept_weight_and_the_first_request_no_more_than_a_seed(digits):
    """Also with 64 hidden units, where signs take more bytes than headers."""
    spec = build(Model(name="mlp", hidden=(64,)), digits.shape, digits.classes)
    play = Federation(HideNSeek(density=0.2), spec, digits)
    kept = round(0.2 * spec.layout.maskable)
    for round_ in range(1, 4):
        requests, replies = play.play([0, 1] if round_ < 3 else [0, 1, 4])
        for client, request in requests.items():
            first = round_ == 1 or (round_ == 3 and client == 4)
            size = len(pack(request)) - (len(request.sections["signs"].body) if "signs" in request.sections else 0)
            assert size < (100 if first else 60)
            assert ("seed" in request.sections, "signs" in request.sections) == (first, round_ > 1)
            assert "mask" not in request.sections
            assert kept / 8 <= len(pack(replies[client])) <= kept / 8 + 100


@pytest.mark.parametrize("options", [{}, {"merge": "mean", "bits": 4}, {"others": "biases"}])
def test_a_client_whose_hash_is_another_says_so_and_is_sent_the_mask(options, digits, small):
    play = Federation(HideNSeek(density=0.2, **options), small, digits)

    def tamper(client, message):
        if client != 1:
            return message
        return replace(message, sections=dict(message.sections) | {"digest": seed(12345)})

    before = play.state
    requests, replies = play.play([0, 1, 2], tamper=tamper)
    assert replies[1].kind == "setup"
    assert set(replies[1].sections) == {"lacks"}
    assert 1 not in play.mine
    without = HideNSeek(density=0.2, **options)
    others = [(c, without.read(before, replies[c])) for c in (0, 2)]
    assert same(without.aggregate(before, others).signs, play.state.signs)  # it counted as not taking part
    requests, replies = play.play([0, 1, 2])
    assert {client for client, request in requests.items() if "mask" in request.sections} == {1}
    assert {reply.kind for reply in replies.values()} == {"train"}
    assert same(requests[1].mask("mask").kept, play.state.network.masks.kept)
    requests, _ = play.play([0, 1, 2])
    assert not any({"mask", "seed"} & set(request.sections) for request in requests.values())


def test_all_clients_may_need_the_mask_and_the_run_goes_on(digits, small, monkeypatch):
    """Every client prunes otherwise than the server, as on another processor: round 1 is lost, the rest is as ever."""
    algorithm, asked = HideNSeek(density=0.2), []
    usual = HideNSeek._pruned

    def other(self, spec, word):
        masks = usual(self, spec, word)
        if asked:
            return Masks(masks.layout, masks.kept.roll(1))
        asked.append(word)
        return masks

    engine = Engine(rounds=4, eval_clients=6)
    monkeypatch.setattr(HideNSeek, "_pruned", other)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine)
    monkeypatch.undo()
    told = fit(HideNSeek(density=0.2, sent="mask"), model=small, data=digits, local=LOCAL, engine=engine)
    plain = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine)
    assert [row["examples"] > 0 for row in result.rows] == [False, True, True, True]
    assert ["masks" in row["phases"] for row in result.rows] == [False, True, False, False]
    assert "setup" in result.rows[0]["phases"]
    assert not any(row["lost"] for row in result.rows)
    assert result.rows[0]["client_accuracy"] is not None
    assert same(told.params.flat, plain.params.flat)
    assert ["masks" in row["phases"] for row in told.rows] == [True, False, False, False]


def test_a_client_prunes_once_and_one_that_lost_what_it_kept_asks_for_the_seed(digits, small, monkeypatch):
    play, calls = Federation(HideNSeek(density=0.2), small, digits), []
    usual = HideNSeek._pruned
    monkeypatch.setattr(HideNSeek, "_pruned", lambda self, spec, word: calls.append(word) or usual(self, spec, word))
    play.play([0, 1], lost=[1])
    requests, _ = play.play([0, 1])
    assert ["seed" in requests[client].sections for client in (0, 1)] == [False, True]  # the reply of 1 was lost
    assert len(calls) == 2
    del play.mine[0]
    _, replies = play.play([0, 1])
    assert replies[0].kind == "setup"
    requests, replies = play.play([0, 1])
    assert ["seed" in requests[client].sections for client in (0, 1)] == [True, False]
    assert replies[0].kind == "train"
    assert len(calls) == 3


def test_other_weights_than_the_servers_are_an_error_of_the_client(digits, small):
    play = Federation(HideNSeek(density=0.2, sent="mask"), small, digits)
    message = play.algorithm.broadcast(play.state, [0])[0]
    message = replace(message, sections=dict(message.sections) | {"digest": seed(1)})
    with pytest.raises(DataError, match="other ones"):
        handle(play.device, 0, pack(message), None)


@pytest.mark.parametrize("lacks", [0, 3, -1, 1.5])
def test_a_client_cannot_lack_anything_else(small, lacks):
    algorithm = HideNSeek(density=0.2)
    with pytest.raises(WireError, match="lacks"):
        algorithm.read(algorithm.init(job(small)), Message("setup", 1, small.layout, {"lacks": number(lacks)}))
    assert drawn.read_lack(Message("setup", 1, small.layout, {"lacks": number(2)})) == drawn.MASK


def test_clients_start_from_what_was_merged(digits, small):
    """Vote: bound times sign. Mean: bound times 2 p - 1. Logit: bound times its arctanh. The bound is Xavier's over 2."""
    n = round(0.2 * small.layout.maskable)
    p = torch.linspace(0.0, 1.0, n)
    expected = {"vote": torch.where(p >= 0.5, 1.0, -1.0), "mean": 2 * p - 1}
    expected["logit"] = (2 * p - 1).clamp(-0.99, 0.99).atanh()
    for merge, size in expected.items():
        algorithm = HideNSeek(density=0.2, merge=merge, bits=0, restart="bound")
        state = replace(algorithm.init(job(small)), merges=1, signs=p >= 0.5, shares=p)
        held = drawn.Held(state.network.seed, state.network.masks)
        message = sent(algorithm.broadcast(state, [0])[0], small.layout)
        start = algorithm._start(message, state.params, held)
        at = state.network.masks.kept
        torch.testing.assert_close(start.maskable[at], 0.5 * bounds(small.layout)[at] * size)
        assert not start.maskable[~at].any()
        loose = replace(algorithm, restart="drawn")
        between = loose._start(message, state.params, held).maskable[at]
        assert same(between.sign(), start.maskable[at].sign())
        assert bool((between.abs() <= start.maskable[at].abs()).all())
        later = loose._start(replace(message, round=9), state.params, held).maskable[at]
        assert not same(later, between)
        assert bool((later.abs() <= start.maskable[at].abs()).all())


def test_signs_before_the_first_round_are_drawn_or_those_of_the_weights(small):
    keep, drawn_ = (HideNSeek(density=0.2, start=start) for start in ("keep", "random"))
    state = keep.init(job(small))
    assert state.signs.all()
    assert same(keep.finalize(state)[0].maskable, state.params.maskable)
    share = float(drawn_.init(job(small)).signs.float().mean())
    assert 0.3 < share < 0.7
    own = scores(small.layout, 5, bounds(small.layout))
    assert bool((own.abs() <= bounds(small.layout)).all())
    assert same(own, scores(small.layout, 5, bounds(small.layout)))
    assert float(bounds(small.layout)[0]) == pytest.approx(sqrt(6 / 80))


def test_ordinary_numbers_beside_signs_take_steps_of_the_local_rate(digits, small):
    """One step on all examples: head and biases move by local.lr times their gradient, though signs have their own rate."""
    local = Local(batch=1000, lr=0.25)
    algorithm = HideNSeek(density=0.5, exclude_head=True, others="biases", lr=2.0)
    play = Federation(algorithm, small, digits, local)
    masks, layout = play.state.network.masks, small.layout
    assert masks["fc2.weight"].all()
    assert masks.count == round(0.5 * layout.maskable)
    parts = Parts.of(masks, "biases", head=True)
    assert int(parts.ordinary.sum()) == 160 + 26
    assert int(parts.signed.kept.sum()) == masks.count - 160
    requests, replies = play.play([2])
    assert len(requests[2].sections) == 2
    executor = Executor(small, local, 5)
    streams = Streams(3).at(round=1, client=2)
    nobody = np.arange(0)
    client = Client(2, executor, digits.train, digits.parts[2], digits.test, nobody, streams)
    before = algorithm.finalize(algorithm.init(job(small)))[0]
    gradient = client.gradients(before, masks, batches=None, training=True)
    moved = before.trainable - 0.25 * gradient.trainable
    torch.testing.assert_close(replies[2].vector("numbers"), moved[parts.ordinary], rtol=1e-5, atol=1e-6)
    assert same(algorithm.finalize(play.state)[0].trainable[parts.ordinary], replies[2].vector("numbers"))
    frozen_still = torch.ones(layout.trainable, dtype=torch.bool)
    frozen_still[parts.learned] = False
    assert same(play.state.params.trainable[frozen_still], before.trainable[frozen_still])
    bad = replies[2].reply(**dict(replies[2].sections) | {"numbers": vector(torch.zeros(3))})
    with pytest.raises(WireError, match="3 numbers"):
        algorithm.read(play.state, bad)


def test_a_stateful_client_goes_on_from_its_own_signs_and_is_evaluated_with_them(digits, small):
    algorithm = HideNSeek(density=0.5, memory="stateful", own=1.0)
    play = Federation(algorithm, small, digits)
    for _ in range(3):
        play.play([0, 1])
    mine = thaw(play.mine[0], small.layout, type(algorithm).__module__)
    asked = algorithm.evaluation(play.state, [0, 1, 5], 0)
    assert asked[0] is asked[1]
    assert "mask" in asked[5].sections
    assert "mask" not in asked[0].sections
    weights = frozen(small, mine.network.seed).under(mine.network.masks)
    flat = weights.flat.clone()
    at = mine.network.masks.kept.nonzero().squeeze(1)
    flat[at] = torch.where(mine.learned >= 0, flat[at], -flat[at])
    own, merged = (
        play.device.executor.evaluate(params, digits.test, digits.shares[0])
        for params in (Params(small.layout, flat), algorithm.finalize(play.state)[0])
    )
    assert own != merged

    def answered(client, kept):
        reply, left = handle(play.device, client, pack(asked[client]), kept)
        assert left is None
        return counts(unpack(reply, small.layout))[0]

    assert answered(0, play.mine[0]) == own
    none = freeze(replace(mine, learned=None))
    assert answered(0, none) == merged
    assert answered(5, None) == play.device.executor.evaluate(algorithm.finalize(play.state)[0], digits.test, digits.shares[5])
    # own = 1: the next round begins with what the client learned, whatever was merged
    changed = replace(play.state, signs=~play.state.signs)
    payloads = [pack(algorithm.broadcast(state, [0])[0]) for state in (play.state, changed)]
    assert handle(play.device, 0, payloads[0], play.mine[0])[0] == handle(play.device, 0, payloads[1], play.mine[0])[0]
    assert handle(play.device, 0, payloads[0], none)[0] != handle(play.device, 0, payloads[1], none)[0]


def test_more_epochs_at_an_evaluation_train_signs(digits, small):
    algorithm = HideNSeek(density=0.9)
    play = Federation(algorithm, small, digits)
    play.play([0, 1])
    request = algorithm.evaluation(play.state, [0], 3)[0]
    found = counts(unpack(handle(play.device, 0, pack(request), play.mine[0])[0], small.layout), 2)
    assert len(found) == 2
    assert found[0] != found[1]


# ---- FedMask


def kept(layout, *positions):
    bits = torch.zeros(layout.maskable, dtype=torch.bool)
    bits[list(positions)] = True
    return Masks(layout, bits)


def test_fedmask_averages_where_masks_overlap_and_leaves_the_rest_to_each_client(small):
    """Weight 0: all keep it. 1: two of three. 2: one of three. 3: nobody. 4: two, but of less weight than the third."""
    layout = small.layout
    algorithm = FedMask()
    state = algorithm.init(job(small))
    replies = [(0, (kept(layout, 0, 1, 4), 1.0)), (1, (kept(layout, 0, 1, 2), 1.0)), (2, (kept(layout, 0, 4), 1.0))]
    state = algorithm.aggregate(state, replies)
    assert state.common[:5].tolist() == [True, True, False, False, True]
    assert state.masks.kept[:5].tolist() == [True, True, False, False, True]
    state = algorithm.aggregate(state, [(c, (m, 5.0 if c == 1 else w)) for c, (m, w) in replies])
    assert state.masks.kept[:5].tolist() == [True, True, True, False, False]
    requests = algorithm.broadcast(state, [0, 1, 2, 5])
    masks = {client: requests[client].mask("mask").kept[:5].tolist() for client in requests}
    assert masks[0] == [True, True, False, False, False]  # 4 was outvoted, 2 is not its own
    assert masks[1] == [True, True, True, False, False]  # 2 is its own
    assert masks[2] == [True, True, False, False, False]
    assert masks[5] == [True, True, True, False, False]  # never took part: the mask of most
    everywhere = FedMask(merge="all")
    state = everywhere.aggregate(everywhere.init(job(small)), replies)
    assert not state.sent
    assert state.common.all()
    assert len({id(message) for message in everywhere.broadcast(state, [0, 1, 2]).values()}) == 1
    lonely = FedMask(overlap=1)
    assert lonely.aggregate(lonely.init(job(small)), replies).common[:4].tolist() == [True, True, True, False]


@pytest.mark.parametrize("density", [None, 0.2])
def test_masks_cost_at_most_a_bit_a_weight_both_ways(density, digits, small):
    least = small.layout.maskable / 8
    for algorithm in (FedMask(density=density), FedPM(density=density, bits=1)):
        play = Federation(algorithm, small, digits)
        requests, replies = play.play([0, 1])
        assert all(len(pack(request)) < 60 for request in requests.values())
        for message in [*replies.values(), *play.play([0, 1, 2])[0].values()]:
            assert least / 2 < len(pack(message)) <= least + 100


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_mask_of_the_best_scores_is_where_the_shifted_scores_are_not_negative(small, scope):
    algorithm, layout = FedMask(density=0.2, scope=scope), small.layout
    values = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, layout.maskable)).float()
    masks, shifted = algorithm._kept(layout, values, Streams(0)("t"))
    assert masks.count == round(0.2 * layout.maskable)
    assert same(shifted >= 0, masks.kept)
    order = values[masks.kept].min() >= values[~masks.kept].max()
    assert bool(order) == (scope == "global")
    if scope == "layer":
        assert max(masks.densities().values()) - min(masks.densities().values()) < 0.01


def test_fedmask_takes_up_its_scores_where_its_bits_are_still_its_own(digits, small):
    """With a rate of almost 0 the reply is the mask of the request, and scores of bits that agree stay."""
    algorithm = FedMask(lr=1e-9)
    play = Federation(algorithm, small, digits)
    _, replies = play.play([0])
    assert same(replies[0].mask("mask").kept, play.state.masks.kept)
    asked = kept(small.layout, *range(0, small.layout.maskable, 3))
    request = Message("train", 2, small.layout, {"seed": seed(play.state.seed), "mask": mask(asked)})
    reply, after = handle(play.device, 0, pack(request), play.mine[0])
    assert same(unpack(reply, small.layout).mask("mask").kept, asked.kept)
    old, new = (thaw(each, small.layout, type(algorithm).__module__).scores for each in (play.mine[0], after))
    agreed = (old >= 0) == asked.kept
    torch.testing.assert_close(old[agreed], new[agreed])
    torch.testing.assert_close(old[~agreed], -new[~agreed])


def test_fedmask_is_evaluated_with_the_mask_that_a_client_would_start_from(digits, small):
    for algorithm in (FedMask(), FedMask(merge="all")):
        play = Federation(algorithm, small, digits)
        for _ in range(2):
            play.play([0, 1, 2])
        asked, started = algorithm.evaluation(play.state, [0, 5], 1), algorithm.broadcast(play.state, [0, 5])
        weights = frozen(small, play.state.seed)
        for client in (0, 5):
            masks = started[client].mask("mask")
            assert (client == 0 and algorithm.merge == "overlap") != same(masks.kept, play.state.masks.kept)
            reply = handle(play.device, client, pack(asked[client]), play.mine.get(client))[0]
            found = counts(unpack(reply, small.layout), 2)
            assert found[0] == play.device.executor.evaluate(weights.under(masks), digits.test, digits.shares[client], masks)
            assert found[1] != found[0]


def test_the_sparsity_term_presses_on_late_layers_most(small):
    penalty = FedMask(penalty=0.4)._penalty(small.layout)
    assert penalty.unique().tolist() == pytest.approx([0.2, 0.4])
    assert float(penalty[0]) == pytest.approx(0.2)
    assert FedMask()._penalty(small.layout) is None


def test_penalties_make_masks_sparser(digits, small):
    for cls, much in ((FedMask, 0.02), (FedPM, 0.02)):
        runs = [
            fit(cls(penalty=penalty), model=small, data=digits, local=LOCAL, engine=Engine(rounds=4, eval_clients=0))
            for penalty in (0.0, much)
        ]
        assert runs[1].density < 0.9 * runs[0].density


# ---- FedPM


def test_the_mode_of_the_posterior_is_the_mean_of_the_masks(small):
    layout, algorithm = small.layout, FedPM(weighting="uniform")
    masks = [kept(layout, 0, 1), kept(layout, 0), kept(layout, 0, 2), kept(layout, 0)]
    replies = [(client, (each, 1.0)) for client, each in enumerate(masks)]
    state = algorithm.aggregate(algorithm.init(job(small)), replies)
    assert same(state.probabilities, torch.stack([each.kept.float() for each in masks]).mean(0))
    ones, n = state.ones, 4
    alpha, beta = 1 + ones, 1 + n - ones
    torch.testing.assert_close(state.probabilities.double(), (alpha - 1) / (alpha + beta - 2))
    mean = FedPM(estimate="mean")
    assert mean.aggregate(mean.init(job(small)), replies).probabilities[:4].tolist() == pytest.approx(
        [5 / 6, 2 / 6, 2 / 6, 1 / 6]
    )
    again = algorithm.aggregate(state, replies[1:2])
    assert again.probabilities[:4].tolist() == [1, 0, 0, 0]  # the prior was reset
    longer = FedPM(reset=2)
    state = longer.aggregate(longer.init(job(small)), replies)
    state = longer.aggregate(longer.aggregate(state, iter(())), replies[1:2])
    assert state.probabilities[:4].tolist() == pytest.approx([1, 1 / 5, 1 / 5, 0])
    assert longer.aggregate(state, replies[2:3]).probabilities[:4].tolist() == [1, 0, 1, 0]


def test_final_masks_are_the_most_probable_weights_or_drawn(small):
    layout = small.layout
    p = torch.linspace(0, 1, layout.maskable)
    for algorithm, expected in (
        (FedPM(density=0.25), p > 0.75),
        (FedPM(), p >= 0.5),
    ):
        state = replace(algorithm.init(job(small)), probabilities=p)
        params, masks = algorithm.finalize(state)
        assert same(masks.kept, expected)
        assert not params.maskable[~masks.kept].any()
    sampled = FedPM(mask="sample")
    state = replace(sampled.init(job(small)), probabilities=p)
    drawn_ = sampled.finalize(state)[1].kept
    assert same(drawn_, sampled.finalize(replace(state, round=7))[1].kept)
    assert not same(drawn_, sampled.finalize(replace(state, merges=7))[1].kept)
    assert 0.4 < float(drawn_.float().mean()) < 0.6
    assert float(drawn_[p < 0.1].float().mean()) < 0.1 < 0.9 < float(drawn_[p > 0.9].float().mean())


def test_fedpm_sends_masks_drawn_by_probabilities_that_begin_where_they_are_told(digits, small):
    """With a rate of almost 0 masks are drawn by the probabilities, between 0.01 and 0.99."""
    n = small.layout.maskable
    for bits in (0, 8):
        algorithm = FedPM(lr=1e-9, bits=bits)
        play = Federation(algorithm, small, digits)
        assert float(play.play([0])[1][0].mask("mask").kept.float().mean()) == pytest.approx(0.5, abs=0.05)
        half = torch.arange(n) < n // 2
        play.state = replace(play.state, probabilities=half.float(), ones=half.double(), votes=1.0)
        request, replies = play.play([0, 1, 2, 3, 4, 5])
        assert len(request[0].sections["shares" if bits else "ones"].body) <= (n if bits else n / 8 + 50)
        found = torch.stack([reply.mask("mask").kept for reply in replies.values()]).float().mean(0)
        assert 0.97 < float(found[: n // 2].mean()) < 1
        assert 0 < float(found[n // 2 :].mean()) < 0.03
    first = FedPM(start="uniform").init(job(small)).probabilities
    assert 0.45 < float(first.mean()) < 0.55
    assert float(first.std()) > 0.25
    assert FedPM(density=0.3).init(job(small)).probabilities.unique().tolist() == pytest.approx([0.3])
    assert FedPM(density=0.3, start="half").init(job(small)).probabilities.unique().tolist() == [0.5]


def test_with_a_density_fedpm_trains_at_that_density(digits, small):
    """Scores move by one number: their order and distances stay, and masks are as dense as the final one."""
    p = torch.linspace(0, 1, 1001)
    for density in (0.3, 0.01):
        scores = _scores(p, density)
        assert float(scores.sigmoid().mean()) == pytest.approx(density, rel=1e-4)
        bound = min(0.01, density / 100)
        torch.testing.assert_close(scores.diff(), p.clamp(bound, 1 - bound).logit().diff(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_scores(p, None), p.clamp(0.01, 0.99).logit())
    play = Federation(FedPM(density=0.1, lr=1e-9), small, digits)
    play.play([0, 1, 2])
    found = torch.stack([reply.mask("mask").kept for reply in play.play([0, 1, 2, 3, 4, 5])[1].values()])
    assert float(found.float().mean()) == pytest.approx(0.1, abs=0.01)


def test_votes_are_read_as_the_probabilities_that_the_server_has(digits, small):
    for estimate in ("mode", "mean"):
        algorithm = FedPM(estimate=estimate, reset=2)
        play = Federation(algorithm, small, digits)
        for _ in range(2):
            play.play([0, 1, 2])
        message = algorithm.broadcast(play.state, [0])[0]
        ones, votes = message.integers("ones").double(), message.number("votes")
        assert same(algorithm._estimated(ones, votes), play.state.probabilities)
        assert len(message.sections["ones"].body) < small.layout.maskable / 2
    for bad, among in ((ones[1:], votes), (ones - 1, votes), (ones, 0), (ones + 9, votes)):
        sections = message.sections | {"ones": integers(bad.long()), "votes": number(among)}
        with pytest.raises(WireError):
            handle(play.device, 0, pack(Message("train", 3, small.layout, sections)), None)
    assert "shares" in FedPM(weighting="examples").broadcast(play.state, [0])[0].sections


# ---- reparametrisations


def test_the_penalty_on_coins_is_the_slope_of_the_sum_of_probabilities():
    latent = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(0.3 * latent.sigmoid().sum(), latent)
    gradient = torch.zeros(3, dtype=torch.float64)
    BernoulliMask(torch.ones(3), penalty=0.3).backward(latent.detach(), gradient)
    torch.testing.assert_close(gradient, slope)


def test_ordinary_weights_among_signs_are_themselves():
    plain = torch.tensor([False, True, False])
    reparam = SignMask(torch.tensor([2.0, 3.0, 4.0]), plain=plain, limit=0.5).bound(lambda v: v.flip(0), None)
    latent, gradient = torch.tensor([-0.1, 7.0, 0.2]), torch.tensor([1.0, 1.0, 1.0])
    assert reparam.effective(latent).tolist() == [-4.0, 7.0, 2.0]
    reparam.backward(latent, gradient)
    assert gradient.tolist() == [4.0, 1.0, 2.0]
    latent = torch.tensor([-3.0, 7.0, 3.0])
    reparam.settle(latent)
    assert latent.tolist() == [-0.5, 7.0, 0.5]


# ---- learning


@pytest.fixture(scope="module")
def all_digits():
    settings = Data(name="digits", clients=5)
    return federate(load(settings), settings, Streams(0))


BARS = [
    (HideNSeek(density=0.2), 0.75),
    (HideNSeek(density=0.2, merge="mean"), 0.75),
    (HideNSeek(density=0.2, memory="stateful"), 0.7),
    (FedMask(density=0.2), 0.8),
    (FedMask(), 0.85),
    (FedPM(density=0.2), 0.75),
    (FedPM(), 0.8),
]


@pytest.mark.parametrize(("algorithm", "bar"), BARS, ids=[f"{type(each).__name__}-{i}" for i, (each, _) in enumerate(BARS)])
def test_masks_over_random_weights_learn_digits(algorithm, bar, all_digits):
    """15 rounds of an MLP with 64 hidden units, whose frozen weights alone guess one digit in ten."""
    spec = build(Model(name="mlp", hidden=(64,)), all_digits.shape, all_digits.classes)
    result = fit(algorithm, model=spec, data=all_digits, local=LOCAL, engine=Engine(rounds=15, eval_clients=0))
    assert result.accuracy > bar
    up = result.summary["bytes_up"] / (15 * 5)
    bits = spec.layout.maskable * (0.2 if isinstance(algorithm, HideNSeek) else 1)
    assert up <= bits / 8 + 100


def test_signs_learn_under_sparse_kernels_and_on_convolutions_too():
    """A mask that sparse kernels compute, and a network with GroupNorm: steps repeat and end."""
    settings = Data(name="digits", clients=3, train_limit=120)
    data = federate(load(settings), settings, Streams(0))
    for model in (Model(name="mlp", hidden=(1100,)), Model(name="resnet8", norm="group")):
        spec = build(model, data.shape, data.classes)
        algorithm = HideNSeek(density=0.1, iterations=5, others="norms")
        runs = [
            fit(
                algorithm,
                model=spec,
                data=data,
                local=Local(batch=40, sparse_linear=each, sparse_least=0),
                engine=Engine(rounds=2, eval_clients=0),
            )
            for each in (0.3, 0.3, 0.0)
        ]
        assert same(runs[0].params.flat, runs[1].params.flat)
        assert runs[0].density == pytest.approx(0.1, abs=1e-4)
        assert runs[2].rows[-1]["train_loss"] == pytest.approx(runs[0].rows[-1]["train_loss"], rel=0.05)
        assert same(runs[0].params.maskable.abs() > 0, runs[0].masks.kept)


def test_signs_section_is_checked(small):
    algorithm = HideNSeek(density=0.2)
    state = algorithm.init(job(small))
    good = {"signs": signs(state.signs, state.network.masks), "examples": number(3), "loss": number(1.0)}
    assert algorithm.read(state, Message("train", 1, small.layout, good))[2] == 3
    short = good | {"signs": signs(state.signs[9:])}
    with pytest.raises(WireError):
        algorithm.read(state, Message("train", 1, small.layout, short))
