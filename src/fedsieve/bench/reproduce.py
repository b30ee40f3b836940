"""The FedSparsify study on Fashion-MNIST: `make reproduce`, or `python -m fedsieve.bench.reproduce [FOLDER]`.

The 118,282-parameter MLP, 10 clients that all take part, SGD with learning rate 0.02, batch 32, Glorot start (Stripelis et al.
2022, arXiv 2204.12430, settings of the published code), seeds 0 to 2:

    short  40 rounds of 2 local epochs; IID and 2 classes a client; dense FedAvg, FedSparsify global and local at four densities
    long   200 rounds of 4 local epochs, IID; dense FedAvg and FedSparsify global at density 0.05

A run that is in the folder already is not repeated, so that the study can be stopped and started again. For each run its
config.toml, summary.json and records.csv are kept; table.md and accuracy_megabytes.svg are made of all of them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedsieve import files
from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.algorithms.fedsparsify import FedSparsify
from fedsieve.bench import study
from fedsieve.config import Config
from fedsieve.report.table import markdown
from fedsieve.settings import Data, Engine, Local, Model

DENSITIES = (0.2, 0.1, 0.05, 0.01)
SEEDS = (0, 1, 2)
SPLITS: dict[str, dict[str, Any]] = {"iid": {"partition": "iid"}, "2classes": {"partition": "classes", "per_client": 2}}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: a method at a density on a split."""

    study: str
    split: str
    algorithm: Any

    @property
    def method(self) -> str:
        """Short name."""
        return (
            "fedavg" if isinstance(self.algorithm, FedAvg) else f"fedsparsify-{self.algorithm.variant}-{self.algorithm.density}"
        )

    @property
    def place(self) -> Path:
        """Where its runs are kept."""
        return Path(self.study, self.split, self.method)

    def config(self, seed: int) -> Config:
        """Return the config of one seed."""
        rounds, epochs = (40, 2) if self.study == "short" else (200, 4)
        return Config(
            "fedavg" if isinstance(self.algorithm, FedAvg) else "fedsparsify",
            self.algorithm,
            data=Data(name="fashion-mnist", clients=10, **SPLITS[self.split]),
            model=Model(name="mlp", init="glorot"),
            local=Local(epochs=epochs, batch=32, lr=0.02),
            engine=Engine(rounds=rounds, seed=seed, workers=2, checkpoint_every=20),
        )


def cells() -> Iterator[Cell]:
    """Yield the cells of the study in the order they are run."""
    for split in SPLITS:
        yield Cell("short", split, FedAvg())
        for variant in ("global", "local"):
            for density in DENSITIES:
                yield Cell("short", split, FedSparsify(variant=variant, density=density))
    yield Cell("long", "iid", FedAvg())
    yield Cell("long", "iid", FedSparsify(density=0.05))


def play(cell: Cell, seed: int, folder: Path) -> None:
    """Run one cell with one seed, or go on with it, and keep its small files."""
    found = study.play(cell.config(seed), folder, cell.place / f"seed{seed}")
    if found:
        print(
            f"{cell.study} {cell.split} {cell.method} seed {seed}: accuracy {found['accuracy']:.4f},"
            f" density {found['density']:.4f}",
            flush=True,
        )


def table(folder: Path) -> str:
    """Return the table over all runs that are in the folder."""
    body = []
    for cell in cells():
        found = study.summaries(folder / cell.place)
        if not found:
            continue
        dense = study.mean(study.summaries(folder / cell.study / cell.split / "fedavg"), "bytes_up", "bytes_down")
        carried = study.mean(found, "bytes_up", "bytes_down")
        accuracies = [100 * run["accuracy"] for run in found]
        body.append(
            [
                cell.study,
                cell.split,
                cell.method,
                str(len(found)),
                f"{statistics.fmean(accuracies):.2f}",
                f"{statistics.stdev(accuracies):.2f}" if len(found) > 1 else "",
                f"{statistics.fmean(100 * run['client_accuracy']['p10'] for run in found):.1f}",
                f"{statistics.fmean(run['density'] for run in found):.4f}",
                f"{statistics.fmean(run['bytes_up'] for run in found) / 1e6:.2f}",
                f"{statistics.fmean(run['bytes_down'] for run in found) / 1e6:.2f}",
                f"{dense / carried:.2f}" if dense else "",
                f"{statistics.fmean(run['seconds'] for run in found):.0f}",
            ]
        )
    head = [
        "study",
        "split",
        "method",
        "seeds",
        "accuracy %",
        "sd",
        "client p10 %",
        "density",
        "MB up",
        "MB down",
        "saving",
        "seconds",
    ]
    return markdown(head, body)


def draw(folder: Path) -> None:
    """Draw accuracy against megabytes of the short IID runs, mean over the seeds, into accuracy_megabytes.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedsieve", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="megabytes carried, up and down, all 10 clients", ylabel="test accuracy (%)")
        for cell in cells():
            runs = [study.curve(path) for path in sorted((folder / cell.place).glob("seed*/records.csv"))]
            if cell.study == "short" and cell.split == "iid" and runs:
                carried, _, accuracy = np.mean(runs, axis=0)
                local = cell.method.startswith("fedsparsify-local")
                (line,) = axes.plot(carried, accuracy, lw=1.4, ls="--" if local else "-", label=cell.method)
                axes.plot(carried[-1:], accuracy[-1:], "o", ms=4, color=line.get_color())
        axes.set(ylim=(78, 90))
        axes.grid(color="#dddddd", lw=0.6)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        figure.savefig(folder / "accuracy_megabytes.svg", metadata={"Date": None})


def main() -> int:
    """Run what is missing and write the table after each run."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/fedsparsify-fashion-mnist")
    for cell, seed in sorted(product(cells(), SEEDS), key=lambda job: (job[0].study != "short", job[1])):
        play(cell, seed, folder)
        files.replace(folder / "table.md", table(folder) + "\n")
        draw(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
