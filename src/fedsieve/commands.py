"""The commands of the command line. torch is imported only by what trains or reads tensors."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from fedsieve import config as configs
from fedsieve.errors import Interrupted, UsageError
from fedsieve.settings import Data, Engine, Local, nearest

if TYPE_CHECKING:
    from fedsieve.config import Config
    from fedsieve.engine.loop import Result

T = TypeVar("T")

RUN_HELP = """Train. Every setting is also a key of a TOML file: [section] key = value.

Example: fedsieve run fedsparsify --data.name digits --algorithm.density 0.1 --engine.rounds 40
"""


def run_command(words: list[str]) -> None:
    """Train."""
    words = [f"{word}.name" if word in ("--data", "--model") else word for word in words]
    name = words.pop(0) if words and not words[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(words):
        raise UsageError(
            "which algorithm? For example: fedsieve run fedsparsify --data.name digits. See `fedsieve list algorithms`."
        )
    config = configs.from_file(Path(name)) if name and name.endswith(".toml") else configs.from_name(name or "fedavg")
    config, out = _overridden(config, words, f"fedsieve run {name or 'NAME|FILE.toml'}")
    from fedsieve.engine.folder import fresh

    _train(config, out or fresh(f"{_stem(config.name)}-{_stem(config.data.name)}"))


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted, as if it had not been.

    Example: fedsieve resume runs/fedavg-digits-20260101-120000
    """

    folder: Positional[Path]
    """the run folder"""
    workers: int | None = None
    """worker processes, instead of the number in its config: results do not depend on it"""


def resume_command(words: list[str]) -> None:
    """Go on with a run."""
    asked = _parsed(Resume, words, "fedsieve resume")
    if not (asked.folder / "config.toml").is_file():
        raise UsageError(f"{asked.folder} is no run folder: it holds no config.toml. Start a run with `fedsieve run`.")
    if (asked.folder / "summary.json").is_file():
        print(f"{asked.folder} is complete already: nothing to do.")
        return
    config = configs.from_file(asked.folder / "config.toml")
    if asked.workers is not None:
        config = changed(config, engine=changed(config.engine, workers=asked.workers))
    _train(config, asked.folder, resume=True)


@dataclass(frozen=True)
class Report:
    """Write report.html (one page that needs no network), report.md and records.csv into a run folder.

    Example: fedsieve report runs/fedavg-digits-20260101-120000
    """

    folder: Positional[Path]
    """the run folder"""


def report_command(words: list[str]) -> None:
    """Write the report of a run."""
    print(_report(_parsed(Report, words, "fedsieve report").folder))


@dataclass(frozen=True)
class Compare:
    """Compare runs: the settings that differ, a table, and one page with all curves.

    Example: fedsieve compare runs/dense runs/sparse --out compare.html
    """

    folders: Positional[tuple[Path, ...]]
    """the run folders"""
    out: Path = Path("compare.html")
    """the page to write (replaced if it exists)"""


def compare_command(words: list[str]) -> None:
    """Compare runs."""
    asked = _parsed(Compare, words, "fedsieve compare")
    if not asked.folders:
        raise UsageError("which runs? For example: fedsieve compare runs/dense runs/sparse")
    _compare(asked.folders, asked.out)


@dataclass(frozen=True)
class List:
    """List what there is to choose from.

    Example: fedsieve list algorithms --json
    """

    what: Positional[Literal["algorithms", "datasets", "models", "partitions"]]
    """which list"""
    json: bool = False
    """machine-readable, on standard output"""


def list_command(words: list[str]) -> None:
    """List algorithms, datasets, models or partitions."""
    from fedsieve.catalogue import LISTS

    if words and words[0] not in LISTS and not words[0].startswith("-"):
        raise UsageError(f"no list {words[0]!r}.{nearest(words[0], LISTS)} There are {', '.join(LISTS)}.")
    asked = _parsed(List, words, "fedsieve list")
    entries = LISTS[asked.what]()
    if asked.json:
        print(json.dumps({"version": 1, asked.what: entries}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*entries[0], box=None, header_style="bold", pad_edge=False)
    for entry in entries:
        table.add_row(*(str(value) for value in entry.values()))
    Console().print(table)


@dataclass(frozen=True)
class Export:
    """Write the final model for use elsewhere.

    packed.safetensors holds only the weights kept and one bit a weight for where they stand; model.pt is a plain PyTorch
    state dict with zeros where weights were pruned. Example: fedsieve export runs/sparse
    """

    folder: Positional[Path]
    """the run folder"""
    out: Path | None = None
    """folder to write to; default: export/ in the run folder"""


def export_command(words: list[str]) -> None:
    """Export the final model of a run."""
    asked = _parsed(Export, words, "fedsieve export")
    from fedsieve.finish.export import export

    for path in export(asked.folder, asked.out or asked.folder / "export"):
        print(f"{path}  {path.stat().st_size:,} bytes")


@dataclass(frozen=True)
class Demo:
    """Train FedSparsify and dense FedAvg on scikit-learn's handwritten digits: 10 clients, Dirichlet split, no download."""

    rounds: int = 60
    """rounds, >= 2"""
    out: Path | None = None
    """folder for both runs and their comparison; default: a new one in runs/"""


def demo_command(words: list[str]) -> None:
    """Run the demo."""
    asked = _parsed(Demo, words, "fedsieve demo")
    from fedsieve.engine.folder import fresh

    parent = asked.out or fresh("demo")
    settings: dict[str, Any] = {
        "data": Data(name="digits", partition="dirichlet", alpha=0.3, min_examples=10),
        "local": Local(epochs=2, batch=16, lr=0.1),
        "engine": Engine(rounds=asked.rounds),
    }
    folders = []
    methods: list[tuple[str, dict[str, Any]]] = [("fedavg", {}), ("fedsparsify", {"density": 0.1})]
    for name, own in methods:
        config = configs.from_name(name)
        print(f"\n{name}: 10 clients, Dirichlet(0.3), {asked.rounds} rounds")
        _train(changed(config, algorithm=changed(config.algorithm, **own), **settings), parent / name)
        folders.append(parent / name)
    _compare(folders, parent / "compare.html")


def _train(config: Config, out: Path, *, resume: bool = False) -> Result:
    """Run or resume a config with a progress line, and report it."""
    from fedsieve.engine.loop import fit
    from fedsieve.progress import Watch
    from fedsieve.report.records import read
    from fedsieve.report.table import summary_table

    spec, data, start = config.prepare()
    with Watch(config.engine.rounds) as watch:
        try:
            result = fit(
                config.algorithm,
                model=spec,
                data=data,
                local=config.local,
                engine=config.engine,
                start=start,
                out=out,
                resume=resume,
                config=config.tables(),
                watch=watch,
            )
        except Interrupted:
            watch.close()
            done = f"interrupted after round {watch.round} of {config.engine.rounds}; completed rounds are kept"
            print(f"{done}\nfedsieve resume {out}", file=sys.stderr)
            raise
    page = _report(out)
    watch.console.print(summary_table([read(out)]))
    print(f"report: {page}\nnext: fedsieve export {out}")
    return result


def _report(folder: Path) -> Path:
    from fedsieve import files
    from fedsieve.report.page import write_report
    from fedsieve.report.records import read
    from fedsieve.report.table import csv

    found = read(folder)
    files.replace(folder / "records.csv", csv(found))
    return write_report(folder)


def _compare(folders: list[Path] | tuple[Path, ...], out: Path) -> None:
    from rich.console import Console

    from fedsieve.report.page import write_comparison
    from fedsieve.report.records import differences, read, show
    from fedsieve.report.table import summary_table

    runs = [read(folder) for folder in folders]
    differing = differences(runs)
    print("; ".join(f"{key}: {' | '.join(map(show, values))}" for key, values in differing.items()) or "the settings are equal")
    Console().print(summary_table(runs))
    print(f"page: {write_comparison(folders, out)}")


def _overridden(config: Config, words: list[str], program: str) -> tuple[Config, Path | None]:
    """Apply `--section.key value` words to a config."""
    sections = ("algorithm", *configs.SECTIONS)
    entries: list[Any] = [(name, type(getattr(config, name)), field(default=getattr(config, name))) for name in sections]
    entries.append(
        (
            "out",
            Annotated[
                Path | None, tyro.conf.arg(help="run folder to write, which must not exist; default: a new one in runs/")
            ],
            field(default=None),
        )
    )
    kind = make_dataclass("Run", entries, frozen=True)
    kind.__doc__ = RUN_HELP
    chosen = _parsed(kind, words, program, names=[*configs.keys(config), "out"])
    return changed(config, **{name: getattr(chosen, name) for name in sections}), chosen.out


def _parsed(kind: Callable[..., T], words: list[str], program: str, names: list[str] | None = None) -> T:
    """Parse a command's words; a mistake is a UsageError of a few lines.

    Raises:
        UsageError: an unknown option (the nearest is offered), or a value of the wrong type.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(kind, args=words, prog=program, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_condensed(said.getvalue())}\n`{program} --help` shows all options.") from None
    if unknown:
        word = unknown[0].split("=")[0]
        options = (
            [f"--{name}" for name in names] if names else [f"--{name}" for name in getattr(kind, "__dataclass_fields__", {})]
        )
        raise UsageError(f"no option {word!r}.{nearest(word, options)}\n`{program} --help` shows all options.")
    return parsed


def _condensed(box: str) -> str:
    """Take the message out of a framed error."""
    lines: Iterator[str] = (re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ \n") for line in box.splitlines())
    body = [line for line in lines if line]
    end = next((number for number, line in enumerate(body) if number and set(line) == {"─"}), len(body))
    return " ".join(line for line in body[:end] if not line.startswith("─"))[:400]


def _stem(name: str) -> str:
    """Make a name fit for a folder."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.rpartition("/")[2].rpartition(":")[2]).strip("-.") or "run"
