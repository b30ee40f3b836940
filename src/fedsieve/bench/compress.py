"""What compressors cost and keep, on a real update of J1's network: `python -m fedsieve.bench.compress`.

A client of J1 (`bench/rounds.py`) trains for one epoch on Fashion-MNIST; its update is compressed and decoded by each
compressor with its defaults. Printed are bytes, how many times fewer than of float32, bits a number, squared error over the
squared update, milliseconds to encode and to decode on one thread, and both over the time of the training. A cohort of ten
clients takes ten times all of these: the last column is the share of a round that compression adds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from fedsieve import files
from fedsieve.bench.rounds import TASKS
from fedsieve.compress.base import Arrived, Compressor, Frame, Parts, Support, find, names
from fedsieve.data.batches import federate
from fedsieve.data.datasets import load
from fedsieve.engine.folder import environment
from fedsieve.local.executor import Executor
from fedsieve.models.spec import build
from fedsieve.params import Params
from fedsieve.settings import Data
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, pack, unpack

REPEATS = 5
OUT = Path("results/bench_compress.json")


@dataclass(frozen=True, slots=True)
class Row:
    """One compressor on one update."""

    name: str
    nbytes: int
    ratio: float
    bits: float
    error: float
    encode_ms: float
    decode_ms: float
    share: float
    """of the time of training"""


def measure(compressor: Compressor, name: str, x: Tensor, support: Support, training: float) -> Row:
    """Compress one update some times, each in a round of its own."""
    encoding, decoding, size, errors = list[float](), list[float](), 0, list[float]()
    memory = compressor.start(1, support.layout.trainable)
    for round in range(1, REPEATS + 1):
        told = compressor.announce(memory, [0]).get(0, {})
        frame = Frame(support.sizes, Streams(0, round, 0), told=told, loss=1.0)
        began = perf_counter()
        written, _ = compressor.encode(x, frame)
        payload = pack(
            Message("train", round, support.layout, {f"update_{part}": section for part, section in written.items()})
        )
        encoding.append(perf_counter() - began)
        there = Frame(support.sizes, Streams(0, round, 0), told=told, loss=1.0)
        began = perf_counter()
        reply = Arrived(0, Parts(unpack(payload, support.layout), "update"), there, support)
        cohort = compressor.survey(memory, {0: reply}) if compressor.caps.joint else None
        decoded = compressor.estimate(reply, memory, cohort)
        decoding.append(perf_counter() - began)
        size = len(payload)
        errors.append(float((decoded - x).double().square().sum() / x.double().square().sum()))
    seconds = median(encoding), median(decoding)
    return Row(
        name=name,
        nbytes=size,
        ratio=4 * len(x) / size,
        bits=8 * size / len(x),
        error=sum(errors) / len(errors),
        encode_ms=1e3 * seconds[0],
        decode_ms=1e3 * seconds[1],
        share=sum(seconds) / training,
    )


def main() -> int:
    """Measure all, print and write."""
    torch.set_num_threads(1)
    task = TASKS[0]
    settings = Data(name="fashion-mnist", partition="iid", clients=task.clients)
    data = federate(load(settings), settings, Streams(0))
    spec = build(task.model, data.shape, data.classes)
    start = spec.initial("glorot", Streams(0))
    executor, taken = Executor(spec, task.local, 1), list[float]()
    for _ in range(3):
        began = perf_counter()
        trained = executor.train(start, data.train, data.parts[0], Streams(0, 1, 0))
        taken.append(perf_counter() - began)
    update: Params = trained.params - start
    support, training = Support(spec.layout), median(taken)
    print(f"J1: {spec.parameters:,} numbers, a client trains for {1e3 * training:.0f} ms")
    print(f"{'':14} {'bytes':>9} {'fewer':>7} {'bits':>7} {'error':>8} {'encode':>7} {'decode':>7} {'share':>7}")
    rows = []
    for name in names():
        row = measure(find(name)(), name, support.take(update.trainable), support, training)
        rows.append(row)
        print(
            f"{row.name:14} {row.nbytes:9,} {row.ratio:6.1f}x {row.bits:7.3f} {row.error:8.4f} {row.encode_ms:7.1f}"
            f" {row.decode_ms:7.1f} {row.share:7.1%}",
            flush=True,
        )
    told = {"training_ms": 1e3 * training, "rows": [asdict(row) for row in rows]} | environment()
    files.replace(OUT, json.dumps(told, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
