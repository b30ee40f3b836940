"""Every method at equal density on non-IID splits: `python -m fedsieve.bench.federated`, part of `make reproduce`.

    fashion-dirichlet, fashion-2classes  Fashion-MNIST, 12,000 examples, 20 clients, an MLP with 118,016 weights
    cifar-dirichlet, cifar-2classes      CIFAR-10, 5,000 examples, 20 clients, LeNet-5 with 61,770 weights and GroupNorm
    cifar-batchnorm                      by Dirichlet and with BatchNorm, for the methods that FedTiny is measured against
    phones                               activities from phone sensors, 36 users as they are, an MLP with 22,656 weights

Ten clients a round, seeds 0 and 1, two runs at a time, each on one core. First each method's learning rate is chosen in each
set of data, on training examples that are held out (`data.validation`), at one density, with a seed and a split of its own:
tuning.csv. All else are the methods' defaults. A run that is in results/federated already is not repeated, so the study can be
stopped and started again. Kept are each run's config.toml, summary.json and records.csv; table.md and a page for each scenario
are made of all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from csv import DictReader, DictWriter
from dataclasses import dataclass, field
from dataclasses import replace as changed
from io import StringIO
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsieve import files
from fedsieve.bench import study
from fedsieve.config import Config, from_name
from fedsieve.errors import Diverged
from fedsieve.report.table import markdown
from fedsieve.settings import Data, Engine, Model

FOLDER = Path("results/federated")
DENSITIES = (0.1, 0.05, 0.01)
SEEDS = (0, 1)
TUNING_DENSITY, TUNING_SEED, VALIDATION = 0.05, 100, 0.2
RATES = (0.03, 0.1, 0.3)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Data, who holds them, a network, and an accuracy whose cost is reported."""

    name: str
    data: Data
    model: Model
    rounds: int
    eval_every: int
    target: float
    """test accuracy in percent"""
    rates: str
    """scenario whose learning rates it takes; one that has its own name chooses them"""
    methods: tuple[str, ...] = ()
    """names of those that are played; empty: all"""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """algorithm -> settings that its methods have here"""

    def config(self, method: Method, density: float | None, seed: int, rate: float) -> Config:
        """Return the config of one run."""
        settings = {**method.settings, **self.settings.get(method.algorithm, {})}
        values = {f"algorithm.{key}": value for key, value in settings.items()}
        values |= {"local.epochs": 2, method.rate: rate}
        if density is not None:
            values["algorithm.density"] = density
        engine = Engine(
            rounds=self.rounds,
            cohort=10,
            seed=seed,
            eval_every=self.eval_every,
            eval_clients=36,
            eval_tune=1,
            checkpoint_every=20,
        )
        return changed(from_name(method.algorithm, values), data=self.data, model=self.model, engine=engine)

    def trial(self, method: Method, rate: float) -> Config:
        """Return the config of one run that learning rates are chosen by."""
        config = self.config(method, TUNING_DENSITY if method.sparse else None, TUNING_SEED, rate)
        engine = changed(config.engine, eval_every=self.rounds, eval_tune=0)
        return changed(config, data=changed(config.data, validation=VALIDATION), engine=engine)


@dataclass(frozen=True, slots=True)
class Method:
    """A method with the settings that are not its defaults."""

    name: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sparse: bool = True
    """it is played at each density"""
    rate: str = "local.lr"
    """its learning rate"""
    rates: tuple[float, ...] = RATES
    """from which it is chosen"""


def _fashion(**split: Any) -> Data:
    return Data(name="fashion-mnist", clients=20, train_limit=12_000, min_examples=10, **split)


def _cifar(**split: Any) -> Data:
    return Data(name="cifar10", clients=20, train_limit=5_000, test_limit=2_000, min_examples=10, **split)


DIRICHLET: dict[str, Any] = {"partition": "dirichlet", "alpha": 0.3}
TWO_CLASSES: dict[str, Any] = {"partition": "classes", "per_client": 2}
MLP, LENET, NORMALISED = Model(name="mlp"), Model(name="lenet", norm="group"), Model(name="lenet", norm="batch")
WISDM = Data(name="wisdm", partition="natural", clients=36)
HOME = ("fedavg", "snip", "synflow", "prunefl", "feddst", "fedtiny", "fedtiny-erk")
BY_STATISTICS = {"fedtiny": {"selection": "statistics"}}
SCENARIOS = (
    Scenario("fashion-dirichlet", _fashion(**DIRICHLET), MLP, 40, 2, 80.0, "fashion-dirichlet"),
    Scenario("fashion-2classes", _fashion(**TWO_CLASSES), MLP, 40, 2, 65.0, "fashion-dirichlet"),
    Scenario("cifar-dirichlet", _cifar(**DIRICHLET), LENET, 30, 5, 35.0, "cifar-dirichlet"),
    Scenario("cifar-2classes", _cifar(**TWO_CLASSES), LENET, 30, 5, 25.0, "cifar-dirichlet"),
    Scenario("cifar-batchnorm", _cifar(**DIRICHLET), NORMALISED, 30, 5, 35.0, "cifar-dirichlet", HOME, BY_STATISTICS),
    Scenario("phones", WISDM, MLP, 40, 2, 70.0, "phones"),
)
METHODS: tuple[Method, ...] = (
    Method("fedavg", "fedavg", sparse=False),
    Method("fedprox", "fedprox", sparse=False),
    Method("scaffold", "scaffold", sparse=False),
    Method("fednova", "fednova", sparse=False),
    Method("fedavgm", "fedavg", {"server.name": "momentum"}, sparse=False, rate="algorithm.server.lr", rates=(0.1, 0.3, 1.0)),
    *(
        Method(
            f"fed{name}", "fedavg", {"server.name": name}, sparse=False, rate="algorithm.server.lr", rates=(0.003, 0.01, 0.03)
        )
        for name in ("adagrad", "adam", "yogi")
    ),
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
    Method("prunefl", "prunefl", {"every": 4}),
    Method("feddst", "feddst", {"every": 4}),
    Method("fedtiny", "fedtiny", {"every": 3, "selection": "loss"}),
    Method("fedtiny-erk", "fedtiny", {"every": 3, "selection": "loss", "layers": "erk"}),
    Method("hidenseek", "hidenseek", rate="algorithm.lr", rates=(0.03, 0.1, 0.3, 1.0)),
    Method("fedmask", "fedmask", rate="algorithm.lr", rates=(0.1, 0.3, 1.0, 3.0)),
    Method("fedpm", "fedpm", rate="algorithm.lr", rates=(1.0, 10.0, 100.0, 1000.0)),
)
"""those that move their masks do so some ten times in a run: their papers have hundreds of rounds for it"""


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


def played(cell: Cell, seed: int, folder: Path) -> bool:
    """Whether a run is in the folder."""
    return (folder / cell.place / f"seed{seed}" / "summary.json").is_file()


def cells() -> Iterator[Cell]:
    """Yield the cells of the study, a scenario after another."""
    for scenario in SCENARIOS:
        for method in (each for each in METHODS if each.name in (scenario.methods or [each.name])):
            for density in DENSITIES if method.sparse else (None,):
                yield Cell(scenario, method, density)


class Tuning:
    """Which learning rate each method has in each set of data: chosen on held-out examples, kept in tuning.csv."""

    HEAD = ("scenario", "method", "rate", "client_accuracy", "accuracy")

    def __init__(self, folder: Path) -> None:
        self.path, self.rows = folder / "tuning.csv", list[dict[str, str]]()
        with suppress(FileNotFoundError), open(self.path, newline="") as file:
            self.rows = list(DictReader(file))

    def missing(self, scenario: Scenario, method: Method) -> list[float]:
        """Return the rates that are still to be tried."""
        return [rate for rate in method.rates if str(rate) not in self._tried(scenario, method)]

    def add(self, scenario: Scenario, method: Method, rate: float, found: Mapping[str, float]) -> None:
        """Keep what a trial came to."""
        values = (scenario.rates, method.name, rate, *(f"{found[key]:.4f}" for key in self.HEAD[3:]))
        self.rows.append(dict(zip(self.HEAD, map(str, values), strict=True)))
        text = StringIO()
        written = DictWriter(text, self.HEAD, lineterminator="\n")
        written.writeheader()
        written.writerows(self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self.path, text.getvalue())

    def rate(self, scenario: Scenario, method: Method) -> float:
        """Return the rate with the best mean accuracy over clients, of equals the smallest."""
        tried = {rate: found for rate, found in self._tried(scenario, method).items() if float(rate) in method.rates}
        return float(max(sorted(tried, key=float), key=lambda rate: tried[rate]))

    def _tried(self, scenario: Scenario, method: Method) -> dict[str, float]:
        mine = (row for row in self.rows if (row["scenario"], row["method"]) == (scenario.rates, method.name))
        return {row["rate"]: float(row["client_accuracy"]) for row in mine}


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
    "lr",
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
    body, tuning = [], Tuning(folder)
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
                f"{tuning.rate(scenario, cell.method):g}",
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
    """Play what is missing, and write tables and pages after each seed."""
    parser = argparse.ArgumentParser("python -m fedsieve.bench.federated", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no run after so many seconds; default: none")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where runs are kept; default: {FOLDER}")
    parser.add_argument(
        "--methods", nargs="+", choices=[method.name for method in METHODS], metavar="METHOD", help="only these"
    )
    known = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=known, metavar="SCENARIO", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on a core of its own; default: 2")
    options = parser.parse_args(words)
    asked = [
        cell
        for cell in cells()
        if cell.method.name in (options.methods or [cell.method.name])
        and cell.scenario.name in (options.scenarios or [cell.scenario.name])
    ]
    end, tuning = time.monotonic() + options.limit, Tuning(options.folder)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        choosers = [scenario for scenario in SCENARIOS if scenario.name in {cell.scenario.rates for cell in asked}]
        methods = [method for method in METHODS if method.name in {cell.method.name for cell in asked}]
        untried = [(*pair, rate) for pair in product(choosers, methods) for rate in tuning.missing(*pair)]
        for (scenario, method, rate), found in _played(pool, options.jobs, _try, untried, end):
            tuning.add(scenario, method, rate, found)
        for seed in SEEDS:
            left = [
                (cell, seed, tuning.rate(cell.scenario, cell.method), options.folder)
                for cell in asked
                if not played(cell, seed, options.folder)
            ]
            for (cell, *_), found in _played(pool, options.jobs, _play, left, end):
                megabytes = (found["bytes_up"] + found["bytes_down"]) / 1e6
                accuracy, density = found["accuracy"], found["density"]
                print(
                    f"{cell.place} seed {seed}: accuracy {accuracy:.4f}, density {density:.4f}, {megabytes:.2f} MB,"
                    f" {found['seconds']:.1f} s",
                    flush=True,
                )
            report(options.folder)
    return 0 if time.monotonic() < end else 1


def _played(
    pool: Executor, jobs: int, play: Callable[..., Mapping[str, Any]], tasks: Iterable[tuple[Any, ...]], end: float
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Yield tasks and what they came to, as they end; `jobs` at a time, none begun after `end`."""
    left, going = iter(tasks), dict[Future[Mapping[str, Any]], tuple[Any, ...]]()
    while True:
        while len(going) < jobs and time.monotonic() < end and (task := next(left, None)):
            going[pool.submit(play, *task)] = task
        if not going:
            return
        for done in wait(going, return_when=FIRST_COMPLETED).done:
            yield going.pop(done), done.result()


def _try(scenario: Scenario, method: Method, rate: float) -> dict[str, float]:
    """Return what a trial of a learning rate came to; 0 if it diverged."""
    with TemporaryDirectory() as folder:
        try:
            summary = scenario.trial(method, rate).run(Path(folder) / "run").summary
        except Diverged:
            found = dict.fromkeys(Tuning.HEAD[3:], 0.0)
        else:
            found = {"client_accuracy": summary["client_accuracy"]["mean"], "accuracy": summary["accuracy"]}
    said = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
    print(f"trial {scenario.name} {method.name} {rate:g}: {said}", flush=True)
    return found


def _play(cell: Cell, seed: int, rate: float, folder: Path) -> Mapping[str, Any]:
    """Play a run of the study."""
    return study.play(cell.scenario.config(cell.method, cell.density, seed, rate), folder, cell.place / f"seed{seed}") or {}


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
