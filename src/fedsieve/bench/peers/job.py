"""A measured job as the drivers read it: one .npz file with data, partition, cohorts and settings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from fedsieve.algorithms.base import Job
from fedsieve.bench.rounds import BATCH, EVERY, LR, Task
from fedsieve.data.batches import Examples, Federation
from fedsieve.engine.round import draw
from fedsieve.models.spec import build
from fedsieve.settings import Engine
from fedsieve.streams import Streams


def write(task: Task, data: Federation, rounds: int, path: Path) -> None:
    """Write a job: images as normalised float32 and as bytes, who holds which, and who takes part in each round with seed 0."""
    streams = Streams(0)
    spec = build(task.model, data.shape, data.classes)
    job = Job(spec, spec.initial("module", streams), rounds, len(data.parts), streams)
    engine = Engine(rounds=rounds, cohort=task.cohort)
    settings = {
        "model": task.model.name,
        "clients": len(data.parts),
        "cohort": task.cohort,
        "rounds": rounds,
        "lr": LR,
        "batch": BATCH,
        "every": EVERY,
        "processes": min(2, os.cpu_count() or 1),
        "mean": data.train.mean,
        "std": data.train.std,
    }
    np.savez(
        path,
        settings=np.array(json.dumps(settings)),
        x_train=_normalised(data.train),
        bytes_train=data.train.x.contiguous().numpy(),
        y_train=data.train.y.numpy(),
        x_test=_normalised(data.test),
        bytes_test=data.test.x.contiguous().numpy(),
        y_test=data.test.y.numpy(),
        order=np.concatenate(data.parts),
        sizes=np.array([len(part) for part in data.parts]),
        cohorts=np.array([draw(job, engine, round) for round in range(1, rounds + 1)]),
    )


def _normalised(examples: Examples) -> np.ndarray:
    """All images, float32 (N, C, H, W), contiguous in that order."""
    ((images, _),) = examples.epoch(np.arange(len(examples)), len(examples))
    return images.contiguous().numpy()
