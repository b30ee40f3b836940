"""The commands of the command line. torch is imported only by what trains or reads tensors."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from dataclasses import replace as changed
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_origin

import tyro
from tyro.conf import Positional

from fedsieve import config as configs
from fedsieve.engine.nursery import warm_up
from fedsieve.errors import DataError, Diverged, Interrupted, UsageError
from fedsieve.settings import Data, Engine, Local, nearest

if TYPE_CHECKING:
    from fedsieve.config import Config
    from fedsieve.engine.loop import Result
    from fedsieve.report.records import Run
    from fedsieve.sweep import Point

T = TypeVar("T")

SHORT = {"data": "data.name", "model": "model.name", "seed": "engine.seed"} | {way: f"{way}.name" for way in configs.WAYS}

RUN_HELP = """Train, evaluate, record.

Examples:
  fedsieve run fedsparsify --data digits --algorithm.density 0.1
  fedsieve run mine.toml --local.lr 0.05 --seed 3

Every setting is also a key of a TOML file, and overrides it:
  [section]
  key = value

Short for --data.name, --model.name and --engine.seed:
  --data NAME, --model NAME, --seed N

Compress updates or broadcasts, and see the settings of that:
  --compress.up NAME, --compress.down NAME, together with --help
"""


def run_command(words: list[str]) -> None:
    """Train."""
    name = words.pop(0) if words and not words[0].startswith("-") else None
    path = Path(name) if name and name.endswith(".toml") else None
    helps = bool({"-h", "--help"} & set(words))
    if name is None and not helps:
        raise UsageError(
            "which algorithm? For example: fedsieve run fedsparsify --data digits. See `fedsieve list algorithms`."
        )
    if not helps:
        _workers_ahead(" ".join(words), path)
    written = configs.from_file(path) if path else None
    kinds = configs.sections(written.name if written else name or "fedavg", _compressors(words, written))
    if helps:
        _run_help(kinds, name or "NAME|FILE.toml")
    ways = {f"{way}.name": str for way in configs.WAYS}
    values = _values(words, configs.keys(kinds) | ways | {"out": str}, f"fedsieve run {name}")
    out = values.pop("out", None)
    config = configs.from_file(path, values) if path else configs.from_name(str(name), values)
    from fedsieve.engine.folder import fresh

    _train(config, Path(out) if out else fresh(f"{_stem(config.name)}-{_stem(config.data.name)}"))


def _compressors(words: list[str], written: Config | None) -> dict[str, str]:
    """Return which compressors words and file name, for only then their settings are known."""
    found = {f"compress.{way}": table["name"] for way, table in (written.link.tables() if written else {}).items()}
    for option, value in pairwise([*words, ""]):
        key, equals, given = option.partition("=")
        way = key.removeprefix("--").removesuffix(".name")
        name = given if equals else value
        if key.startswith("--") and way in configs.WAYS and name and not name.startswith("--"):
            found[way] = name
    return found


def _workers_ahead(words: str, path: Path | None) -> None:
    """Have workers load torch while this process does, if the words or the file ask for some."""
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    if re.search(r"\bworkers\W+[1-9]", f"{words}\n{text}"):
        warm_up()


def _run_help(kinds: Mapping[str, Any], name: str) -> NoReturn:
    """Print every setting with its default."""
    run_folder = Annotated[
        str,
        tyro.conf.arg(
            metavar="DIR", help="run folder to write, which must not exist", help_behavior_hint="(default: a new one in runs/)"
        ),
    ]
    tyro.cli(
        make_dataclass("Run", [*_nested(kinds), ("out", run_folder, field(default=""))]),
        args=["--help"],
        prog=f"fedsieve run {name}",
        description=RUN_HELP,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    raise AssertionError("tyro leaves after help")


def _nested(kinds: Mapping[str, Any]) -> list[Any]:
    """Return sections as fields of a dataclass: those of `compress` make one."""
    ways = {name.partition(".")[2]: kind for name, kind in kinds.items() if name in configs.WAYS}
    plain = [each for each in kinds.items() if each[0] not in configs.WAYS]
    return [*plain, ("compress", make_dataclass("Compress", list(ways.items())))] if ways else plain


def _values(words: list[str], known: Mapping[str, Any], program: str) -> dict[str, Any]:
    """Read `--key value` words; return key -> value as text, or a list of texts where the setting takes several.

    Raises:
        UsageError: an unknown option (the nearest is offered), or one without its value.
    """
    found: dict[str, Any] = {}
    while words:
        option, equals, value = words.pop(0).partition("=")
        key = SHORT.get(option[2:], option[2:].replace("-", "_"))
        if not option.startswith("--") or key not in known:
            near = nearest(option, [f"--{key}" for key in known])
            raise UsageError(f"no option {option!r}.{near}\n`{program} --help` shows all options.")
        several = get_origin(known[key]) is tuple
        values = [value] if equals else []
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.pop(0))
        if not values and not several:
            raise UsageError(f"{option} needs a value.\n`{program} --help` shows all options.")
        found[key] = values if several else None if values == ["None"] else values[0]
    return found


@dataclass(frozen=True)
class Sweep:
    """Run a grid of settings and seeds, and tabulate it.

    The file is a config with a table of keys that have several values:
      [sweep]
      "algorithm.name" = ["fedavg", "fedprox"]
      "fedprox.mu" = [0.01, 0.1]
      "engine.seed" = [0, 1, 2]

    All runs are checked before the first one.

    With the --out of an earlier sweep only what is missing there is run.

    Example: fedsieve sweep examples/sweep.toml --out runs/first
    """

    file: Positional[Path]
    """the sweep file"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder for the runs and their table; None: a new one in runs/"""
    pick: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """name the best setting by a key of the records, such as train_loss"""
    pick_by_test: bool = False
    """let --pick choose by test examples, and mark the choice; not needed where data.validation holds examples out"""


def sweep_command(words: list[str]) -> None:
    """Run a sweep."""
    asked = _parsed(Sweep, words, "fedsieve sweep")
    from fedsieve import sweep as sweeps
    from fedsieve.report import tally

    if asked.pick is None and asked.pick_by_test:
        raise UsageError("--pick-by-test goes with --pick KEY, such as --pick accuracy.")
    _workers_ahead("", asked.file)
    points = sweeps.grid(asked.file)
    if asked.pick is not None:
        tally.refuse(asked.pick, by_test=asked.pick_by_test or sweeps.held_out(points))
    from fedsieve.engine.folder import fresh

    out = asked.out or fresh(f"sweep-{_stem(asked.file.stem)}")
    points = sweeps.opened(out, points, asked.file)
    sweeps.check([point for point in points if not sweeps.complete(out / point.name)], asked.file)
    sweeps.write(out, points)
    try:
        for number, point in enumerate(points, 1):
            _run_point(point, out / point.name, f"run {number}/{len(points)}")
    except Interrupted:
        again = ["--out", str(out), *(["--pick", asked.pick] if asked.pick else []), *["--pick-by-test"] * asked.pick_by_test]
        line = shlex.join(["fedsieve", "sweep", str(asked.file), *again])
        print(f"interrupted; completed rounds are kept. To go on:\n{line}", file=sys.stderr)
        raise
    _tally(asked.file, out, points, asked.pick)


def _run_point(point: Point, folder: Path, which: str) -> None:
    """Run one point of a sweep with a progress line. That it diverges ends no sweep."""
    from fedsieve import sweep as sweeps
    from fedsieve.progress import Watch

    if sweeps.complete(folder):
        print(f"{which}  {point.name}: complete already")
        return
    print(f"{which}  {point.name}", flush=True)
    with Watch(point.config.engine.rounds, folder, which) as watch:
        try:
            sweeps.run(point, folder, watch)
        except Diverged as error:
            watch.close()
            print(f"{which}  {point.name} diverged: {str(error).splitlines()[0]}", file=sys.stderr)


def _tally(source: Path, out: Path, points: list[Point], pick: str | None) -> None:
    """Write and print what a sweep came to."""
    from rich.console import Console

    from fedsieve import files
    from fedsieve import sweep as sweeps
    from fedsieve.report import tally

    tallies = sweeps.tallied(out, points)
    picked = sweeps.choice(tallies, pick, by_test=not sweeps.held_out(points)) if pick else ""
    files.replace(out / "sweep.csv", tally.csv(tallies))
    files.replace(out / "sweep.md", sweeps.markdown_of(source, out, points, tallies, picked))
    Console().print(tally.table(tallies))
    print("\n".join(filter(None, [picked, f"table: {out / 'sweep.md'}, {out / 'sweep.csv'}"])))
    if not any(each.runs for each in tallies):
        raise Diverged(f"every run of {source} diverged. Try a smaller local.lr.")


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted, as if it had not been.

    Example: fedsieve resume runs/fedavg-digits-20260101-120000
    """

    folder: Positional[Path]
    """the run folder"""
    workers: Annotated[str | None, tyro.conf.arg(metavar="INT")] = None
    """worker processes, >= 0; None: as in its config. Results do not depend on it"""


def resume_command(words: list[str]) -> None:
    """Go on with a run."""
    asked = _parsed(Resume, words, "fedsieve resume")
    if not (asked.folder / "config.toml").is_file():
        raise UsageError(f"{asked.folder} is no run folder: it holds no config.toml. Start a run with `fedsieve run`.")
    if (asked.folder / "summary.json").is_file():
        print(f"{asked.folder} is complete already: nothing to do.")
        return
    own = {} if asked.workers is None else {"engine.workers": asked.workers}
    _workers_ahead(f"workers {asked.workers}", asked.folder / "config.toml")
    config = configs.from_file(asked.folder / "config.toml", own)
    _train(config, asked.folder, resume=True)


@dataclass(frozen=True)
class Report:
    """Write report.html, report.md and records.csv into a run folder.

    The page is one file that needs no network.

    Example: fedsieve report runs/fedavg-digits-20260101-120000
    """

    folder: Positional[Path]
    """the run folder"""


def report_command(words: list[str]) -> None:
    """Write the report of a run."""
    print(_report(_parsed(Report, words, "fedsieve report").folder))


@dataclass(frozen=True)
class Compare:
    """Compare runs: a table, and one page with accuracy against megabytes.

    On the page is a mark for each setting, its seeds taken together.

    Curves are of all settings, or of the Pareto front where they are over 12.

    Example: fedsieve compare runs/dense runs/sparse --out compare.html
    """

    folders: Positional[tuple[Path, ...]]
    """run folders, or folders that hold runs at any depth"""
    out: Path = Path("compare.html")
    """the page to write (replaced if it exists)"""


def compare_command(words: list[str]) -> None:
    """Compare runs."""
    asked = _parsed(Compare, words, "fedsieve compare")
    if not asked.folders:
        raise UsageError("which runs? For example: fedsieve compare runs/dense runs/sparse")
    _compare(asked.folders, asked.out)


@dataclass(frozen=True)
class Inspect:
    """Show what became of each layer: density, dead units, operations, masks.

    A table, and a page with plots; of an unfinished run what is known.

    Example: fedsieve inspect runs/sparse
    """

    folder: Positional[Path]
    """the run folder"""
    out: Path | None = None
    """the page to write; None: inspect.html in the run folder, with --json none"""
    json: bool = False
    """machine-readable, on standard output"""


def inspect_command(words: list[str]) -> None:
    """Inspect the layers of a run."""
    asked = _parsed(Inspect, words, "fedsieve inspect")
    from fedsieve.report.inspect import as_json, inspect, layers_table, sentences, write_page

    found = inspect(asked.folder, lambda: configs.from_file(asked.folder / "config.toml").prepare()[0])
    out = asked.out or (None if asked.json else asked.folder / "inspect.html")
    page = write_page(found, out) if out else None
    if asked.json:
        print(json.dumps(as_json(found), indent=2))
        return
    from rich.console import Console

    Console().print(layers_table(found))
    print("\n".join(sentences(found)))
    print(f"page: {page}")


@dataclass(frozen=True)
class Audit:
    """Attack the final model: does it tell who was in the training data?

    By its losses, and by shadow models: networks like it, trained on test data.

    Written are audit.json and audit.html.

    Example: fedsieve audit runs/sparse --shadows 16
    """

    folder: Positional[Path]
    """the run folder"""
    shadows: int = 8
    """shadow models, >= 0 (0: only the attack by losses)"""
    client: Annotated[int | None, tyro.conf.arg(metavar="CLIENT")] = None
    """only this client's examples are members; None: those of all clients"""
    seed: int = 0
    """seed of what is drawn, in [0, 2**63)"""
    out: Path | None = None
    """folder to write to; None: the run folder"""
    json: bool = False
    """machine-readable, on standard output"""


def audit_command(words: list[str]) -> None:
    """Attack the final model of a run."""
    asked = _parsed(Audit, words, "fedsieve audit")
    if asked.shadows < 0:
        raise UsageError(f"--shadows {asked.shadows}: it should be 0 or more.")
    if not 0 <= asked.seed < 2**63:
        raise UsageError(f"--seed {asked.seed}: it should be in [0, 2**63).")
    from fedsieve.report.records import read

    run = read(asked.folder)
    if "init" not in run.config.get("model", {}):
        raise UsageError(
            f"{asked.folder} was started from Python: its config.toml is not enough to build model and data again.\n"
            "Call fedsieve.finish.audit.plan and .audit on them there."
        )
    told = _audited(asked, run)
    from fedsieve import files
    from fedsieve.report.audit import audit_table, write_page

    out = asked.out or asked.folder
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(told, indent=2)
    files.replace(out / "audit.json", text + "\n")
    page = write_page(told, run, out / "audit.html")
    if asked.json:
        print(text)
        return
    from rich.console import Console

    Console().print(audit_table(told))
    print(f"page: {page}")


def _audited(asked: Audit, run: Run) -> dict[str, Any]:
    """Build what the run trained, and attack it."""
    from fedsieve.algorithms.base import Job
    from fedsieve.engine.round import took_part
    from fedsieve.finish.audit import audit, plan
    from fedsieve.finish.compact import final_params
    from fedsieve.local.convolution import resolved
    from fedsieve.progress import Bar
    from fedsieve.streams import Streams

    config = configs.from_file(asked.folder / "config.toml")
    spec, data, start = config.prepare()
    params = final_params(asked.folder, spec)
    if run.partition is not None and run.partition.get("hash") != data.manifest()["hash"]:
        raise DataError(
            f"the examples are not shared out as {asked.folder / 'partition.json'} says: the data have changed since the run.\n"
            "Put the data back that it was trained on (data.root)."
        )
    engine = config.engine
    job = Job(spec, start, engine.rounds, len(data.parts), Streams(engine.seed), engine.cohort)
    clients = took_part(job, engine, run.rows)
    chosen = plan(data, run.rows, shadows=asked.shadows, clients=clients, client=asked.client, seed=asked.seed)
    with Bar("shadow models", chosen.ticks) as bar:
        local = resolved(config.local)
        return audit(chosen, spec, params, data, local, init=config.model.init, rounds=engine.rounds, tick=bar.tick)


@dataclass(frozen=True)
class List:
    """List what there is to choose from.

    Example: fedsieve list algorithms --json
    """

    what: Annotated[
        Positional[Literal["algorithms", "compressors", "datasets", "models", "partitions"]], tyro.conf.arg(metavar="LIST")
    ]
    """which list: algorithms, compressors, datasets, models or partitions"""
    json: bool = False
    """machine-readable, on standard output"""


def list_command(words: list[str]) -> None:
    """List algorithms, compressors, datasets, models or partitions."""
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
    from rich.text import Text

    from fedsieve.report.records import show

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for entry in entries:
        name, title, *others = entry
        details = "; ".join(
            f"{key}: {show(list(entry[key]) if isinstance(entry[key], tuple) else entry[key])}" for key in others if entry[key]
        )
        table.add_row(entry[name], Text(entry[title]).append(f"\n{details}".rstrip(), style="dim"))
    Console().print(table)


@dataclass(frozen=True)
class Export:
    """Write the final model for use elsewhere.

    Written are:
      packed.safetensors  the weights kept, and where they stand
      model.pt            a PyTorch state dict, zeros where weights were pruned

    With --compact, without dead channels and neurons, the same function:
      compact.safetensors  a state dict; fedsieve.finish.compact.load makes a
                           module of it
      compact.json         widths, parameters and FLOPs before and after

    With --runtime sparse, for fast inference on a CPU:
      sparse.safetensors   as packed; fedsieve.load_sparse makes a function of
                           it. With --compact, dead parts are left out first

    Example: fedsieve export runs/sparse --compact --runtime sparse
    """

    folder: Positional[Path]
    """the run folder"""
    out: Path | None = None
    """folder to write to; None: export/ in the run folder"""
    compact: bool = False
    """also write the network without its dead channels and neurons"""
    multiple: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """widths of the compact network are multiples of it, >= 1, or whole"""
    runtime: Literal["none", "sparse"] = "none"
    """also write the network for inference over its kept weights"""
    values: Literal["fp32", "fp16"] = "fp32"
    """weights of packed and sparse files; fp16 rounds them"""


def export_command(words: list[str]) -> None:
    """Export the final model of a run."""
    asked = _parsed(Export, words, "fedsieve export")
    if asked.multiple < 1 or (asked.multiple > 1 and not asked.compact):
        raise UsageError(f"--multiple {asked.multiple}: it should be 1 or more, and goes with --compact.")
    from fedsieve.finish.export import export

    out = asked.out or asked.folder / "export"
    for path in export(asked.folder, out, asked.values):
        _written(path)
    if not asked.compact and asked.runtime == "none":
        return
    from fedsieve.finish import compact, runtime
    from fedsieve.finish.recipe import Recipe

    config = configs.from_file(asked.folder / "config.toml")
    spec, data, _ = config.prepare()
    recipe = Recipe.of(config.model, data)
    if asked.runtime == "sparse":
        _written(
            runtime.export(
                asked.folder, out, spec, recipe, compacted=asked.compact, multiple=asked.multiple, values=asked.values
            )
        )
    if asked.compact:
        *paths, sizes = compact.export(asked.folder, out, spec, recipe, multiple=asked.multiple)
        for path in paths:
            _written(path)
        _removed(sizes)


def _written(path: Path) -> None:
    print(f"{path}  {path.stat().st_size:,} bytes")


def _removed(sizes: Mapping[str, Any]) -> None:
    """Show what compaction removed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("outputs", "left", "inputs", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, widths in sizes["widths"].items():
        pairs = zip(widths["before"], widths["after"], strict=True)
        table.add_row(layer, *(f"{width:,}" for pair in pairs for width in pair))
    Console().print(table)
    for key, name in (("parameters", "parameters"), ("flops", "FLOPs")):
        before, after = sizes[key]["before"], sizes[key]["after"]
        print(f"{name}: {before:,} -> {after:,} ({after / before:.1%})")


@dataclass(frozen=True)
class Bench:
    """Measure this machine.

    kernels  sparse layers against dense ones, by density: what to set local.sparse_conv and local.sparse_linear to

    Example: fedsieve bench kernels
    """

    what: Positional[Literal["kernels"]]
    """what to measure"""
    seconds: float = 2.0
    """about how long each row may take, > 0"""
    out: Path | None = None
    """JSON file to write the figures to; None: they are only printed"""


def bench_command(words: list[str]) -> None:
    """Measure this machine."""
    asked = _parsed(Bench, words, "fedsieve bench")
    if asked.seconds <= 0:
        raise UsageError(f"--seconds {asked.seconds}: it should be more than 0.")
    from fedsieve.bench import kernels

    kernels.measure(asked.out, asked.seconds)


@dataclass(frozen=True)
class Demo:
    """Train FedSparsify and dense FedAvg, and compare them.

    On scikit-learn's handwritten digits, shared out unevenly among 10 clients.

    Example: fedsieve demo --rounds 30
    """

    rounds: int = 60
    """rounds, >= 2"""
    out: Path | None = None
    """folder for both runs and their comparison; None: a new one in runs/"""


def demo_command(words: list[str]) -> None:
    """Run the demo."""
    asked = _parsed(Demo, words, "fedsieve demo")
    if asked.rounds < 2:
        raise UsageError(f"--rounds {asked.rounds}: it should be 2 or more, for pruning begins in round 2.")
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
    from fedsieve.progress import Watch
    from fedsieve.report.records import read
    from fedsieve.report.table import summary_table

    with Watch(config.engine.rounds, out) as watch:
        try:
            result = config.run(out, resume=resume, watch=watch)
        except Interrupted:
            watch.close()
            if (out / "config.toml").is_file():
                print(
                    f"interrupted; completed rounds are kept. To go on:\nfedsieve resume {shlex.quote(str(out))}",
                    file=sys.stderr,
                )
            raise
    page = _report(out)
    watch.console.print(summary_table([read(out)]))
    print(f"report: {page}\nnext: fedsieve export {shlex.quote(str(out))}")
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

    from fedsieve.report.page import MOST_LINES, said_of_front, write_comparison
    from fedsieve.report.records import differences, find, groups, read, show
    from fedsieve.report.table import summary_table

    runs = [read(folder) for folder in find(folders)]
    if len(runs) > MOST_LINES:
        print(f"{len(runs)} runs of {len(groups(runs))} settings. On the Pareto front of accuracy against megabytes:")
        print("\n".join(f"  {name}: {came}" for name, came in said_of_front(runs)) or "  none: no run was evaluated")
    else:
        differing = {key: " | ".join(map(show, values)) for key, values in differences(runs).items()}
        print("; ".join(f"{key}: {values}" for key, values in differing.items()) or "the settings are equal")
        Console().print(summary_table(runs))
    print(f"page: {write_comparison([run.folder for run in runs], out)}")


def _parsed(kind: type[T], words: list[str], program: str) -> T:
    """Parse the words of a small command; a mistake is a UsageError of a few lines.

    Raises:
        UsageError: an unknown option (the nearest is offered), or a value of the wrong type.
    """
    options = ["-h", "--help", *(f"--{entry.name.replace('_', '-')}" for entry in fields(kind))]  # type: ignore[arg-type]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            raise UsageError(f"no option {option!r}.{nearest(option, options)}\n`{program} --help` shows all options.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, args=words, prog=program, description=cleandoc(kind.__doc__ or ""), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_condensed(said.getvalue())}\n`{program} --help` shows all options.") from None


def _condensed(box: str) -> str:
    """Take the message out of a framed error."""
    lines: Iterator[str] = (re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ \n") for line in box.splitlines())
    body = [line for line in lines if line]
    end = next((number for number, line in enumerate(body) if number and set(line) == {"─"}), len(body))
    return " ".join(line for line in body[:end] if not line.startswith("─"))[:400]


def _stem(name: str) -> str:
    """Make a name fit for a folder."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.rpartition("/")[2].rpartition(":")[2]).strip("-.") or "run"
