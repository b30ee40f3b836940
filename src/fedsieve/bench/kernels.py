"""Sparse kernels against dense layers on this machine, one thread: `fedsieve bench kernels`.

    layers  forward and backward of single layers over their kept weights, and the density from which on this pays: what
            local.sparse_conv and local.sparse_linear are to be set to
    step    whole local training of the CNN of job J1 (1.66 M parameters, batches of 32), data and optimiser included

Dense is the fastest that there is here: `local.convolution = "fast"`, channels last, masked. Both take turns, so that they see
the same machine; times are the processor's, medians. Where weights stand is random, in "random" masks with one density for all
layers but the first, which keeps six times as much, in "ranked" ones with the densities that FedSparsify leaves each layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsieve import files
from fedsieve.bench import history
from fedsieve.data.batches import Examples
from fedsieve.engine.folder import environment
from fedsieve.engine.transports import keep_freed_memory
from fedsieve.local.convolution import accelerate
from fedsieve.local.executor import Executor
from fedsieve.local.forms import sparse_layers
from fedsieve.models.spec import build
from fedsieve.params import Layout, Masks
from fedsieve.settings import Local, Model
from fedsieve.streams import Streams

BATCH = 32
EXAMPLES = 608
"""of a client of J1, rounded up to full batches"""
DENSITIES = (0.2, 0.1, 0.05, 0.02, 0.01)
LAYER_DENSITIES = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
GOALS = {0.1: 2.6, 0.05: 4.5, 0.01: 9.0}
"""times as fast as dense that a step is to be"""
FIRST = 6
"""times the density of the others that the first convolution keeps"""
RANKED = {0.1: (0.62, 0.26, 0.093, 0.64), 0.05: (0.61, 0.22, 0.043, 0.61), 0.01: (0.57, 0.15, 0.0035, 0.57)}
"""densities of the four layers that FedSparsify's ranking over the whole network left after 8 rounds on Fashion-MNIST"""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to measure."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """of one input"""


LAYERS = (
    Layer("conv 5x5, 32 -> 64, 14 x 14", lambda: nn.Conv2d(32, 64, 5, padding=2), (32, 14, 14)),
    Layer("conv 3x3, 16 -> 16, 32 x 32", lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32)),
    Layer("conv 3x3, 64 -> 64, 16 x 16", lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 16, 16)),
    Layer("conv 3x3, 128 -> 128, 8 x 8", lambda: nn.Conv2d(128, 128, 3, padding=1), (128, 8, 8)),
    Layer("conv 3x3, stride 2, 32 -> 64, 16 x 16", lambda: nn.Conv2d(32, 64, 3, 2, padding=1), (32, 16, 16)),
    Layer("conv 1x1, 64 -> 64, 16 x 16", lambda: nn.Conv2d(64, 64, 1), (64, 16, 16)),
    Layer("linear 3136 -> 512", lambda: nn.Linear(3136, 512), (3136,)),
    Layer("linear 784 -> 200", lambda: nn.Linear(784, 200), (784,)),
    Layer("linear 200 -> 200", lambda: nn.Linear(200, 200), (200,)),
)


def milliseconds(acts: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median time of the processor that each call takes; they are called in turn, for about so many seconds."""
    times: list[list[float]] = [[] for _ in acts]
    for act in acts:
        act()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for act, of in zip(acts, times, strict=True):
            begin = time.thread_time()
            act()
            of.append((time.thread_time() - begin) * 1e3)
    return [median(of) for of in times]


def layer(subject: Layer, seconds: float) -> dict[str, Any]:
    """Measure one layer; return milliseconds, dense and by density, and the density where they are equal."""
    from fedsieve.local.patterns import Pattern
    from fedsieve.local.sparse_kernels import convolve, linear

    module = subject.make()
    x = torch.randn(BATCH, *subject.shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    accelerate(nn.Sequential(module), Local())
    weight: Tensor = module.get_parameter("weight")
    acts = [_pass(lambda x, weight, bias: module(x), x, weight, module.get_parameter("bias"))]
    last = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if x.dim() == 4 else x.t().contiguous().t()
    apply = linear if isinstance(module, nn.Linear) else convolve
    for density in LAYER_DENSITIES:
        kept = np.random.default_rng(0).random(tuple(weight.shape)) < density
        shape = (module.stride, module.padding) if isinstance(module, nn.Conv2d) else ()
        pattern = Pattern(kept, *shape)
        values = weight.detach()[torch.from_numpy(kept)].requires_grad_()
        acts.append(
            _pass(lambda x, values, bias, p=pattern: apply(x, values, bias, p), last, values, module.get_parameter("bias"))
        )
    dense, *sparse = milliseconds(acts, seconds)
    ratios = [dense / each for each in sparse]
    return {"layer": subject.name, "dense": dense, "ratios": dict(zip(map(str, LAYER_DENSITIES), ratios, strict=True))} | {
        "break_even": break_even(LAYER_DENSITIES, ratios)
    }


def _pass(apply: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Callable[[], object]:
    """Return a call that plays forward and backward."""
    x = x.detach().requires_grad_()
    gradient = torch.randn_like(apply(x, *weights))
    return lambda: torch.autograd.grad(apply(x, *weights), (x, *weights), gradient)


def break_even(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Largest density up to which sparse is as fast as dense, between measured ones by interpolation of logarithms."""
    found = 0.0
    points = sorted(zip(densities, ratios, strict=True))
    if points[-1][1] >= 1:
        return points[-1][0]
    for (low, faster), (high, slower) in pairwise(points):
        if faster >= 1 > slower:
            share = log(faster) / (log(faster) - log(slower))
            found = exp(log(low) + share * (log(high) - log(low)))
    return found


def steps(seconds: float) -> list[dict[str, Any]]:
    """Measure local training of J1's CNN; return for each mask milliseconds a step, dense and sparse, and their ratio."""
    spec = build(Model(name="cnn"), (1, 28, 28), 10)
    start, order = spec.initial("glorot", Streams(0)), np.arange(EXAMPLES)
    x = torch.randn(EXAMPLES, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    examples = Examples(x.contiguous(memory_format=torch.channels_last), torch.arange(EXAMPLES) % 10, (0.1,), (0.9,))
    dense = Executor(spec, Local(lr=0.05, batch=BATCH, sparse_conv=0, sparse_linear=0), 1)
    sparse = Executor(spec, Local(lr=0.05, batch=BATCH), 1)
    streams, found = Streams(0).at(round=1, client=0), []
    cases = [("random", d, (min(1.0, FIRST * d), d, d, d)) for d in DENSITIES] + [("ranked", d, by) for d, by in RANKED.items()]
    for kind, density, densities in cases:
        masks = random_masks(spec.layout, densities)
        if len(sparse_layers(spec.module, masks, sparse.local)) != 4:
            raise AssertionError("a layer of the CNN is not computed by sparse kernels")
        losses: dict[int, float] = {}

        def act(which: int, executor: Executor, masks: Masks = masks, losses: dict[int, float] = losses) -> None:
            losses[which] = executor.train(start, examples, order, streams, masks=masks).loss

        times = milliseconds([lambda: act(0, dense), lambda: act(1, sparse)], seconds)
        plain, ours = (each / (EXAMPLES // BATCH) for each in times)
        found.append({"masks": kind, "density": density, "dense": plain, "sparse": ours, "ratio": plain / ours})
        found[-1]["loss_difference"] = abs(losses[0] - losses[1])
    return found


def random_masks(layout: Layout, densities: Sequence[float]) -> Masks:
    """Return random masks, each slot's of its density."""
    masks, draws = Masks.full(layout), torch.Generator().manual_seed(0)
    for slot, density in zip(layout.masked_slots, densities, strict=True):
        masks[slot.name].copy_(torch.rand(slot.shape, generator=draws) < density)
    return masks


def measure(out: Path | None, seconds: float) -> list[dict[str, Any]]:
    """Print both tables, and keep the figures in a file if one is given; return those of the second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        print(f"times as fast as dense, forward and backward, batch of {BATCH}, one thread")
        print(f"{'layer':38} {'dense ms':>8}" + "".join(f"{density:>7}" for density in LAYER_DENSITIES) + "  break-even")
        layers = []
        for subject in LAYERS:
            row = layer(subject, seconds)
            layers.append(row)
            print(
                f"{row['layer']:38} {row['dense']:8.2f}"
                + "".join(f"{ratio:7.2f}" for ratio in row["ratios"].values())
                + f"{row['break_even']:12.2f}",
                flush=True,
            )
        print("local.sparse_conv and local.sparse_linear pay up to the break-even of the layers that take most of the time.\n")
        print("local training of the CNN with 1.66 M parameters, a step")
        found = steps(4 * seconds)
        for step in found:
            goal = f"  (goal {GOALS[step['density']]})" if step["masks"] == "random" and step["density"] in GOALS else ""
            print(
                f"{step['masks']} masks, density {step['density']:<5}"
                f" dense {step['dense']:6.2f} ms  sparse {step['sparse']:6.2f} ms"
                f"  {step['ratio']:5.2f} times as fast{goal}  losses differ by {step['loss_difference']:.1e}"
            )
    finally:
        torch.set_num_threads(threads)
    if out:
        files.replace(out, json.dumps({"layers": layers, "steps": found, **environment()}, indent=2) + "\n")
    return found


def main() -> int:
    """Measure, and keep the figures in results/bench_kernels.json."""
    found = measure(Path("results/bench_kernels.json"), 4.0)
    history.add("kernels", {f"{step['masks']} {step['density']}": step["ratio"] for step in found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
