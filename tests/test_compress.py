"""Compressors: what the papers' formulas say of them, what both ends remember, and that every method takes them."""

import json
from dataclasses import replace
from math import log2, pi

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import same
from fedsieve import Diverged, Engine, FedAvg, FedSparsify, Local, Model, Streams, UsageError, build, fit
from fedsieve.algorithms.base import find as find_algorithm
from fedsieve.algorithms.base import names as algorithms
from fedsieve.compress import collisions
from fedsieve.compress.adaquantfl import AdaQuantFl
from fedsieve.compress.base import Arrived, Frame, Parts, Support, find, name_of, names
from fedsieve.compress.dadaquant import by_weight
from fedsieve.compress.eden import Eden, centroids, hadamard
from fedsieve.compress.randk import RandK
from fedsieve.compress.randk_spatial import RandKSpatial
from fedsieve.compress.randk_temporal import RandKTemporal
from fedsieve.compress.topk import TopK
from fedsieve.config import from_file, from_name
from fedsieve.engine.handle import Device, Plan
from fedsieve.engine.link import BASE, ClientEnd, Link, LinkState, ServerEnd
from fedsieve.engine.transports import Sequential
from fedsieve.params import Kind, Layout, Masks, Params, Slot
from fedsieve.sweep import grid
from fedsieve.wire.bits import decode_integers
from fedsieve.wire.message import Message, WireError, pack, unpack
from fedsieve.wire.sections import dense, integers, number, vector

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (40, 1, 23)
LAYOUT = Layout.of([Slot(f"t{i}", (n,), Kind.WEIGHT, True, i) for i, n in enumerate(SIZES)])
EVERY = [find(name)() for name in names()]
UNBIASED = [each for each in EVERY if each.caps.unbiased]
ADAPTIVE = {"levels": 3}


def frame(round=1, client=0, sizes=SIZES):
    return Frame(sizes, Streams(7, round, client), told=ADAPTIVE, loss=1.0)


def carried(written, layout=LAYOUT):
    """The parts of a vector after they have been bytes."""
    sections = {f"update_{part}": section for part, section in written.items()}
    return Parts(unpack(pack(Message("train", 1, layout, sections)), layout), "update")


def there_and_back(compressor, x, frame, memory=None):
    written, kept = compressor.encode(x, frame, memory)
    return compressor.decode(carried(written), frame), kept


def gaussian(n=64, seed=1):
    return torch.from_numpy(Streams(seed)("x").numpy().standard_normal(n)).float()


def id_of(compressor):
    return name_of(compressor)


# ---- formulas


@pytest.mark.parametrize("compressor", UNBIASED, ids=id_of)
def test_an_unbiased_compressor_is_right_on_average(compressor):
    """The mean of many decodings is within five standard errors of the vector, number by number."""
    x, draws = gaussian(), 3000
    decoded = torch.stack([there_and_back(compressor, x, frame(round))[0] for round in range(draws)]).double()
    error = (decoded.mean(0) - x).abs()
    assert bool((error <= 5 * decoded.std(0) / draws**0.5 + 1e-6).all())
    assert float(decoded.std(0).max()) > 0


@pytest.mark.parametrize(
    ("compressor", "expected", "slack"),
    [
        (RandK(share=0.25), 3.0, 0.05),
        (find("qsgd")(levels=1, norm="l2", bucket=0), None, 0.02),
        (find("ternary")(), None, 0.02),
        (Eden(bits=1), pi / 2 - 1, 0.05),
        (Eden(bits=2), 0.133, 0.05),
        (Eden(bits=3), 0.036, 0.05),
        (Eden(bits=4), 0.0096, 0.05),
    ],
    ids=str,
)
def test_squared_error_is_that_of_the_formula(compressor, expected, slack):
    n = 1024
    x, draws, layout = gaussian(n), 400, Layout.of([Slot("t", (n,), Kind.WEIGHT, True, 0)])
    found = []
    for round in range(draws):
        where = frame(round, sizes=(n,))
        decoded = compressor.decode(carried(compressor.encode(x, where)[0], layout), where)
        found.append(float((decoded - x).square().sum() / x.square().sum()))
    if expected is None:  # sum over j of N |x_j| - x_j^2 with N the norm: the variance of one level
        scale = x.abs().max() if name_of(compressor) == "ternary" else x.norm()
        expected = float((scale * x.abs() - x.square()).sum() / x.square().sum())
    assert np.mean(found) == pytest.approx(expected, rel=slack)


def test_eden_is_nearly_right_on_average():
    n, draws, compressor = 4096, 300, Eden(bits=1)
    x, layout = gaussian(n), Layout.of([Slot("t", (n,), Kind.WEIGHT, True, 0)])
    total = torch.zeros(n, dtype=torch.float64)
    for round in range(draws):
        where = frame(round, sizes=(n,))
        total += compressor.decode(carried(compressor.encode(x, where)[0], layout), where)
    error = float((total / draws - x).square().sum() / x.square().sum())
    assert error == pytest.approx((pi / 2 - 1) / draws, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "beta", "c1", "c2"), [("one", 10, 0, 0), ("max", 15.3534, 1.9400, 0.6207), ("avg", 13.5626, 0.9119, 0.4699)]
)
def test_collisions_have_the_published_coefficients(kind, beta, c1, c2):
    values = collisions.transform(kind, 10)
    assert collisions.beta(values, 0.1) == pytest.approx(beta, abs=5e-5)
    assert collisions.coefficients(values, 0.1) == pytest.approx((c1, c2), abs=5e-5)


def test_errors_relative_to_randk_are_the_published_ones():
    def relative(kind, ratio):
        values = collisions.transform(kind, 10, ratio)
        return collisions.squared_error(values, 0.1, 1, ratio) / collisions.squared_error(np.ones(10), 0.1, 1, ratio)

    assert [relative(kind, 9) for kind in ("max", "avg")] == pytest.approx([0.595, 0.631], abs=1e-3)
    # independent vectors were drawn for the published figures, of R2 / R1 = -0.094
    assert [relative(kind, -0.094) for kind in ("max", "avg")] == pytest.approx([1.222, 1.106], abs=1e-3)
    assert [relative(kind, 0) for kind in ("max", "avg")] == pytest.approx([1 + 1.94 / 9, 1 + 0.9119 / 9], abs=1e-4)
    assert [relative(kind, 4.4) for kind in ("max", "avg", "opt")] == pytest.approx([0.912, 0.871, 0.870], abs=1e-3)


@given(n=st.integers(1, 12), p=st.floats(0.01, 1), ratio=st.floats(-1, 20), r2=st.floats(-1, 11))
def test_opt_is_never_worse_than_another_transform(n, p, ratio, r2):
    r2 = min(r2, n - 1)
    best = collisions.squared_error(collisions.transform("opt", n, r2), p, 1, r2)
    other = collisions.squared_error(collisions.transform("opt", n, ratio), p, 1, r2)
    assert best <= other * (1 + 1e-6) + 1e-12


@given(shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=6), kind=st.sampled_from(["one", "max", "avg"]))
def test_clients_of_different_shares_are_each_right_on_average(shares, kind):
    """By the sum over all 2^n ways to send: a client's factor makes its own part right."""
    values = collisions.transform(kind, len(shares))
    for client, factor in enumerate(collisions.betas(values, shares)):
        total = 0.0
        for way in range(2 ** len(shares)):
            sent = [bool(way >> i & 1) for i in range(len(shares))]
            chance = np.prod([p if s else 1 - p for p, s in zip(shares, sent, strict=True)])
            total += chance * factor / values[sum(sent) - 1] if sent[client] else 0.0
        assert total == pytest.approx(1)


def cohort_of(compressor, vectors, supports, round, memory=None):
    """Encode the vectors of a cohort, and decode them together; return the estimates, the replies and what was learned."""
    memory = compressor.start(len(vectors), LAYOUT.trainable) if memory is None else memory
    arrived = {}
    for client, (x, support) in enumerate(zip(vectors, supports, strict=True)):
        where = frame(round, client, support.sizes)
        arrived[client] = Arrived(client, carried(compressor.encode(support.take(x), where)[0]), where, support)
    cohort = compressor.survey(memory, arrived)
    found = [each.support.put(compressor.estimate(each, memory, cohort)) for each in arrived.values()]
    for each in arrived.values():
        memory = compressor.learn(each, memory, cohort)
    return torch.stack(found), compressor.finish(memory)


@pytest.mark.parametrize("kind", ["one", "max", "avg"])
@pytest.mark.parametrize("alike", [True, False])
def test_simulated_error_of_the_spatial_decoder_is_that_of_the_formula(kind, alike):
    n, draws, compressor = 5, 1500, RandKSpatial(share=0.25, transform=kind)
    vectors = [gaussian(seed=0 if alike else i) for i in range(n)]
    r1 = sum(float(x.square().sum()) for x in vectors)
    r2 = float(sum(vectors).square().sum()) - r1
    exact = collisions.squared_error(collisions.transform(kind, n), 0.25, r1, r2)
    mean = sum(vectors) / n
    errors = [
        float((cohort_of(compressor, vectors, [Support(LAYOUT)] * n, round)[0].mean(0) - mean).square().sum())
        for round in range(draws)
    ]
    assert np.mean(errors) == pytest.approx(exact, abs=5 * np.std(errors) / draws**0.5)
    assert np.mean(errors) == pytest.approx(exact, rel=0.05)


def test_weighted_cohorts_that_hold_different_numbers_are_right_on_average():
    kept = torch.rand(3, LAYOUT.maskable, generator=torch.Generator().manual_seed(0)) < 0.6
    supports = [Support(LAYOUT, Masks(LAYOUT, mask)) for mask in kept]
    vectors, weights = [gaussian(seed=i) for i in range(3)], torch.tensor([0.5, 0.3, 0.2]).double()
    wanted = sum(w * support.put(support.take(x)).double() for w, support, x in zip(weights, supports, vectors, strict=True))
    compressor, draws = RandKSpatial(share=0.3, transform="max"), 3000
    found = torch.stack([weights @ cohort_of(compressor, vectors, supports, round)[0].double() for round in range(draws)])
    assert bool(((found.mean(0) - wanted).abs() <= 5 * found.std(0) / draws**0.5 + 1e-6).all())


def test_the_ratio_of_inner_products_is_estimated_without_bias():
    vectors = [gaussian(seed=9) + 0.5 * gaussian(seed=i) for i in range(4)]
    r1 = sum(float(x.square().sum()) for x in vectors)
    compressor = RandKSpatial(share=0.4, transform="opt")
    found = [cohort_of(compressor, vectors, [Support(LAYOUT)] * 4, round)[1]["ratio"] for round in range(600)]
    exact = (float(sum(vectors).square().sum()) - r1) / r1
    assert np.mean(found) == pytest.approx(exact, abs=5 * np.std(found) / 600**0.5)


def test_the_temporal_decoder_has_the_error_of_the_differences():
    x, draws = gaussian(), 1500
    compressor, near = RandKTemporal(share=0.25), x + 0.1 * gaussian(seed=3)
    memory = {"seen": {0: {"update": near}}}
    errors = [
        float((cohort_of(compressor, [x], [Support(LAYOUT)], round, memory)[0][0] - x).square().sum()) for round in range(draws)
    ]
    assert np.mean(errors) == pytest.approx(3 * float((x - near).square().sum()), rel=0.05)
    estimate, learned = cohort_of(compressor, [x], [Support(LAYOUT)], 1, memory)
    changed = learned["seen"][0]["update"] != near
    assert int(changed.sum()) == len(frame().positions(0.25))
    assert same(learned["seen"][0]["update"][changed], x[changed])
    assert not torch.equal(estimate[0], x)
    stale = {"seen": {0: {"update": -x}}}
    forgotten = cohort_of(compressor, [x], [Support(LAYOUT)], 1, stale)[1]["seen"][0]["update"]
    assert int((forgotten != 0).sum()) == len(frame().positions(0.25))


def test_levels_follow_the_loss_as_adaquantfl_says():
    compressor = AdaQuantFl(first=2, smoothing=0.0)
    memory = compressor.start(1, 1)
    for loss, expected in [(4.0, 2), (1.0, 4), (0.25, 8), (16.0, 1), (0.0, 1), (0.0001, 255)]:
        where = replace(frame(), loss=loss)
        parts = carried(compressor.encode(gaussian(), where)[0])
        memory = compressor.finish(compressor.learn(Arrived(0, parts, where, Support(LAYOUT)), memory, None))
        assert memory["levels"] == expected


def test_dadaquant_gives_clients_levels_of_equal_variance_for_fewer_in_total():
    weights = np.array([0.6, 0.2, 0.1, 0.1])
    levels = by_weight(weights, 16)
    assert levels.sum() < 4 * 16
    assert np.sum(weights**2 / levels**2) == pytest.approx(np.sum(weights**2) / 16**2, rel=0.1)
    assert list(by_weight(np.full(4, 0.25), 16)) == [16] * 4


def test_lloyd_and_max_found_the_same_centroids():
    assert centroids(1) == pytest.approx((-0.7979, 0.7979), abs=1e-4)
    assert centroids(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)
    assert centroids(3)[4:] == pytest.approx((0.2451, 0.7560, 1.3439, 2.1520), abs=1e-4)
    x = gaussian(64)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)
    assert float(hadamard(x).norm()) == pytest.approx(float(x.norm()), rel=1e-5)


@pytest.mark.parametrize("top", [1, 7, 127])
def test_levels_cost_their_entropy_within_one_percent(top):
    n = 1_000_000
    x, where = gaussian(n), frame(sizes=(n,))
    written, _ = find("qsgd")(levels=top, norm="max", bucket=0).encode(x, where)
    body = bytes(written["levels"].view)
    shares = np.unique(decode_integers(True, memoryview(body), n), return_counts=True)[1] / n
    assert len(body) * 8 / n <= 1.01 * -(shares * np.log2(shares)).sum()


# ---- what is remembered


@pytest.mark.parametrize("name", ["topk", "stc", "sign"])
def test_what_is_sent_and_what_is_kept_make_up_the_update(name):
    compressor, memory, total, sent = find(name)(), None, torch.zeros(sum(SIZES)), torch.zeros(sum(SIZES))
    for round in range(1, 30):
        x = gaussian(seed=round)
        decoded, memory = there_and_back(compressor, x, frame(round), memory)
        total, sent = total + x, sent + decoded
        assert torch.allclose(sent + memory, total, atol=1e-4)


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_top_k_sends_the_largest_the_earlier_of_equal_ones(ranking):
    x = torch.zeros(sum(SIZES))
    x[[3, 5, 7, 41, 50]] = torch.tensor([3.0, -2.0, 3.0, 1.0, -1.0])
    decoded, left = there_and_back(TopK(share=3 / 64, ranking=ranking), x, frame())
    assert decoded.nonzero().ravel().tolist() == {"global": [3, 5, 7], "layer": [3, 7, 41]}[ranking]
    assert torch.equal(decoded + left, x)


def test_ef21_ends_agree_and_come_ever_nearer_to_a_vector_that_stays():
    compressor, memory, server = find("ef21")(share=0.1), None, find("ef21")(share=0.1).start(1, LAYOUT.trainable)
    x, errors = gaussian(), []
    for round in range(1, 16):
        written, memory = compressor.encode(x, frame(round), memory)
        reply = Arrived(0, carried(written), frame(round), Support(LAYOUT))
        estimate = compressor.estimate(reply, server, None)
        server = compressor.learn(reply, server, None)
        assert torch.allclose(estimate, memory, atol=1e-6)
        errors.append(float((x - estimate).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


# ---- edges


@pytest.mark.parametrize("compressor", EVERY, ids=id_of)
@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_vector_comes_back_finite_and_in_shape(compressor, sizes, scale, seed):
    layout = Layout.of([Slot(f"t{i}", (n,), Kind.WEIGHT, True, i) for i, n in enumerate(sizes)])
    x, where = scale * gaussian(sum(sizes), seed), frame(seed % 1000, sizes=sizes)
    before = x.clone()
    written, kept = compressor.encode(x, where, torch.zeros(sum(sizes)))
    decoded = compressor.decode(carried(written, layout), where)
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    assert bool(decoded.isfinite().all())
    assert kept is None or (kept.shape == x.shape and bool(kept.isfinite().all()))
    assert torch.equal(x, before)
    if not scale:
        assert not decoded.any()
    again, _ = compressor.encode(x, where, torch.zeros(sum(sizes)))
    assert {name: bytes(part.view) for name, part in written.items()} == {
        name: bytes(part.view) for name, part in again.items()
    }


@pytest.mark.parametrize("compressor", [RandK(share=1), RandKSpatial(share=1), TopK(share=1), find("stc")(share=1)], ids=id_of)
def test_a_share_of_one_is_the_vector_itself(compressor):
    x = gaussian() if name_of(compressor) != "stc" else torch.sign(gaussian())
    assert torch.allclose(there_and_back(compressor, x, frame())[0], x, atol=1e-6)


def test_a_share_that_comes_to_no_number_is_legal():
    where = next(each for each in map(frame, range(50)) if not len(each.positions(0.001)))
    for compressor in (RandK(share=0.001), RandK(share=0.001, bits=4), RandKSpatial(share=0.001)):
        assert not there_and_back(compressor, gaussian(), where)[0].any()


@pytest.mark.parametrize("compressor", EVERY, ids=id_of)
def test_a_hostile_payload_is_refused_or_read_as_finite_numbers(compressor):
    x, where = gaussian(), frame()
    written, _ = compressor.encode(x, where)
    for part, section in written.items():
        with pytest.raises(WireError):
            compressor.decode(carried({name: each for name, each in written.items() if name != part}), where)
        for other in (
            number(-1.0),
            vector(torch.full((3,), -1.0)),
            integers(torch.arange(5000, dtype=torch.int32) - 2500),
            vector(torch.zeros(sum(SIZES) + 1)),
        ):
            with pytest.raises(WireError):
                compressor.decode(carried(written | {part: other}), where)
        body = bytearray(bytes(section.view))
        for at in range(0, len(body), max(1, len(body) // 40)):
            changed = bytearray(body)
            changed[at] ^= 0xFF
            try:
                found = compressor.decode(carried(written | {part: replace(section, body=bytes(changed))}), where)
            except WireError:
                continue
            assert found.shape == x.shape


# ---- with every method


LOCAL = Local(epochs=1, batch=16, lr=0.1, momentum=0.5)


def engine(**settings):
    return Engine(**{"rounds": 5, "cohort": 4, "seed": 3, "dropout": 0.2, "eval_clients": 3} | settings)


def comparable(result):
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "peak_memory_mb")} for row in result.rows]
    return json.dumps(rows, sort_keys=True), result.params.flat.numpy().tobytes(), result.masks.kept.numpy().tobytes()


@pytest.fixture
def small(digits):
    return build(Model(name="mlp", hidden=(16,)), digits.shape, digits.classes)


def plain(small):
    return small.initial("glorot", Streams(3))


@pytest.mark.parametrize("method", [FedAvg(), FedSparsify(density=0.2), FedSparsify(density=0.2, variant="local")], ids=repr)
@pytest.mark.parametrize("compressor", EVERY, ids=id_of)
def test_runs_repeat_whoever_plays_them_and_wherever_they_stop(method, compressor, digits, small, tmp_path):
    """With updates compressed, and broadcasts too where it may: again, with workers, and interrupted and resumed."""
    link = Link(compressor, compressor if compressor.caps.down else None)
    run = {"model": small, "data": digits, "local": LOCAL, "link": link, "start": plain(small)}
    whole = fit(method, engine=engine(), **run)
    assert comparable(fit(method, engine=engine(workers=2), **run)) == comparable(whole)

    def stop_after_three(row):
        if row["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(method, engine=engine(checkpoint_every=2), out=tmp_path / "run", watch=stop_after_three, **run)
    assert comparable(fit(method, engine=engine(checkpoint_every=2), out=tmp_path / "run", resume=True, **run)) == comparable(
        whole
    )
    dense = fit(method, engine=engine(), **{**run, "link": None})
    assert whole.summary["bytes_up"] < 0.6 * dense.summary["bytes_up"]
    assert all(row["nominal_up"] > 0 for row in whole.rows)
    assert {reason for row in whole.rows for reason in row["lost"].values()} <= {"dropped out"}
    if method.__class__ is FedSparsify and method.variant == "global":
        assert whole.density == pytest.approx(0.2, abs=0.5 / small.layout.maskable)


CODED = ("fedmask", "fedpm", "hidenseek", "progfed")
"""methods that send no model: what they send is coded already"""


@pytest.mark.parametrize("name", algorithms())
def test_every_method_takes_a_compressor_or_says_why_not(name, digits, small):
    wanted = {"density": 0.2} if "density" in {*find_algorithm(name).__dataclass_fields__} else {}
    wanted |= {"every": 2} if {"every", "stop"} <= {*find_algorithm(name).__dataclass_fields__} else {}
    wanted |= {"selection": "loss"} if name == "fedtiny" else {}
    method, run = find_algorithm(name)(**wanted), {"model": small, "data": digits, "local": LOCAL, "start": plain(small)}
    if name in CODED:
        with pytest.raises(UsageError, match=r"compress.up has nothing to compress"):
            fit(method, engine=engine(), link=Link(up=TopK(share=0.1)), **run)
    else:
        up = fit(method, engine=engine(dropout=0.0), link=Link(up=find("kbit")()), **run)
        bare = fit(method, engine=engine(dropout=0.0), **run)
        assert up.summary["bytes_up"] < bare.summary["bytes_up"]
        assert not any(row["lost"] for row in up.rows)
        assert up.rows[-1]["loss"] == pytest.approx(bare.rows[-1]["loss"], rel=0.25)
    down = Link(down=find("kbit")())
    if name in (*CODED, "lotteryfl"):
        with pytest.raises(UsageError, match=r"compress.down has nothing to compress"):
            fit(method, engine=engine(), link=down, **run)
    else:
        found = fit(method, engine=engine(dropout=0.0, cohort=0), link=down, **run)
        assert not any(row["lost"] for row in found.rows)
        assert (
            found.rows[-1]["bytes_down"]
            < 0.75 * fit(method, engine=engine(dropout=0.0, cohort=0), **run).rows[-1]["bytes_down"]
        )


def test_bytes_are_those_that_were_carried(digits, small, monkeypatch):
    carried = {"up": 0, "down": 0}
    exchange = Sequential.exchange

    def tapped(self, requests):
        for client, reply in exchange(self, requests):
            carried["down"] += len(requests[client])
            carried["up"] += len(reply)
            yield client, reply

    monkeypatch.setattr(Sequential, "exchange", tapped)
    link = Link(find("randk_temporal")(), find("topk")())
    result = fit(
        FedAvg(),
        model=small,
        data=digits,
        local=LOCAL,
        link=link,
        engine=engine(dropout=0.0, eval_clients=0),
        start=plain(small),
    )
    assert carried == {"up": result.summary["bytes_up"], "down": result.summary["bytes_down"]}


def exchanges(link, digits, small, rounds, lose=lambda round: ()):
    """Play FedAvg round by round, by hand; yield each round's requests, and what each client's end knows the model to be."""
    method, device = FedAvg(), Device(Plan(FedAvg(), small, digits, LOCAL, rounds, 3, link=link))
    job_state = method.init(type("Job", (), {"start": plain(small), "layout": small.layout})())
    linked, mine = LinkState.start(link, 6, small.layout), {}
    for round, cohort in enumerate([[0, 1, 2]] * rounds, 1):
        end = ServerEnd(link, linked, Streams(3, round))
        requests = {client: pack(message) for client, message in end.send(method.broadcast(job_state, cohort)).items()}
        replies = []
        for client, payload in requests.items():
            reply, kept = device.answer(client, payload, mine.get(client))
            mine[client] = kept
            if client not in lose(round):
                replies.append((client, unpack(pack(reply), small.layout)))
        read = [
            (client, found) for client, _, found in end.read(replies, lambda reply, state=job_state: method.read(state, reply))
        ]
        assert not any(isinstance(found, WireError) for _, found in read)
        job_state, linked = method.aggregate(job_state, read), end.finish()
        yield round, requests, linked, job_state


@pytest.mark.parametrize("name", ["topk", "randk_spatial"])
def test_a_reply_that_cannot_be_is_lost_and_the_others_count(name, digits, small):
    link, method = Link(up=find(name)()), FedAvg()
    state = method.init(type("Job", (), {"start": plain(small), "layout": small.layout})())
    end = ServerEnd(link, LinkState.start(link, 3, small.layout), Streams(3, 1))
    device = Device(Plan(method, small, digits, LOCAL, 3, 3, link=link))
    replies = []
    for client, request in end.send(method.broadcast(state, [0, 1, 2])).items():
        reply, _ = device.answer(client, pack(request), None)
        replies.append((client, unpack(pack(reply), small.layout)))
    huge = torch.full_like(replies[1][1].vector("update_values"), 3e38)
    replies[1] = (1, replace(replies[1][1], sections={**replies[1][1].sections, "update_values": vector(huge[:-1])}))
    if name == "randk_spatial":  # beyond the range of float32 once it is divided by the share
        replies[1][1].sections["update_values"] = vector(huge)
    found = {client: content for client, _, content in end.read(replies, lambda reply: method.read(state, reply))}
    assert isinstance(found[1], WireError)
    assert not any(isinstance(found[client], WireError) for client in (0, 2))
    assert end.finish().counted.tolist() == [1, 0, 1]


def test_increments_go_only_to_clients_whose_last_reply_counted(digits, small):
    for round, requests, linked, state in exchanges(
        Link(down=find("kbit")()), digits, small, 5, lose=lambda round: {2: [1], 3: [1]}.get(round, ())
    ):
        increments = {client for client, payload in requests.items() if BASE in unpack(payload, small.layout).sections}
        assert increments == {1: set(), 2: {0, 1, 2}, 3: {0, 2}, 4: {0, 2}, 5: {0, 1, 2}}[round]
        lengths = {client: len(payload) for client, payload in requests.items()}
        assert all(lengths[client] < 0.5 * 4 * small.layout.size for client in increments)
        assert all(lengths[client] > 4 * small.layout.size for client in {0, 1, 2} - increments)
        assert float((linked.sent["weights"] - state.params.flat).abs().max()) < 1


def test_a_lost_reply_is_not_taken_for_sent(digits, small):
    """Error feedback goes on from what the server counted: the client is told which round that was."""
    for at, requests, _, _ in exchanges(Link(up=TopK()), digits, small, 4, lose=lambda round: [1] if round == 2 else []):
        told = {client: "link_counted" in unpack(payload, small.layout).sections for client, payload in requests.items()}
        assert told == dict.fromkeys(range(3), False) | {1: at == 3}
    kept = {"memory": {"update": {1: torch.ones(small.layout.trainable), 2: torch.zeros(small.layout.trainable)}}}
    request = Message("train", 3, small.layout, {"weights": dense(plain(small)), "link_counted": number(1)})
    update = Params(small.layout, torch.zeros(small.layout.size))
    reply, after = ClientEnd(Link(up=TopK(share=0.5)), Streams(3, 3, 1), kept).close(
        request, request.reply(update=dense(update))
    )
    assert set(after["memory"]["update"]) == {1, 3}
    assert float(Parts(reply, "update").floats("values", round(0.5 * small.layout.trainable)).min()) == 1


def test_a_client_that_holds_another_model_is_lost_not_wrong(small):
    link = Link(down=find("kbit")())
    request = Message("train", 5, small.layout, {BASE: number(4), "weights_levels": number(1)})
    for kept in ({}, {"round": 3, "held": {"weights": torch.zeros(small.layout.size)}}):
        with pytest.raises(WireError, match="round 4"):
            ClientEnd(link, Streams(3, 5, 1), kept).open(request).dense("weights")


def test_an_update_that_is_not_finite_names_its_tensor(small):
    params = plain(small)
    params.flat[int(small.layout.trainable) - 1] = float("inf")
    section = replace(dense(plain(small)), source=(params, None))
    request = Message("train", 1, small.layout, {})
    with pytest.raises(Diverged, match=small.layout.slots[-1].name):
        ClientEnd(Link(up=TopK()), Streams(3, 1, 1), {}).close(request, request.reply(update=section))


def test_statistics_travel_as_they_are(digits):
    normalised = build(Model(name="conftest:normalised"), digits.shape, digits.classes)
    link = Link(find("sign")(), find("ternary")())
    result = fit(FedAvg(), model=normalised, data=digits, local=LOCAL, link=link, engine=engine(cohort=0, dropout=0.0))
    bare = fit(FedAvg(), model=normalised, data=digits, local=LOCAL, engine=engine(cohort=0, dropout=0.0, rounds=1))
    assert not any(row["lost"] for row in result.rows)
    assert bool(result.params.statistics.isfinite().all())
    assert bare.summary["bytes_up"] > 5 * result.rows[0]["bytes_up"]


# ---- settings


def test_a_config_with_compressors_is_a_fixed_point(tmp_path):
    given = {"compress.up.name": "randk_spatial", "compress.up.share": "0.05", "compress.down.name": "topk"}
    config = from_name("fedavg", given)
    import tomli_w

    (tmp_path / "mine.toml").write_text(tomli_w.dumps(config.tables()))
    again = from_file(tmp_path / "mine.toml")
    assert again == config
    assert (again.up, again.down) == (RandKSpatial(share=0.05), TopK())
    assert "compress" not in from_name("fedavg").tables()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"compress.up.name": "randkk"}, "Did you mean 'randk'"),
        ({"compress.up.share": "0.1"}, "compress.up.name is not given"),
        ({"compress.up.name": "topk", "compress.up.shar": "0.1"}, "Did you mean 'compress.up.share'"),
        ({"compress.up.name": "topk", "compress.up.share": "0"}, "compress.up.share = 0"),
        ({"compress.up.name": "topk", "compress.up.share": "1.5"}, "compress.up.share = 1.5"),
        ({"compress.up.name": "kbit", "compress.up.bits": "1"}, "compress.up.bits = 1"),
        ({"compress.sideways.name": "topk"}, "compress.sideways is no table"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(given, said):
    with pytest.raises(UsageError) as error:
        from_name("fedavg", given)
    assert said in str(error.value)


@pytest.mark.parametrize("name", [name for name in names() if not find(name)().caps.down])
def test_what_is_made_for_a_cohort_does_not_compress_broadcasts(name):
    with pytest.raises(UsageError, match=r"compress.down"):
        Link(down=find(name)())


@pytest.mark.parametrize("name", ["randk_temporal", "ef21"])
def test_a_memory_that_would_be_too_large_is_refused(name, digits, small):
    with pytest.raises(UsageError, match=r"compress.up.memory_mb = 0.001: to remember \d+ numbers of each of 6 clients"):
        fit(FedAvg(), model=small, data=digits, link=Link(up=find(name)(memory_mb=0.001)), engine=engine())


def test_nominal_bits_are_those_of_the_papers():
    where = frame(sizes=(1000,))
    assert find("kbit")(bits=4).nominal_bits(where) == 4032
    assert find("qsgd")(levels=7, bucket=500).nominal_bits(where) == 4 * 1000 + 64
    assert RandK(share=0.1).nominal_bits(where) == 3200 + 64
    assert find("ternary")().nominal_bits(where) == pytest.approx(1000 * log2(3) + 32)
    assert TopK(share=0.01).nominal_bits(where) == pytest.approx(320 + 77.76, abs=0.1)


def test_a_sweep_varies_compressors_and_their_settings(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('[algorithm]\nname = "fedavg"\n[sweep]\n"compress.up.name" = ["topk", "kbit"]\n"engine.seed" = [0, 1]\n')
    assert [name_of(point.config.up) for point in grid(path)] == ["topk", "topk", "kbit", "kbit"]
    path.write_text('[algorithm]\nname = "fedavg"\n[compress.up]\nname = "topk"\n[sweep]\n"compress.up.share" = [0.1, 0.2]\n')
    assert [point.config.up.share for point in grid(path)] == [0.1, 0.2]
    for text in ('compress = 3\n[algorithm]\nname = "fedavg"\n', '[algorithm]\nname = "fedavg"\n[compress]\nup = "topk"\n'):
        path.write_text(f'{text}[sweep]\n"engine.seed" = [0, 1]\n')
        with pytest.raises(UsageError, match="compress"):
            grid(path)
