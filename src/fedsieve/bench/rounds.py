"""Rounds per second of dense FedAvg against a plain PyTorch loop, on Fashion-MNIST, in one run: `make bench`.

    J1  100 clients x 600 examples, 10 a round, convolutional network with 1.66 M parameters
    J2  the same with an MLP 784-200-200-10
    J3  1,000 clients x 60 examples, 100 a round, the MLP

One local epoch, batch 32, SGD, test accuracy every 5 rounds. The plain loop is one process with torch's default threads, data
prepared as normalised float tensors, `torch.optim.SGD`, and no bytes at all; fedsieve packs, counts, carries and unpacks every
message. Rounds of the two alternate, so that both see the same machine; the first five are not counted. For J2, J3 and a job of
many small steps (MLP 784-32-10, 600 clients x 100, 40 a round, 5 epochs, batch 10) rounds of clients one by one and in groups
(engine.group) take turns.

The limit is what the processor's matrix product would take for all multiplications and additions of a round, evaluation
included: a product of 1,024 x 1,024 numbers, one process of one thread for each worker at once, before and after the rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsieve import files
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.bench import history
from fedsieve.bench.codec import exchange_seconds
from fedsieve.data.batches import Federation, federate
from fedsieve.data.datasets import load
from fedsieve.engine.folder import environment
from fedsieve.engine.handle import Plan
from fedsieve.engine.loop import fit
from fedsieve.engine.round import Row, play
from fedsieve.engine.transports import Workers
from fedsieve.models.spec import build
from fedsieve.settings import Data, Engine, Local, Model
from fedsieve.streams import Streams

LR = 0.05
BATCH = 32
EVERY = 5
"""rounds between evaluations, and rounds that are not counted"""
GROUPS = (1, 5, 10)
"""clients that are trained in one batch"""


USUAL = Local(lr=LR, batch=BATCH)


@dataclass(frozen=True, slots=True)
class Task:
    """One measured job."""

    name: str
    model: Model
    clients: int
    cohort: int
    rounds: int
    """counted ones, a multiple of EVERY"""
    goal: float
    """ratio to reach with 2 workers"""
    local: Local = USUAL


TASKS = (
    Task("J1", Model(name="cnn"), 100, 10, 10, 1.6),
    Task("J2", Model(name="mlp", hidden=(200, 200)), 100, 10, 40, 1.5),
    Task("J3", Model(name="mlp", hidden=(200, 200)), 1000, 100, 30, 1.3),
)
SMALL = Task("small", Model(name="mlp", hidden=(32,)), 600, 40, 15, 1.0, Local(lr=LR, batch=10, epochs=5))


def measure(task: Task, workers: int = 2) -> dict[str, float]:
    """Play a task both ways, round by round in turn; return rounds per second, their ratio and the share of the codec."""
    settings = Data(name="fashion-mnist", clients=task.clients)
    data = federate(load(settings), settings, Streams(0))
    spec = build(task.model, data.shape, data.classes)
    plain_round = plain(data, textbook(task.model), task.cohort)
    ours, theirs, accuracy = [], [], [0.0, 0.0]
    threads = torch.get_num_threads()

    def watch(row: Row) -> None:
        evaluate = row["accuracy"] is not None
        torch.set_num_threads(threads)
        began = perf_counter()
        reached = plain_round(row["round"], evaluate)
        theirs.append(perf_counter() - began)
        torch.set_num_threads(1)
        ours.append(row["seconds"])
        if evaluate:
            accuracy[:] = row["accuracy"], reached

    before = matmul_flops(workers)
    engine = Engine(rounds=EVERY + task.rounds, cohort=task.cohort, workers=workers, eval_every=EVERY, eval_clients=0)
    fit(FedAvg(), model=spec, data=data, local=task.local, engine=engine, watch=watch)
    seconds, plain_seconds = statistics.fmean(ours[EVERY:]), statistics.fmean(theirs[EVERY:])
    codec = exchange_seconds(spec.layout, task.cohort)
    forward = sum(spec.flops.values())
    trained = task.cohort * len(data.parts[0])
    limit = (before + matmul_flops(workers)) / 2 / (forward * (3 * trained + len(data.test) / EVERY))
    return {
        "rounds_per_second": 1 / seconds,
        "plain_rounds_per_second": 1 / plain_seconds,
        "ratio": plain_seconds / seconds,
        "goal": task.goal,
        "limit_rounds_per_second": limit,
        "share_of_limit": 1 / seconds / limit,
        "codec_share": codec / seconds,
        "accuracy": accuracy[0],
        "plain_accuracy": accuracy[1],
    }


def matmul_flops(processes: int, seconds: float = 1.0) -> float:
    """Measure floating-point operations per second of matrix products, summed over processes of one thread that run at once."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_multiply, [0.0] * processes)  # until all have started
        return sum(pool.map(_multiply, [seconds] * processes, chunksize=1))


def _multiply(seconds: float, side: int = 1024) -> float:
    torch.set_num_threads(1)
    a, count, began = torch.randn(side, side), 0, perf_counter()
    while not count or perf_counter() - began < seconds:
        torch.mm(a, a)
        count += 1
    return 2 * side**3 * count / (perf_counter() - began)


def batched(task: Task, workers: int = 2) -> dict[int, float]:
    """Play a task one by one and in groups, round by round in turn; return rounds per second by size, over those one by one."""
    settings = Data(name="fashion-mnist", clients=task.clients)
    data = federate(load(settings), settings, Streams(0))
    spec = build(task.model, data.shape, data.classes)
    algorithm, rounds = FedAvg(), EVERY + task.rounds
    job = Job(spec, spec.initial("glorot", Streams(0)), rounds, task.clients, Streams(0))
    engine = Engine(rounds=rounds, cohort=task.cohort, eval_every=rounds, eval_clients=0)
    states = dict.fromkeys(GROUPS, algorithm.init(job))
    seconds: dict[int, list[float]] = {size: [] for size in GROUPS}
    with ExitStack() as opened:
        transports = {size: Workers(Plan(algorithm, spec, data, task.local, rounds, 0, size), workers) for size in GROUPS}
        for transport in transports.values():
            opened.callback(transport.close)
        for round in range(1, rounds):
            for size, transport in transports.items():
                began = perf_counter()
                states[size], _ = play(algorithm, states[size], round, job, engine, transport)
                seconds[size].append(perf_counter() - began)
    usual = {size: statistics.median(taken[EVERY:]) for size, taken in seconds.items()}
    return {size: usual[1] / taken for size, taken in usual.items()}


def textbook(model: Model) -> nn.Module:
    """Return the network as a tutorial writes it."""
    if model.name == "cnn":
        first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def plain(data: Federation, template: nn.Module, cohort: int) -> Callable[[int, bool], float]:
    """Return a function that plays one round of the plain loop and returns its test accuracy if asked."""
    x, y = _tensors(data.train.x, data.train.mean, data.train.std), data.train.y
    test_x, test_y = _tensors(data.test.x, data.test.mean, data.test.std), data.test.y
    parts = [torch.from_numpy(part) for part in data.parts]
    model, shared = deepcopy(template), deepcopy(template)
    rng = np.random.default_rng(0)

    def play(round: int, evaluate: bool) -> float:
        start = shared.state_dict()
        mean = {name: torch.zeros_like(value) for name, value in start.items()}
        chosen = rng.choice(len(parts), cohort, replace=False)
        total = sum(len(parts[client]) for client in chosen)
        for client in chosen:
            model.load_state_dict(start)
            optimiser = torch.optim.SGD(model.parameters(), lr=LR)
            part = parts[client]
            for batch in torch.split(part[torch.randperm(len(part))], BATCH):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            for name, value in model.state_dict().items():
                mean[name] += value * (len(part) / total)
        shared.load_state_dict(mean)
        if not evaluate:
            return 0.0
        with torch.no_grad():
            batches = zip(torch.split(test_x, 500), torch.split(test_y, 500), strict=True)
            correct = sum(int((shared(bx).argmax(1) == by).sum()) for bx, by in batches)
        return correct / len(test_y)

    return play


def _tensors(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (1, -1, 1, 1)
    return ((x.float() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()


def main() -> int:
    """Print a line a job, and keep the figures in results/bench_rounds.json."""
    chosen = [task for task in TASKS if not sys.argv[1:] or task.name in sys.argv[1:]]
    rows: list[dict[str, Any]] = []
    groups: dict[str, dict[int, float]] = {}
    for task in chosen:
        row = measure(task)
        rows.append({"job": task.name, **row})
        history.add("rounds", {task.name: row["ratio"]})
        print(
            f"{task.name}  {row['rounds_per_second']:.3f} rounds/s  plain {row['plain_rounds_per_second']:.3f}"
            f"  ratio {row['ratio']:.2f} (goal {row['goal']})  {row['share_of_limit']:.0%} of the limit"
            f"  codec {row['codec_share']:.1%} of a round  accuracy {row['accuracy']:.3f} / {row['plain_accuracy']:.3f}",
            flush=True,
        )
    for task in [task for task in (*chosen, SMALL) if task.model.name == "mlp"]:
        groups[task.name] = found = batched(task)
        history.add("rounds", {f"{task.name} in groups of {size}": ratio for size, ratio in found.items() if size > 1})
        print(f"{task.name}  in groups: " + "  ".join(f"{size}: {ratio:.2f}" for size, ratio in found.items()), flush=True)
    if len(chosen) == len(TASKS):
        files.replace(
            Path("results/bench_rounds.json"), json.dumps({"jobs": rows, "groups": groups, **environment()}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
