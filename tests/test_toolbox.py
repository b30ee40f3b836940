"""Scores, allocations, selection, schedules and growth: exact counts, published values, and values worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import same
from fedsieve import Kind, Layout, Masks, Model, ModelSpec, Params, Slot, Streams, UsageError, build
from fedsieve.models.flow import Flow
from fedsieve.sparsity import schedule, scores
from fedsieve.sparsity.allocate import allocate, densities
from fedsieve.sparsity.measure import Agreement, overlap, sign_flips
from fedsieve.sparsity.regrow import regrow
from fedsieve.sparsity.select import guarded, narrowed, select, select_channels, select_n_of_m

RULES = ("uniform", "erk", "er", "balanced", "pyramidal")
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
)


def layout_of(*shapes):
    return Layout.of([Slot(f"w{i}", shape, Kind.WEIGHT, True, i) for i, shape in enumerate(shapes)])


def ties(name="ties"):
    return Streams(0)(name)


# ---- allocations


@settings(max_examples=200, deadline=None)
@given(shapes, st.floats(0, 1), st.sampled_from(RULES), st.integers(0, 3))
def test_exact_allocations_keep_what_was_asked(shapes, density, rule, floor):
    layout = layout_of(*shapes)
    keep = round(density * layout.maskable)
    least = {slot.name: min(floor, slot.numel) for slot in layout.slots}
    if keep < sum(least.values()):
        with pytest.raises(UsageError, match=r"at least|make"):
            allocate(layout, keep, rule, floor=floor)
        return
    counts = allocate(layout, keep, rule, floor=floor)
    assert sum(counts.values()) == keep
    assert all(least[slot.name] <= counts[slot.name] <= slot.numel for slot in layout.slots)


# realised density; stem; last 3x3 convolution; classifier; tensors that keep everything
RESNET18 = {
    ("erk", True): [(0.5, 0.3886, 1, 0.2628, 1, 13), (0.1, 0.0916, 1, 0.0526, 1, 4), (0.01, 0.0099, 0.509, 0.0053, 1, 1)],
    ("erk", False): [(0.5, 0.5, 1, 0.3582, 1, 14), (0.1, 0.1, 1, 0.0576, 1, 4), (0.01, 0.01, 0.514, 0.0053, 1, 1)],
    ("balanced", True): [(0.5, 0.2659, 1, 0.1127, 1, 13), (0.1, 0.0794, 1, 0.0225, 1, 8), (0.01, 0.0097, 1, 0.0023, 1, 2)],
    ("balanced", False): [(0.5, 0.5, 1, 0.2835, 1, 17), (0.1, 0.1, 1, 0.0300, 1, 8), (0.01, 0.01, 1, 0.0023, 1, 2)],
    ("pyramidal", False): [
        (0.5, 0.5, 0.959, 0.4295, 0.4118, 0),
        (0.1, 0.1, 0.862, 0.0514, 0.0443, 0),
        (0.01, 0.01, 0.698, 0.0008, 0.0005, 0),
    ],
}
RESNET20 = {
    ("erk", True): [(0.5, 0.4206, 1, 0.2982, 1, 10), (0.1, 0.0967, 0.95, 0.0596, 1, 2), (0.01, 0.01, 0.095, 0.0060, 0.19, 0)],
    ("erk", False): [(0.5, 0.5, 1, 0.3673, 1, 11), (0.1, 0.1, 0.983, 0.0617, 1, 2), (0.01, 0.01, 0.095, 0.0060, 0.19, 0)],
    ("balanced", True): [
        (0.5, 0.3314, 1, 0.1670, 1, 11),
        (0.1, 0.0922, 1, 0.0334, 1, 3),
        (0.01, 0.01, 0.285, 0.0033, 0.192, 0),
    ],
    ("balanced", False): [(0.5, 0.5, 1, 0.3043, 1, 16), (0.1, 0.1, 1, 0.0364, 1, 3), (0.01, 0.01, 0.285, 0.0033, 0.192, 0)],
    ("pyramidal", False): [(0.5, 0.5, 0.957, 0.4010, 0.3840, 0), (0.1, 0.1, 0.852, 0.0343, 0.0292, 0)],
}


@pytest.mark.parametrize(
    ("name", "count", "rule", "paper", "row"),
    [
        (name, count, rule, paper, row)
        for name, count, table in (("resnet18", 11_164_352, RESNET18), ("resnet20", 270_896, RESNET20))
        for (rule, paper), rows in table.items()
        for row in rows
    ],
)
def test_densities_are_those_of_the_specification(name, count, rule, paper, row):
    layout = build(Model(name=name), (3, 32, 32), 10).layout
    assert layout.maskable == count
    density, realised, stem, last, classifier, full = row
    found = densities(layout, density, rule, paper=paper)
    sizes = np.array([slot.numel for slot in layout.masked_slots])
    by_name = dict(zip((slot.name for slot in layout.masked_slots), found, strict=True))
    conv = [slot.name for slot in layout.masked_slots if slot.shape[2:] == (3, 3)][-1]
    assert (found * sizes).sum() / sizes.sum() == pytest.approx(realised, abs=6e-5)
    assert found[0] == pytest.approx(stem, abs=6e-4)
    assert by_name[conv] == pytest.approx(last, abs=6e-5)
    assert by_name["fc.weight"] == pytest.approx(classifier, abs=6e-4)
    assert (found >= 1).sum() == full
    kept = allocate(layout, round(density * count), rule, paper=paper)
    assert sum(kept.values()) / count == pytest.approx(realised, abs=6e-5 + len(sizes) / 2 / count)  # each is rounded


# ---- selection


@settings(max_examples=100, deadline=None)
@given(shapes, st.floats(0, 1), st.integers(0, 4), st.integers(0, 2**32))
def test_the_guard_keeps_the_count_and_the_floor(shapes, density, floor, seed):
    layout = layout_of(*shapes)
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, layout.maskable).astype(np.float32))
    keep = round(density * layout.maskable)
    least = {slot.name: min(floor, slot.numel) for slot in layout.slots}
    if keep < sum(least.values()):
        with pytest.raises(UsageError, match="at least"):
            guarded(values, keep, within=Masks.full(layout), ties=ties(), floor=floor)
        return
    masks, helped = guarded(values, keep, within=Masks.full(layout), ties=ties(), floor=floor)
    assert masks.count == keep
    assert all(int(masks[name].sum()) >= count for name, count in least.items())
    plain = select(values, keep, within=Masks.full(layout), ties=ties())
    assert set(helped) == {name for name, count in least.items() if int(plain[name].sum()) < count}
    if not helped:
        assert same(masks.kept, plain.kept)


def test_narrowing_scores_anew_and_keeps_equal_shares():
    layout, asked = layout_of((10, 10)), []

    def score(masks):
        asked.append(masks.count)
        return torch.arange(100.0)

    masks, _ = narrowed(score, 25, within=Masks.full(layout), steps=2, ties=ties())
    assert asked == [100, 50]
    assert masks.kept.nonzero().flatten().tolist() == list(range(75, 100))


def test_n_of_m_by_hand():
    layout = layout_of((2, 5))
    values = torch.tensor([4.0, 1, 2, 3, 9, 1, 2, 3, 4, 0])
    masks = select_n_of_m(values, 2, 4, layout=layout, ties=ties())
    assert masks["w0"].int().tolist() == [[1, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    tied = select_n_of_m(torch.zeros(10), 1, 2, layout=layout, ties=ties())
    assert tied["w0"].sum(1).tolist() == [3, 3]


def test_channels_by_hand():
    layout = layout_of((3, 1, 1, 2), (1, 1))
    values = torch.tensor([0.0, 5, 2, 2, 3, 0.5, -1])
    masks = select_channels(values, {"w0": 5, "w1": 0}, layout=layout, ties=ties())
    assert masks.kept.int().tolist() == [1, 1, 1, 1, 0, 0, 1]


# ---- schedules


def test_schedules():
    assert [schedule.one_shot(t, at=3, end=0.1) for t in (1, 2, 3, 4)] == [1.0, 1.0, 0.1, 0.1]
    assert schedule.exponential(50, last=100, end=0.01) == pytest.approx(0.1)
    assert schedule.exponential(100, last=100, end=0.01) == pytest.approx(0.01)
    assert [schedule.levels(t, every=1) for t in (10, 21)] == pytest.approx([0.1074, 0.0092], abs=5e-5)
    assert schedule.levels(500, every=1, end=0.05) == 0.05
    assert [schedule.cosine(t, last=10, start=1.0, end=0.2) for t in (0, 5, 10, 12)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert schedule.exchanged(0, last=100, share=0.3) == 0.3
    assert schedule.exchanged(100, last=100, share=0.3) == 0
    assert [schedule.exchanged(t, last=300, share=0.2) for t in (10, 100, 200)] == pytest.approx([0.1995, 0.15, 0.05], abs=5e-5)


# ---- growth


def test_regrowing_by_hand():
    """Eight weights of which four are kept: the two smallest go, the two steepest of the pruned ones come."""
    layout = layout_of((2, 4))
    masks = Masks(layout, torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]).bool())
    weights = torch.tensor([0.5, -0.1, 0, 0, 0.2, 0, -0.9, 0])
    slopes = torch.tensor([0.0, 9.0, 0.3, 0.1, 8.0, 0.7, 0, 0.2])
    moved = regrow(masks, weights.abs(), slopes, {"w0": 2}, ties=ties())
    assert moved.kept.int().tolist() == [1, 0, 1, 0, 0, 1, 1, 0]
    back = regrow(masks, weights.abs(), slopes, {"w0": 2}, ties=ties(), again=True)
    assert back.kept.int().tolist() == [1, 1, 0, 0, 1, 0, 1, 0]
    assert same(regrow(masks, weights.abs(), slopes, {}, ties=ties()).kept, masks.kept)


@settings(max_examples=100, deadline=None)
@given(shapes, st.floats(0, 1), st.integers(0, 40), st.integers(0, 2**32), st.booleans())
def test_regrowing_keeps_the_number_of_weights_of_each_slot(shapes, density, count, seed, again):
    layout, draws = layout_of(*shapes), np.random.default_rng(seed)
    masks = Masks(layout, torch.from_numpy(draws.random(layout.maskable) < density))
    drop, grow = (torch.from_numpy(draws.integers(0, 3, layout.maskable).astype(np.float32)) for _ in range(2))
    moved = regrow(masks, drop, grow, {slot.name: count for slot in layout.slots}, ties=ties(), again=again)
    for slot in layout.slots:
        before, after = masks[slot.name], moved[slot.name]
        assert before.sum() == after.sum()
        if not again:
            exchanged = min(count, int(before.sum()), int((~before).sum()))
            assert (after & ~before).sum() == (before & ~after).sum() == exchanged


# ---- scores


def test_scores_by_hand(three, vector):
    weights, gradient = vector(three, 2, -1, 0, 5), vector(three, -3, -4, 7, 1)
    assert scores.sensitivity(weights, gradient).tolist() == [6, 4, 0]
    assert scores.flow(weights, gradient).tolist() == [-6, 4, 0]
    assert scores.movement(weights, gradient).tolist() == [6, -4, 0]
    assert scores.steepness(gradient).tolist() == [3, 4, 7]
    drawn = scores.random(three, ties())
    assert drawn.shape == (3,)
    assert same(drawn, scores.random(three, ties()))


def chain(*widths, bias=False):
    layers = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return ModelSpec.of(nn.Sequential(*layers[:-1]), torch.zeros(1, widths[0]))


def test_flow_is_the_same_through_every_layer_and_into_and_out_of_every_unit():
    spec = chain(20, 30, 7, 5)
    params = spec.initial("kaiming", Streams(1))
    found = Flow(spec)(params, Masks.full(spec.layout))
    parts = [found[slice(*spec.layout.spans[slot.name])].view(slot.shape) for slot in spec.layout.slots]
    sums = [float(part.sum()) for part in parts]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)
    for into, out_of in pairwise(parts):
        torch.testing.assert_close(into.sum(1), out_of.sum(0), rtol=1e-9, atol=0)
    signs = Params(spec.layout, params.flat * torch.where(torch.arange(len(params.flat)) % 3 == 0, -1.0, 1.0))
    assert same(found, Flow(spec)(signs, Masks.full(spec.layout)))


def test_flow_by_hand():
    """One input, two hidden units, one output: R = 2 * 3 + 1 * 5; each weight's share is the product along its path."""
    spec = chain(1, 2, 1)
    params = Params(spec.layout, torch.tensor([-2.0, 1.0, 3.0, 5.0]))
    assert Flow(spec)(params, Masks.full(spec.layout)).tolist() == [6, 5, 6, 5]
    assert Flow(spec)(params, Masks(spec.layout, torch.tensor([True, True, True, False]))).tolist() == [6, 0, 6, 0]


@pytest.mark.parametrize("name", ["cnn6", "resnet8", "vgg11"])
def test_flow_of_networks_with_normalisation_is_positive(name):
    spec = build(Model(name=name), (3, 32, 32), 10)
    params = spec.initial("kaiming", Streams(0))
    found = Flow(spec)(params, Masks.full(spec.layout))
    assert found.dtype == torch.float64
    assert torch.isfinite(found).all()
    assert (found > 0).float().mean() > 0.85  # max pooling takes one place of 2x2, whose output reads 4 of 9 taps
    assert all(found[slice(*spec.layout.spans[slot.name])].any() for slot in spec.layout.masked_slots)


def test_flow_in_one_step_cuts_a_layer_off_and_in_a_hundred_does_not():
    spec = chain(784, 300, 100, 10)
    params, flow = spec.initial("kaiming", Streams(0)), Flow(spec)
    keep = round(0.01 * spec.layout.maskable)
    emptiest = {}
    for steps in (1, 100):
        masks, _ = narrowed(lambda masks: flow(params, masks), keep, within=Masks.full(spec.layout), steps=steps, ties=ties())
        assert masks.count == keep
        emptiest[steps] = min(int(masks[slot.name].sum()) for slot in spec.layout.slots)
    assert emptiest[1] == 0
    assert emptiest[100] > 100
    masks, helped = narrowed(
        lambda masks: flow(params, masks), keep, within=Masks.full(spec.layout), steps=1, ties=ties(), floor=10
    )
    assert helped
    assert masks.count == keep
    assert min(int(masks[slot.name].sum()) for slot in spec.layout.slots) >= 10


# ---- measures


def test_measures_by_hand(three, vector):
    a, b = (Masks(three, torch.tensor(bits).bool()) for bits in ([1, 1, 0], [0, 1, 1]))
    assert overlap(a, b) == pytest.approx(1 / 3)
    assert overlap(a, a) == 1
    assert sign_flips(vector(three, 1, -1, 0, 0), vector(three, -1, -2, 0, 0), a) == 0.5
    together = Agreement(three)
    together.add(a)
    assert together.value() is None
    together.add(b)
    assert together.value() == pytest.approx(1 / 3)
    together.add(a)  # pairs: a b, a a, b a: (1 + 2 + 1) / (3 + 2 + 3)
    assert together.value() == pytest.approx(4 / 8)
