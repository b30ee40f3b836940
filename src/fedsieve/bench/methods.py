"""Studies that compare methods: each one's learning rate is chosen first, then every run is played, two at a time.

Rates are chosen on training examples that are held out (`data.validation`), with a seed and a split of their own, by the mean
accuracy over clients: two of a ladder are tried, and as long as the best is an outermost one the next beyond it. Taken is the
smallest that is within a point of the best, since the best itself is often the last that does not diverge. All trials are in
tuning.csv. In a trial a client that diverges is the end; in a run it is lost in that round, and counted. A rate by which a run
ends with no client left counts as one that diverged, for all runs that share the choice, and they are played anew.

A trial or a run that is in the folder is not repeated, but for runs whose settings have changed, so a study can be stopped
and started again. Kept are each run's config.toml, summary.json and records.csv; table.md and a page for each scenario are made
of all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from csv import DictReader, DictWriter
from dataclasses import dataclass, field, replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsieve import files
from fedsieve.bench import study
from fedsieve.config import Config, from_file, from_name
from fedsieve.errors import Diverged
from fedsieve.report.page import write_comparison
from fedsieve.report.records import flat, read
from fedsieve.report.table import markdown
from fedsieve.settings import Data, Engine, Model

SEEDS = (0, 1)
TUNING_SEED, VALIDATION, AS_GOOD = 100, 0.2, 0.01
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 3) for digit in (1, 3))
"""learning rates that are tried"""


@dataclass(frozen=True, slots=True)
class Method:
    """A method with the settings that are not its defaults."""

    name: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    densities: tuple[float | None, ...] = (0.1, 0.05, 0.01)
    """at which it is played; None: it has no density"""
    rate: str = "local.lr"
    """its learning rate"""
    first: tuple[float, float] = (0.1, 0.3)
    """that are tried first"""


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
    """of an algorithm, where they are others here"""

    def config(self, method: Method, density: float | None, seed: int, rate: float) -> Config:
        """Return the config of one run."""
        own = {**method.settings, **self.settings.get(method.algorithm, {})}
        values = {f"algorithm.{key}": value for key, value in own.items()}
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
            nonfinite="drop",
        )
        return replace(from_name(method.algorithm, values), data=self.data, model=self.model, engine=engine)

    def trial(self, method: Method, density: float | None, rate: float) -> Config:
        """Return the config of one run that learning rates are chosen by."""
        config = self.config(method, density, TUNING_SEED, rate)
        engine = replace(config.engine, eval_every=self.rounds, eval_tune=0, nonfinite="stop")
        return replace(config, data=replace(config.data, validation=VALIDATION), engine=engine)


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at a density in a scenario."""

    scenario: Scenario
    method: Method
    density: float | None

    @property
    def place(self) -> Path:
        """Where its runs are kept."""
        name = self.method.name if self.density is None else f"{self.method.name}-{self.density}"
        return Path(self.scenario.name, name)


@dataclass(frozen=True, slots=True)
class Study:
    """Methods in scenarios, and the folder for what they come to."""

    folder: Path
    scenarios: tuple[Scenario, ...]
    methods: tuple[Method, ...]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, a scenario after another."""
        for scenario in self.scenarios:
            for method in self.methods:
                if method.name in (scenario.methods or [method.name]):
                    yield from (Cell(scenario, method, density) for density in method.densities)

    def chooser(self, scenario: Scenario) -> Scenario:
        """Return the scenario in which the learning rates of one are chosen."""
        return next(each for each in self.scenarios if each.name == scenario.rates)


Trial = tuple[Scenario, Method, float | None, float]
"""of a learning rate, at a density"""


class Tuning:
    """Which learning rate each method has in each set of data, as tuning.csv says."""

    HEAD = ("scenario", "method", "density", "rate", "client_accuracy", "accuracy")

    def __init__(self, folder: Path) -> None:
        self.path, self.rows = folder / "tuning.csv", list[dict[str, str]]()
        with suppress(FileNotFoundError), open(self.path, newline="") as file:
            self.rows = list(DictReader(file))

    def missing(self, scenario: Scenario, method: Method, density: float | None) -> list[float]:
        """Return the rates that are to be tried next; none, if the best has been found."""
        tried = self._tried(scenario, method, density)
        if untried := [rate for rate in method.first if rate not in tried]:
            return untried
        best = LADDER.index(max(tried, key=lambda rate: tried[rate]))
        return [rate for rate in LADDER[max(0, best - 1) : best + 2] if rate not in tried]

    def add(self, trial: Trial, found: Mapping[str, float]) -> None:
        """Keep what a trial came to."""
        scenario, method, density, rate = trial
        name = "" if density is None else str(density)
        values = (scenario.rates, method.name, name, str(rate), *(f"{found[key]:.4f}" for key in self.HEAD[4:]))
        self.rows.append(dict(zip(self.HEAD, values, strict=True)))
        text = StringIO()
        written = DictWriter(text, self.HEAD, lineterminator="\n")
        written.writeheader()
        written.writerows(self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self.path, text.getvalue())

    def give_up(self, cell: Cell, rate: float) -> None:
        """Count a rate as one that diverged; nothing happens if all have."""
        if any(self._tried(cell.scenario, cell.method, cell.density).values()):
            self.add((cell.scenario, cell.method, cell.density, rate), {"client_accuracy": 0.0, "accuracy": 0.0})

    def rate(self, cell: Cell) -> float:
        """Return the smallest rate whose mean accuracy over clients is as good as the best."""
        tried = self._tried(cell.scenario, cell.method, cell.density)
        return next(rate for rate, accuracy in tried.items() if accuracy >= max(tried.values()) - AS_GOOD)

    def _tried(self, scenario: Scenario, method: Method, density: float | None) -> dict[float, float]:
        key = (scenario.rates, method.name, "" if density is None else str(density))
        mine = (row for row in self.rows if (row["scenario"], row["method"], row["density"]) == key)
        found = sorted(((float(row["rate"]), float(row["client_accuracy"])) for row in mine), reverse=True)
        return dict(sorted(dict(found).items()))  # the last of a rate is the least


# ---- playing


def main(compared: Study, program: str, about: str, words: Sequence[str]) -> int:
    """Play what is missing of a study, and write its tables and pages after each seed."""
    parser = argparse.ArgumentParser(program, description=about.partition("\n")[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no run after so many seconds; default: none")
    parser.add_argument("--folder", type=Path, default=compared.folder, help=f"where runs are kept; default: {compared.folder}")
    for name, known in (("methods", compared.methods), ("scenarios", compared.scenarios)):
        names = [each.name for each in known]
        parser.add_argument(f"--{name}", nargs="+", choices=names, default=names, metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on a core of its own; default: 2")
    options = parser.parse_args(words)
    asked = [
        cell for cell in compared.cells() if cell.method.name in options.methods and cell.scenario.name in options.scenarios
    ]
    end = time.monotonic() + options.limit
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:

        def each(play: Callable[..., Mapping[str, Any]], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            return _played(pool, options.jobs, play, tasks, end)

        tuning = Tuning(options.folder)
        while time.monotonic() < end:
            if untried := list(_untried(compared, asked, tuning)):
                for task, found in each(_try, untried):
                    tuning.add(task, found)
                continue
            if not (missing := _missing(asked, tuning, options.folder)):
                return 0
            for (cell, seed, *_), found in each(_play, missing):
                megabytes = (found["bytes_up"] + found["bytes_down"]) / 1e6
                accuracy, density, seconds = found["accuracy"], found["density"], found["seconds"]
                print(
                    f"{cell.place} seed {seed}: accuracy {accuracy:.4f}, density {density:.4f}, {megabytes:.2f} MB,"
                    f" {seconds:.1f} s",
                    flush=True,
                )
            report(compared, options.folder)
    return 1


def _missing(asked: Sequence[Cell], tuning: Tuning, folder: Path) -> list[tuple[Cell, int, float, Path]]:
    """Return the runs that are still to be played, after giving up the rates by which others ended with no client left."""
    found = []
    for seed in SEEDS:
        for cell in asked:
            rate = tuning.rate(cell)
            if _kept(cell, seed, rate, folder) and _lost_all(folder / cell.place / f"seed{seed}"):
                tuning.give_up(cell, rate)
    for seed in SEEDS:
        every = ((cell, seed, tuning.rate(cell), folder) for cell in asked)
        found += [task for task in every if not _kept(*task)]
    return found


def _lost_all(place: Path) -> bool:
    """Whether a run ended with no client that could be evaluated."""
    return json.loads((place / "summary.json").read_text())["client_accuracy"] is None


def _untried(compared: Study, asked: Sequence[Cell], tuning: Tuning) -> Iterator[Trial]:
    """Yield the trials that are still to be made for some cells, each once."""
    known = set[tuple[str, str, float | None]]()
    for cell in asked:
        scenario, density = compared.chooser(cell.scenario), cell.density
        if (key := (scenario.name, cell.method.name, density)) not in known:
            known.add(key)
            yield from ((scenario, cell.method, density, rate) for rate in tuning.missing(scenario, cell.method, density))


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


def _try(scenario: Scenario, method: Method, density: float | None, rate: float) -> dict[str, float]:
    """Return what a trial of a learning rate came to; 0 if it diverged."""
    with TemporaryDirectory() as folder:
        try:
            summary = scenario.trial(method, density, rate).run(Path(folder) / "run").summary
        except Diverged:
            found = {"client_accuracy": 0.0, "accuracy": 0.0}
        else:
            found = {"client_accuracy": summary["client_accuracy"]["mean"], "accuracy": summary["accuracy"]}
    said = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
    print(f"trial {Cell(scenario, method, density).place} rate {rate:g}: {said}", flush=True)
    return found


def _kept(cell: Cell, seed: int, rate: float, folder: Path) -> bool:
    """Whether a run is in the folder, with these settings."""
    place = folder / cell.place / f"seed{seed}"
    if not (place / "summary.json").is_file():
        return False
    was, now = from_file(place / "config.toml"), cell.scenario.config(cell.method, cell.density, seed, rate)
    return was == replace(now, local=replace(now.local, convolution=was.local.convolution))


def _play(cell: Cell, seed: int, rate: float, folder: Path) -> Mapping[str, Any]:
    """Play a run of the study, in the place of one with other settings."""
    place = cell.place / f"seed{seed}"
    shutil.rmtree(folder / place, ignore_errors=True)
    return study.play(cell.scenario.config(cell.method, cell.density, seed, rate), folder, place) or {}


# ---- what it came to


def report(compared: Study, folder: Path) -> None:
    """Write the tables of all scenarios, and a page for each."""
    parts = []
    for scenario in compared.scenarios:
        if any((folder / scenario.name).glob("*/seed*/summary.json")):
            parts.append(f"## {scenario.name}\n\n{table(compared, scenario, folder)}\n")
            write_comparison([folder / scenario.name], folder / f"{scenario.name}.html")
    files.replace(folder / "table.md", "\n".join(parts))


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


def table(compared: Study, scenario: Scenario, folder: Path) -> str:
    """Return the table of a scenario over all runs that are in the folder."""
    body = []
    for cell in (cell for cell in compared.cells() if cell.scenario is scenario):
        found = study.summaries(folder / cell.place)
        if not found:
            continue
        curves = [study.curve(path) for path in sorted((folder / cell.place).glob("seed*/records.csv"))]
        cost = reached(curves, scenario.target)
        rates = {flat(read(path.parent).config)[cell.method.rate] for path in (folder / cell.place).glob("seed*/summary.json")}
        accuracies = [100 * run["accuracy"] for run in found]
        clients = [_percent(found, "client_accuracy", key) for key in ("mean", "p10")]
        body.append(
            [
                cell.method.name,
                "" if cell.density is None else f"{cell.density:g}",
                " ".join(f"{rate:g}" for rate in sorted(rates)),
                f"{study.mean(found, 'density'):.4f}",
                f"{np.mean(accuracies):.1f}",
                " ".join(f"{accuracy:.1f}" for accuracy in accuracies),
                *clients,
                _percent(found, "tuned_accuracy", "mean"),
                f"{study.mean(found, 'bytes_up') / 1e6:.2f}",
                f"{study.mean(found, 'bytes_down') / 1e6:.2f}",
                *(("", "") if cost is None else (f"{cost[0]:.1f}", f"{cost[1]:.1f}")),
                f"{study.mean(found, 'flops') / 1e9:.1f}",
            ]
        )
    return markdown([name.format(target=f"{scenario.target:g}") for name in HEAD], body)


def _percent(found: Sequence[study.Summary], part: str, key: str) -> str:
    """Return the mean of an accuracy over clients, over the seeds; a dash, if one lost all its clients."""
    return f"{np.mean([100 * run[part][key] for run in found]):.1f}" if all(run[part] for run in found) else "–"


def reached(runs: Sequence[NDArray[np.float64]], target: float) -> tuple[float, float] | None:
    """Return megabytes and seconds until the accuracy is reached, means over the seeds; None if a seed does not reach it."""
    found = []
    for carried, seconds, accuracy in runs:
        places = np.flatnonzero(accuracy >= target)
        if not len(places):
            return None
        found.append((carried[places[0]], seconds[places[0]]))
    return tuple(np.mean(found, axis=0).tolist()) if found else None
