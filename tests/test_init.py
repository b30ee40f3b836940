"""Starting weights: equal bits from equal seeds, the papers' distributions, a signal that neither dies nor grows."""

import subprocess
import sys
from hashlib import blake2b
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional as F

from fedsieve.init import glorot_uniform, kaiming_uniform
from fedsieve.models import build
from fedsieve.params import Kind, Layout, Slot
from fedsieve.settings import Model
from fedsieve.streams import Streams

SCHEMES = [kaiming_uniform, glorot_uniform]
LAYOUT = Layout.of(
    [
        Slot("table.weight", (50, 40), Kind.WEIGHT, maskable=False, block=0),
        Slot("conv.weight", (24, 10, 5, 3), Kind.WEIGHT, maskable=True, block=1),
        Slot("conv.bias", (24,), Kind.BIAS, maskable=False, block=1),
        Slot("norm.weight", (24,), Kind.NORM, maskable=False, block=2),
        Slot("norm.bias", (24,), Kind.NORM, maskable=False, block=2),
        Slot("norm.running_mean", (24,), Kind.BUFFER, maskable=False, block=2),
        Slot("norm.running_var", (24,), Kind.BUFFER, maskable=False, block=2),
        Slot("lstm.weight_hh_l0", (4 * 30, 30), Kind.WEIGHT, maskable=True, block=3),
        Slot("lstm.bias_hh_l0", (4 * 30,), Kind.BIAS, maskable=False, block=3),
        Slot("fc.weight", (70, 90), Kind.WEIGHT, maskable=False, block=4),
    ]
)
# fan_in, fan_out by hand
FANS = {"conv.weight": (10 * 15, 24 * 15), "lstm.weight_hh_l0": (30, 120), "fc.weight": (90, 70)}


def bounds(scheme) -> dict[str, float]:
    if scheme is kaiming_uniform:
        return {name: sqrt(6 / fan_in) for name, (fan_in, _) in FANS.items()}
    return {name: sqrt(6 / (fan_in + fan_out)) for name, (fan_in, fan_out) in FANS.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_uniform_within_the_bound_of_their_fans(scheme):
    params = scheme(LAYOUT, Streams(11), embeddings=["table.weight"])
    for name, bound in {**bounds(scheme), "table.weight": sqrt(3)}.items():
        w = params[name].double()
        assert w.abs().max() <= np.float32(bound)
        assert w.abs().max() > 0.99 * bound
        # of n uniform draws: mean 0 with deviation b / sqrt(3n), square b^2 / 3 with deviation b^2 sqrt(4 / 45 / n)
        assert abs(w.mean().item()) < 5 * bound / sqrt(3 * w.numel())
        assert abs((w**2).mean().item() - bound**2 / 3) < 5 * bound**2 * sqrt(4 / 45 / w.numel())
        counts = np.histogram(w.numpy(), bins=10, range=(-bound, bound))[0]
        assert ((counts - w.numel() / 10) ** 2).sum() / (w.numel() / 10) < 40  # chi-squared with 9 degrees of freedom


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_are_zero_and_normalisation_is_the_identity(scheme):
    params = scheme(LAYOUT, Streams(11))
    for name in ("conv.bias", "lstm.bias_hh_l0", "norm.bias", "norm.running_mean"):
        assert not params[name].any(), name
    for name in ("norm.weight", "norm.running_var"):
        assert (params[name] == 1).all(), name


def test_a_lookup_table_has_entries_of_variance_one():
    params = build(Model(name="charlstm"), (9,), 65, tokens=True).initial("glorot", Streams(0))
    assert 1.65 < params["embedding.weight"].abs().max() <= np.float32(sqrt(3))
    assert 0.85 < params["embedding.weight"].square().mean() < 1.15


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_number_is_one_word_of_the_slots_own_stream(scheme):
    params = scheme(LAYOUT, Streams(5, round=2, client=7))
    for name, bound in bounds(scheme).items():
        words = Streams(5, round=2, client=7)(f"init/{name}").words(4)
        dumb = [np.float32(bound * (2 * (int(word) >> 11) / 2**53 - 1)) for word in words]
        assert params[name].flatten()[:4].tolist() == dumb


@given(seed=st.integers(0, 2**63 - 1), other=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=15)
def test_a_start_is_a_function_of_its_seed(seed, other):
    for scheme in SCHEMES:
        first = scheme(LAYOUT, Streams(seed)).flat
        assert torch.equal(first, scheme(LAYOUT, Streams(seed)).flat)
        assert torch.equal(first, scheme(LAYOUT, Streams(other)).flat) == (seed == other)


def test_a_start_does_not_depend_on_the_other_slots():
    alone = Layout.of([next(slot for slot in LAYOUT.slots if slot.name == "fc.weight")])
    assert torch.equal(glorot_uniform(alone, Streams(4))["fc.weight"], glorot_uniform(LAYOUT, Streams(4))["fc.weight"])
    again = Layout.of([Slot("a.weight", (30, 30), Kind.WEIGHT, True, 0), Slot("b.weight", (30, 30), Kind.WEIGHT, True, 1)])
    params = glorot_uniform(again, Streams(4))
    assert abs(np.corrcoef(params["a.weight"].flatten(), params["b.weight"].flatten())[0, 1]) < 5 / 30


# the bits of a start are a promise to clients that make it themselves: a change here breaks every mixed federation
PINNED = {"kaiming": "77e3a6a5657da5db", "glorot": "6503c495e3cf1eac"}


@pytest.mark.parametrize("scheme", ["kaiming", "glorot"])
def test_the_bits_of_a_start_never_change(scheme):
    flat = build(Model(name="mlp", hidden=(16, 8)), (1, 8, 8), 10).initial(scheme, Streams(2026)).flat
    assert blake2b(flat.numpy().astype("<f4").tobytes(), digest_size=8).hexdigest() == PINNED[scheme]


START = """
import torch
from hashlib import sha256
from fedsieve.models import build
from fedsieve.settings import Model
from fedsieve.streams import Streams
spec = build(Model(name="charlstm"), (9,), 11, tokens=True)
said = [spec.layout.fingerprint.hex()]
said += [sha256(spec.initial(scheme, Streams(8)).flat.numpy().tobytes()).hexdigest() for scheme in ("module", "glorot")]
"""


def test_another_process_makes_the_same_start():
    other = [sys.executable, "-c", f"import torch; torch.manual_seed(77)\n{START}\nprint(*said)"]
    here: dict[str, list[str]] = {}
    exec(START, here)
    assert subprocess.run(other, capture_output=True, text=True, check=True, timeout=60).stdout.split() == here["said"]


def test_kaiming_keeps_the_scale_of_the_signal_through_many_relu_layers():
    spec = build(Model(name="mlp", hidden=(300,) * 20), (300,), 300)
    params = spec.initial("kaiming", Streams(0))
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    scores = functional_call(spec.module, dict(params), x)
    assert 0.5 < scores.std().item() / sqrt(2) < 2
    small = functional_call(spec.module, dict(spec.initial("glorot", Streams(0))), x)
    assert small.std().item() < 0.01  # each ReLU halves the power: Glorot's bound was derived without it


def test_glorot_keeps_forward_and_backward_scale_without_relu():
    spec = build(Model(name="mlp", hidden=(300,) * 10), (300,), 300)
    params = spec.initial("glorot", Streams(0))
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x
    for depth in range(1, 12):
        y = F.linear(y, params[f"fc{depth}.weight"])
    assert 0.7 < y.std().item() < 1.4
    y.backward(torch.randn(64, 300, generator=torch.Generator().manual_seed(1)))
    assert 0.7 < x.grad.std().item() < 1.4
