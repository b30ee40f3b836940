"""Every method at equal density on non-IID splits: `python -m fedsieve.bench.federated`, part of `make reproduce`.

    fashion-dirichlet, fashion-2classes  Fashion-MNIST, 12,000 examples, 20 clients, an MLP with 118,016 weights
    cifar-dirichlet, cifar-2classes      CIFAR-10, 10,000 examples, 20 clients, LeNet-5 with 61,770 weights
    phones                               activities from phone sensors, 36 users as they are, an MLP with 22,656 weights

Ten clients a round, evaluation every two rounds, seeds 0 and 1; each method with its own defaults, nothing tuned against test
examples. A run that is in results/federated already is not repeated, so the study can be stopped and started again. Kept are
each run's config.toml, summary.json and records.csv; table.md and a figure for each scenario are made of all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsieve import files
from fedsieve.bench import study
from fedsieve.config import Config, from_name
from fedsieve.errors import FedsieveError
from fedsieve.report.table import markdown
from fedsieve.settings import Data, Engine, Local, Model

FOLDER = Path("results/federated")
DENSITIES = (0.1, 0.05, 0.01)
SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Data, who holds them, a network, and an accuracy whose cost is reported."""

    name: str
    data: Data
    model: Model
    local: Local
    rounds: int
    target: float
    """test accuracy in percent"""

    def config(self, method: Method, density: float | None, seed: int) -> Config:
        """Return the config of one run."""
        values = {f"algorithm.{key}": value for key, value in method.settings.items()}
        if density is not None:
            values["algorithm.density"] = density
        engine = Engine(
            rounds=self.rounds, cohort=10, seed=seed, workers=2, eval_every=2, eval_clients=36, eval_tune=1, checkpoint_every=20
        )
        config = from_name(method.algorithm, values)
        return changed(config, data=self.data, model=self.model, local=changed(self.local, **method.local), engine=engine)


@dataclass(frozen=True, slots=True)
class Method:
    """A method with the settings that are not its defaults."""

    name: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    sparse: bool = True
    """it is played at each density"""


def _fashion(**split: Any) -> Data:
    return Data(name="fashion-mnist", clients=20, train_limit=12_000, min_examples=10, **split)


def _cifar(**split: Any) -> Data:
    return Data(name="cifar10", clients=20, train_limit=10_000, test_limit=4_000, min_examples=10, **split)


DIRICHLET: dict[str, Any] = {"partition": "dirichlet", "alpha": 0.3}
TWO_CLASSES: dict[str, Any] = {"partition": "classes", "per_client": 2}
SCENARIOS = (
    Scenario("fashion-dirichlet", _fashion(**DIRICHLET), Model(name="mlp"), Local(epochs=2, lr=0.05), 40, 80.0),
    Scenario("fashion-2classes", _fashion(**TWO_CLASSES), Model(name="mlp"), Local(epochs=2, lr=0.05), 40, 65.0),
    Scenario("cifar-dirichlet", _cifar(**DIRICHLET), Model(name="lenet"), Local(epochs=2, lr=0.05), 30, 35.0),
    Scenario("cifar-2classes", _cifar(**TWO_CLASSES), Model(name="lenet"), Local(epochs=2, lr=0.05), 30, 25.0),
    Scenario(
        "phones",
        Data(name="wisdm", partition="natural", clients=36),
        Model(name="mlp"),
        Local(epochs=2, lr=0.05),
        40,
        70.0,
    ),
)
METHODS: tuple[Method, ...] = (
    Method("fedavg", "fedavg", sparse=False),
    Method("fedprox", "fedprox", sparse=False),
    Method("scaffold", "scaffold", sparse=False),
    Method("fednova", "fednova", sparse=False),
    Method("progfed", "progfed", sparse=False),
    Method("progfed-equal", "progfed", {"schedule": "equal"}, sparse=False),
    Method("fedsparsify-global", "fedsparsify"),
    Method("fedsparsify-local", "fedsparsify", {"variant": "local"}),
    Method("snip", "snip"),
    Method("grasp", "snip", {"score": "grasp"}),
    Method("synflow", "snip", {"score": "synflow"}),
    Method("random", "snip", {"score": "random", "allocation": "erk"}),
    Method("ssfl", "ssfl"),
    Method("oneshot", "oneshot"),
    Method("lotteryfl", "lotteryfl"),
    Method("sparsyfed", "sparsyfed"),
    Method("prunefl", "prunefl", {"every": 10}),
    Method("feddst", "feddst"),
    Method("fedtiny", "fedtiny", {"stop": 25}),
    Method("hidenseek", "hidenseek"),
    Method("fedmask", "fedmask"),
    Method("fedpm", "fedpm"),
)
"""prunefl and fedtiny move their masks as often as 30 or 40 rounds allow; their papers have hundreds"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at a density in a scenario."""

    scenario: Scenario
    method: Method
    density: float | None

    @property
    def name(self) -> str:
        """Method and density."""
        return self.method.name if self.density is None else f"{self.method.name}-{self.density}"

    @property
    def place(self) -> Path:
        """Where its runs are kept."""
        return Path(self.scenario.name, self.name)


def cells() -> Iterator[Cell]:
    """Yield the cells of the study, a scenario after another."""
    for scenario in SCENARIOS:
        for method in METHODS:
            for density in DENSITIES if method.sparse else (None,):
                yield Cell(scenario, method, density)


def reached(runs: Sequence[NDArray[np.float64]], target: float) -> tuple[float, float] | None:
    """Return megabytes and seconds until the accuracy is reached, means over the seeds; None if a seed does not reach it."""
    found = []
    for carried, seconds, accuracy in runs:
        places = np.flatnonzero(accuracy >= target)
        if not len(places):
            return None
        found.append((carried[places[0]], seconds[places[0]]))
    return tuple(np.mean(found, axis=0).tolist()) if found else None


HEAD = (
    "method",
    "asked",
    "density",
    "accuracy %",
    "seeds",
    "client mean %",
    "client p10 %",
    "tuned mean %",
    "MB up",
    "MB down",
    "MB to {target} %",
    "s to {target} %",
    "GFLOP",
)


def table(scenario: Scenario, folder: Path) -> str:
    """Return the table of a scenario over all runs that are in the folder."""
    body = []
    for cell in (cell for cell in cells() if cell.scenario is scenario):
        found = study.summaries(folder / cell.place)
        if not found:
            continue
        curves = [study.curve(path) for path in sorted((folder / cell.place).glob("seed*/records.csv"))]
        cost = reached(curves, scenario.target)
        accuracies = [100 * run["accuracy"] for run in found]
        clients = {key: np.mean([100 * run["client_accuracy"][key] for run in found]) for key in ("mean", "p10")}
        tuned = np.mean([100 * run["tuned_accuracy"]["mean"] for run in found])
        body.append(
            [
                cell.method.name,
                "" if cell.density is None else f"{cell.density:g}",
                f"{study.mean(found, 'density'):.4f}",
                f"{np.mean(accuracies):.1f}",
                " ".join(f"{accuracy:.1f}" for accuracy in accuracies),
                f"{clients['mean']:.1f}",
                f"{clients['p10']:.1f}",
                f"{tuned:.1f}",
                f"{study.mean(found, 'bytes_up') / 1e6:.2f}",
                f"{study.mean(found, 'bytes_down') / 1e6:.2f}",
                *(("", "") if cost is None else (f"{cost[0]:.1f}", f"{cost[1]:.1f}")),
                f"{study.mean(found, 'flops') / 1e9:.1f}",
            ]
        )
    return markdown([name.format(target=f"{scenario.target:g}") for name in HEAD], body)


def draw(scenario: Scenario, folder: Path) -> None:
    """Draw final accuracy against megabytes carried, a mark for each method and density, into SCENARIO.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    marks = dict(zip((None, *DENSITIES), ("*", "o", "s", "^"), strict=True))
    with rc_context({"svg.hashsalt": "fedsieve", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="megabytes carried, up and down", ylabel="test accuracy (%)", xscale="log")
        colors = {method.name: f"C{place % 10}" for place, method in enumerate(METHODS)}
        filled = {method.name: ("full", "none", "left")[place // 10] for place, method in enumerate(METHODS)}
        for cell in (cell for cell in cells() if cell.scenario is scenario):
            if found := study.summaries(folder / cell.place):
                name = cell.method.name
                axes.plot(
                    study.mean(found, "bytes_up", "bytes_down") / 1e6,
                    100 * study.mean(found, "accuracy"),
                    marks[cell.density],
                    color=colors[name],
                    ms=6,
                    fillstyle=filled[name],
                    label=name if cell.density in (None, DENSITIES[0]) else None,
                )
        axes.grid(color="#dddddd", lw=0.6)
        shapes = "  ".join(
            f"{'dense' if density is None else density}: {shape}"
            for density, shape in zip(marks, ("star", "circle", "square", "triangle"), strict=True)
        )
        axes.set_title(f"{scenario.name}: {shapes}", fontsize=9)
        figure.legend(fontsize=8, frameon=False, loc="outside right center")
        figure.savefig(folder / f"{scenario.name}.svg", metadata={"Date": None})


def main(words: Sequence[str] = ()) -> int:
    """Play what is missing, and write tables and figures after each method."""
    parser = argparse.ArgumentParser("python -m fedsieve.bench.federated", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no run after so many seconds; default: none")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where runs are kept; default: {FOLDER}")
    parser.add_argument(
        "--methods", nargs="+", choices=[method.name for method in METHODS], metavar="METHOD", help="only these"
    )
    known = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=known, metavar="SCENARIO", help="only these")
    options = parser.parse_args(words)
    end, failed = time.monotonic() + options.limit, 0
    for seed in SEEDS:
        for cell in cells():
            if time.monotonic() > end:
                return 1
            if cell.method.name not in (options.methods or [cell.method.name]):
                continue
            if cell.scenario.name not in (options.scenarios or [cell.scenario.name]):
                continue
            began = time.monotonic()
            try:
                found = study.play(
                    cell.scenario.config(cell.method, cell.density, seed), options.folder, cell.place / f"seed{seed}"
                )
            except FedsieveError as error:
                failed += 1
                print(f"{cell.place} seed {seed}: {error}", flush=True)
                continue
            if found:
                print(
                    f"{cell.place} seed {seed}: accuracy {found['accuracy']:.4f}, density {found['density']:.4f},"
                    f" {(found['bytes_up'] + found['bytes_down']) / 1e6:.2f} MB, {time.monotonic() - began:.1f} s",
                    flush=True,
                )
        report(options.folder)
    return 1 if failed else 0


def report(folder: Path) -> None:
    """Write the tables and the figures of all scenarios."""
    parts = []
    for scenario in SCENARIOS:
        if any((folder / scenario.name).glob("*/seed*/summary.json")):
            parts.append(f"## {scenario.name}\n\n{table(scenario, folder)}\n")
            draw(scenario, folder)
    files.replace(folder / "table.md", "\n".join(parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
