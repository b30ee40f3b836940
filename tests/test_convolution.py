"""Convolutions computed by other algorithms than the library's are the same function, and so are their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsieve import Engine, FedAvg, Local, Model, Streams, build, fit
from fedsieve.config import from_file
from fedsieve.local.convolution import CHOICES, accelerate, resolved
from fedsieve.local.executor import Executor
from fedsieve.local.winograd import Maps, convolve


def normal(*shape, purpose="x"):
    return torch.from_numpy(Streams(0)(purpose).numpy().standard_normal(shape)).float()


def assert_same(fast, plain, x, tolerance):
    """Compare outputs and all gradients, relative to the largest of each."""
    found, expected = [], []
    for layer, results in ((fast, found), (plain, expected)):
        inputs = x.clone().requires_grad_()
        outputs = layer(inputs)
        results += [outputs, *torch.autograd.grad((outputs * outputs.detach().cos()).sum(), [inputs, *layer.parameters()])]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def both(*args, choice="avx2", **options):
    torch.manual_seed(0)
    fast, plain = nn.Conv2d(*args, **options), nn.Conv2d(*args, **options)
    plain.load_state_dict(fast.state_dict())
    accelerate(fast, Local(convolution=choice))
    assert "forward" in vars(fast)
    return fast, plain


@pytest.mark.parametrize("options", [{"padding": 2}, {"bias": False}, {"padding": (1, 3), "stride": (2, 1)}], ids=str)
def test_one_channel_as_a_matrix_product(options):
    fast, plain = both(1, 4, (5, 3), **options)
    assert_same(fast, plain, normal(2, 1, 9, 11), 1e-5)
    torch.testing.assert_close(fast(normal(1, 9, 11)), plain(normal(1, 9, 11)))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([3, 5]), st.integers(0, 3), st.integers(5, 19), st.integers(5, 19), st.integers(1, 3), st.booleans(),
    st.sampled_from([32, 33, 48]), st.sampled_from([32, 40]),
)  # fmt: skip
def test_winograd(taps, padding, height, width, batch, bias, inputs, outputs):
    fast, plain = both(inputs, outputs, taps, padding=padding, bias=bias)
    assert_same(fast, plain, normal(batch, inputs, height, width), 5e-5)


def test_winograd_in_several_blocks_and_in_any_memory_order(monkeypatch):
    fast, plain = both(32, 32, 3, padding=1)
    x = normal(5, 32, 8, 8)
    whole = fast(x)
    monkeypatch.setattr("fedsieve.local.winograd.BLOCK", 2 * 36 * 4 * 32)
    assert_same(fast, plain, x, 5e-5)
    assert_same(fast, plain, x.contiguous(memory_format=torch.channels_last), 5e-5)
    torch.testing.assert_close(fast(x), whole)


@pytest.mark.parametrize("taps", [3, 5])
def test_the_maps_of_winograd_by_hand(taps):
    """A constant image under a filter of ones is r * r, exactly: all values at the points are small whole numbers or sixths."""
    maps = Maps(taps)
    assert maps._inputs.tolist() == [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]  # Lavin and Gray 2016, section 4.3
    y = convolve(torch.ones(1, 1, 12, 12), torch.ones(1, 1, taps, taps), None, 0)
    torch.testing.assert_close(y, torch.full((1, 1, 13 - taps, 13 - taps), float(taps * taps)))


def test_evaluation_keeps_nothing_for_a_backward_pass(monkeypatch):
    from fedsieve.local import winograd

    kept, forward = [], winograd.Winograd.forward

    def watched(ctx, *args):
        y = forward(ctx, *args)
        kept.append(len(ctx.points))
        return y

    monkeypatch.setattr(winograd.Winograd, "forward", staticmethod(watched))
    x, weight = normal(2, 4, 8, 8), normal(4, 4, 3, 3).requires_grad_()
    convolve(x, weight, None, 1)
    with torch.no_grad():
        convolve(x, weight, None, 1)
    assert kept == [1, 0]


def test_gradients_of_the_gradients_are_refused_clearly():
    x = normal(1, 2, 6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, normal(2, 2, 3, 3), None, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 3, stride=2),
        nn.Conv2d(32, 32, 3, dilation=2),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 32, (3, 5)),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 16, 3),
        nn.Conv2d(1, 8, 3, dilation=2),
        nn.ConvTranspose2d(32, 32, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("choice", CHOICES)
def test_other_layers_are_left_to_the_library(layer, choice):
    accelerate(layer, Local(convolution=choice))
    assert "forward" not in vars(layer)


def test_a_network_trains_alike_with_either_and_the_setting_chooses(digits):
    spec = build(Model(name="cnn"), (1, 8, 8), 10)
    streams, part = Streams(2).at(round=1, client=1), digits.parts[1]
    start = spec.initial("kaiming", streams)
    trained = {}
    for choice in ("avx2", "library"):
        executor = Executor(spec, Local(lr=0.05, convolution=choice), rounds=1)
        trained[choice] = executor.train(start, digits.train, part, streams).params.flat
    moved = (trained["library"] - start.flat).abs().max()
    assert 0 < (trained["avx2"] - trained["library"]).abs().max() < 1e-3 * moved
    assert "forward" not in vars(spec.module.conv2)


@pytest.mark.parametrize(("capability", "choice"), [("DEFAULT", "avx2"), ("AVX2", "avx2"), ("AVX512", "avx512")])
def test_the_processor_chooses_and_the_choice_is_recorded(capability, choice, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert resolved(Local()).convolution == choice
    assert resolved(Local(convolution="library")).convolution == "library"
    fit(
        FedAvg(),
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        data=digits,
        engine=Engine(rounds=1),
        out=tmp_path / "run",
    )
    assert from_file(tmp_path / "run" / "config.toml").local.convolution == choice


def test_wide_vectors_leave_more_to_the_library():
    both(64, 64, 3, choice="avx512")
    for layer in (nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 5), nn.Conv2d(1, 8, 3)):
        accelerate(layer, Local(convolution="avx512"))
        assert "forward" not in vars(layer)


def test_bfloat16_is_left_to_the_library(digits):
    fast, plain = both(32, 32, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(normal(1, 32, 6, 6)).dtype == plain(normal(1, 32, 6, 6)).dtype == torch.bfloat16
