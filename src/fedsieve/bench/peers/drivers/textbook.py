"""What the drivers share: the job as it was handed over, the network as a tutorial writes it, and the record that goes back.

Runs in each peer's own environment, which has torch and numpy but not fedsieve.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EVALUATION_BATCH = 100


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Data, partition and settings of a job, as the .npz file holds them."""

    model: str
    """cnn or mlp"""
    clients: int
    cohort: int
    rounds: int
    lr: float
    batch: int
    every: int
    """rounds between evaluations"""
    processes: int
    """processors to use"""
    mean: list[float]
    """of the bytes, by channel: what they were normalised with"""
    std: list[float]
    x_train: Tensor
    """float32 (N, 1, 28, 28), normalised; or uint8 as they are stored"""
    y_train: Tensor
    """int64 (N,)"""
    x_test: Tensor
    y_test: Tensor
    parts: tuple[Tensor, ...]
    """positions in the training set, of each client"""
    cohorts: np.ndarray
    """clients of each round, shape (rounds, cohort)"""

    @classmethod
    def read(cls, path: str | Path, images: str = "x") -> Job:
        """Read a job, with the images normalised ("x") or as bytes ("bytes")."""
        with np.load(path) as file:
            settings = json.loads(str(file["settings"]))
            tensors = {
                f"{name}_{part}": torch.from_numpy(file[f"{kind}_{part}"])
                for part in ("train", "test")
                for name, kind in (("x", images), ("y", "y"))
            }
            parts = torch.split(torch.from_numpy(file["order"]), file["sizes"].tolist())
            return cls(**settings, **tensors, parts=parts, cohorts=file["cohorts"])

    def network(self) -> nn.Module:
        """Return a new network."""
        if self.model == "cnn":
            first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> float:
        """Return the accuracy of a network on the test images, in [0, 1]."""
        batches = zip(torch.split(self.x_test, EVALUATION_BATCH), torch.split(self.y_test, EVALUATION_BATCH), strict=True)
        return sum(int((network(x).argmax(1) == y).sum()) for x, y in batches) / len(self.y_test)


@dataclass(slots=True)
class Record:
    """When each round ended, by the clock that all processes of the machine share, and what accuracy was reached."""

    ends: list[float] = field(default_factory=list)
    """seconds of `time.monotonic`"""
    accuracy: dict[int, float] = field(default_factory=dict)
    """by round, in [0, 1]"""

    def ended(self, accuracy: float | None = None) -> None:
        """Note that a round ended, after its evaluation if it had one."""
        self.ends.append(time.monotonic())
        if accuracy is not None:
            self.accuracy[len(self.ends)] = accuracy

    def write(self, path: str | Path, package: str, setting: str, **more: Any) -> None:
        """Write the record as JSON."""
        known = {"version": version(package), "torch": torch.__version__, "setting": setting}
        Path(path).write_text(json.dumps({"ends": self.ends, "accuracy": self.accuracy, **known, **more}))
