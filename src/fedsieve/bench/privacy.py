"""Does membership inference fall as FedSparsify gets sparser? `python -m fedsieve.bench.privacy`, part of `make reproduce`.

The question of Stripelis et al. 2022 (arXiv 2208.11669), on other data than theirs, which are not public:

    fashion  Fashion-MNIST, 500 examples, an MLP with 118,016 weights, 60 rounds
    cifar    CIFAR-10, 500 examples, LeNet-5 with 61,770 weights, 25 rounds, momentum

Ten clients with about 50 examples each, Dirichlet 0.3, four local epochs, seeds 0 to 2. So few examples are learnt by heart:
the settings were chosen so that the losses of dense FedAvg give members away, before any sparse run was looked at. Each final
model is attacked as by `fedsieve audit`. A model that has learnt less by heart leaks less, sparse or not; so dense FedAvg is
also stopped early, and beside each sparse model stands what the attacks reach on a dense one of equal training accuracy.

A run that is in results/privacy already is not repeated. Kept are each run's config.toml, summary.json, records.csv and
audit.json (without curves); table.md and auc_density.svg are made of all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fedsieve import files
from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.algorithms.fedsparsify import FedSparsify
from fedsieve.bench import study
from fedsieve.config import Config
from fedsieve.data.batches import Federation
from fedsieve.engine.loop import Result
from fedsieve.finish.audit import audit, plan
from fedsieve.local.convolution import resolved
from fedsieve.models.spec import ModelSpec
from fedsieve.report.table import markdown
from fedsieve.settings import Data, Engine, Local, Model

FOLDER = Path("results/privacy")
SEEDS = (0, 1, 2)
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.01)
ATTACKS = ("loss", "shadow")
DENSE = "fedavg"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Data, a network, how it is trained, and after how many rounds dense FedAvg is looked at besides."""

    name: str
    data: Data
    model: Model
    local: Local
    rounds: int
    stops: tuple[int, ...]
    shadows: int


SPLIT: dict[str, Any] = {
    "clients": 10, "partition": "dirichlet", "alpha": 0.3, "train_limit": 500, "test_limit": 2000, "min_examples": 20,
}  # fmt: skip
SCENARIOS = (
    Scenario(
        "fashion",
        Data(name="fashion-mnist", **SPLIT),
        Model(name="mlp"),
        Local(epochs=4, lr=0.1),
        rounds=60,
        stops=(2, 4, 8, 15, 30, 90),
        shadows=4,
    ),
    Scenario(
        "cifar",
        Data(name="cifar10", **SPLIT),
        Model(name="lenet"),
        Local(epochs=4, lr=0.02, momentum=0.9),
        rounds=25,
        stops=(2, 5, 9, 15, 35),
        shadows=2,
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A method in a scenario."""

    scenario: Scenario
    name: str
    algorithm: FedAvg | FedSparsify
    rounds: int

    @property
    def place(self) -> Path:
        """Where its runs are kept."""
        return Path(self.scenario.name, self.name)

    def config(self, seed: int) -> Config:
        """Return the config of one run."""
        return Config(
            "fedavg" if isinstance(self.algorithm, FedAvg) else "fedsparsify",
            self.algorithm,
            data=self.scenario.data,
            model=self.scenario.model,
            local=self.scenario.local,
            engine=Engine(rounds=self.rounds, seed=seed, eval_every=5, eval_clients=0, checkpoint_every=20),
        )


def cells(scenario: Scenario) -> Iterator[Cell]:
    """Yield the cells of a scenario, dense ones first."""
    for stop in scenario.stops:
        yield Cell(scenario, f"{DENSE}-stopped-{stop}", FedAvg(), stop)
    yield Cell(scenario, DENSE, FedAvg(), scenario.rounds)
    for density in DENSITIES:
        yield Cell(scenario, f"fedsparsify-global-{density}", FedSparsify(density=density), scenario.rounds)
    yield Cell(scenario, "fedsparsify-local-0.1", FedSparsify(variant="local", density=0.1), scenario.rounds)


@lru_cache(maxsize=1)
def _prepared(data: Data, model: Model, seed: int) -> tuple[ModelSpec, Federation]:
    spec, federation, _ = Config(DENSE, FedAvg(), data=data, model=model, engine=Engine(seed=seed)).prepare()
    return spec, federation


def audited(config: Config, shadows: int, result: Result) -> dict[str, str]:
    """Attack the model of a run in which all clients took part; return its audit.json, without curves."""
    spec, data = _prepared(config.data, config.model, config.engine.seed)
    chosen = plan(data, result.rows, shadows=shadows, seed=config.engine.seed)
    rounds, init = config.engine.rounds, config.model.init
    told = audit(chosen, spec, result.params, data, resolved(config.local), init=init, rounds=rounds)
    del told["losses"]
    for attack in told["attacks"].values():
        del attack["roc"]
    return {"audit.json": json.dumps(told, indent=2) + "\n"}


@dataclass(frozen=True, slots=True)
class Found:
    """What one run came to."""

    density: float
    train: float
    """accuracy on the members, in percent"""
    test: float
    """accuracy on all test examples, in percent"""
    attacks: dict[str, dict[str, float]]
    """of each attack `auc`, `tpr_at_1_fpr` and `advantage`"""


def found(place: Path) -> dict[int, Found]:
    """Return what the runs of a cell came to, by seed."""
    runs = {}
    for path in sorted(place.glob("seed*/summary.json")):
        summary, told = json.loads(path.read_text()), json.loads((path.parent / "audit.json").read_text())
        runs[summary["seed"]] = Found(
            summary["density"],
            100 * told["accuracy"]["members"],
            100 * summary["accuracy"],
            {name: {key: attack[key]["value"] for key in MEASURES} for name, attack in told["attacks"].items()},
        )
    return runs


MEASURES = ("auc", "tpr_at_1_fpr", "advantage")


def alike(train: float, dense: Sequence[Found], attack: str) -> float | None:
    """Return the AUC of dense FedAvg where its training accuracy is so much, between two stops on the line that joins them.

    None where it is lower than at all stops, or higher.
    """
    points = sorted((each.train, each.attacks[attack]["auc"]) for each in dense)
    if not points or not points[0][0] <= train <= points[-1][0]:
        return None
    return float(np.interp(train, [at for at, _ in points], [auc for _, auc in points]))


def beyond(run: Found, dense: Sequence[Found], attack: str) -> float | None:
    """Return how much higher a run's AUC is than that of dense FedAvg of the same seed and training accuracy, see `alike`."""
    equal = alike(run.train, dense, attack)
    return None if equal is None else run.attacks[attack]["auc"] - equal


def dense(scenario: Scenario, folder: Path) -> dict[int, list[Found]]:
    """Return by seed what dense FedAvg came to, wherever it was stopped."""
    runs: dict[int, list[Found]] = {seed: [] for seed in SEEDS}
    for cell in cells(scenario):
        if isinstance(cell.algorithm, FedAvg):
            for seed, run in found(folder / cell.place).items():
                runs[seed].append(run)
    return runs


HEAD = (
    "run",
    "density",
    "seeds",
    "train %",
    "test %",
    "gap",
    *(f"{attack} {name}" for attack in ATTACKS for name in ("AUC", "TPR at 1 % FPR", "advantage")),
    *(f"{attack} AUC less that of dense of equal train %" for attack in ATTACKS),
)


def table(scenario: Scenario, folder: Path) -> str:
    """Return the table of a scenario over all runs that are in the folder: means and standard deviations over the seeds."""
    body, stopped = [], dense(scenario, folder)
    for cell in cells(scenario):
        runs = found(folder / cell.place)
        if not runs:
            continue
        each = list(runs.values())
        less = [[beyond(run, stopped[seed], attack) for seed, run in runs.items()] for attack in ATTACKS]
        body.append(
            [
                cell.name,
                f"{np.mean([run.density for run in each]):.4f}",
                str(len(runs)),
                spread([run.train for run in each], 1),
                spread([run.test for run in each], 1),
                spread([run.train - run.test for run in each], 1),
                *(spread([run.attacks[attack][key] for run in each], 3) for attack in ATTACKS for key in MEASURES),
                *("" if isinstance(cell.algorithm, FedAvg) else spread(values, 3) for values in less),
            ]
        )
    return markdown(HEAD, body)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Return mean and, of several, standard deviation; nothing if a value is missing."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return ""
    mean = f"{np.mean(there):.{digits}f}"
    return f"{mean} ± {np.std(there, ddof=1):.{digits}f}" if len(there) > 1 else mean


def draw(folder: Path) -> None:
    """Draw AUC against density, means over the seeds with their range, into auc_density.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedsieve", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        panels = figure.subplots(1, len(SCENARIOS), sharey=True, squeeze=False)[0]
        for axes, scenario in zip(panels, SCENARIOS, strict=True):
            stopped = dense(scenario, folder)
            whole = [cell for cell in cells(scenario) if cell.rounds == scenario.rounds]
            runs = {cell.name: found(folder / cell.place) for cell in whole}
            line = {name: each for name, each in runs.items() if each and "local" not in name}
            for color, attack in zip(("C0", "C1"), ATTACKS, strict=True):
                x = [np.mean([run.density for run in each.values()]) for each in line.values()]
                values = [[run.attacks[attack]["auc"] for run in each.values()] for each in line.values()]
                y = [np.mean(each) for each in values]
                axes.fill_between(
                    x, [min(each) for each in values], [max(each) for each in values], color=color, alpha=0.15, lw=0
                )
                axes.plot(x, y, "o-", color=color, ms=4, lw=1.4, label=f"{attack} attack")
                equal = [[alike(run.train, stopped[seed], attack) for seed, run in each.items()] for each in line.values()]
                means = [np.nan if None in each else np.mean(np.array(each, dtype=float)) for each in equal]
                axes.plot(x, means, "x--", color=color, ms=5, lw=0.9, label=f"{attack}, dense of equal train accuracy")
                if local := runs["fedsparsify-local-0.1"]:
                    at = np.mean([run.density for run in local.values()])
                    auc = np.mean([run.attacks[attack]["auc"] for run in local.values()])
                    axes.plot([at], [auc], "s", color=color, ms=5, fillstyle="none", label=f"{attack}, local variant")
            axes.axhline(0.5, color="#888888", lw=0.8, ls=":")
            axes.set(xscale="log", xlabel="density of the final model", title=scenario.name)
            axes.set_xticks([0.01, 0.05, 0.1, 0.2, 0.5, 1], ["0.01", "0.05", "0.1", "0.2", "0.5", "1"], minor=False)
            axes.minorticks_off()
            axes.grid(color="#dddddd", lw=0.6)
        panels[0].set_ylabel("AUC of the attack (0.5: guessing)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
        figure.savefig(folder / "auc_density.svg", metadata={"Date": None})


def report(folder: Path) -> None:
    """Write table and figure."""
    parts = [f"## {scenario.name}\n\n{table(scenario, folder)}" for scenario in SCENARIOS]
    files.replace(folder / "table.md", "\n".join(parts))
    draw(folder)


def main(words: Sequence[str] = ()) -> int:
    """Play and audit what is missing, and write table and figure after each seed."""
    parser = argparse.ArgumentParser("python -m fedsieve.bench.privacy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where runs are kept; default: {FOLDER}")
    folder = parser.parse_args(words).folder
    for seed in SEEDS:
        for cell in (cell for scenario in SCENARIOS for cell in cells(scenario)):
            began, config = time.monotonic(), cell.config(seed)
            place = cell.place / f"seed{seed}"
            if study.play(config, folder, place, partial(audited, config, cell.scenario.shadows)):
                run = found(folder / cell.place)[seed]
                reached = ", ".join(f"{attack} AUC {measures['auc']:.3f}" for attack, measures in run.attacks.items())
                print(
                    f"{place}: density {run.density:.4f}, train {run.train:.1f} %, test {run.test:.1f} %, {reached},"
                    f" {time.monotonic() - began:.1f} s",
                    flush=True,
                )
        report(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
