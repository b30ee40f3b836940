"""Sweeps: a grid of runs from one file, in one folder, and the table that they come to.

    DIR/sweep.json   the points, by the names of their run folders
    DIR/NAME/        a run folder for each point
    DIR/sweep.csv    one row a setting, its seeds taken together
    DIR/sweep.md     the same, with the grid, the choice and all runs

Importing this loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedsieve import config as configs
from fedsieve import files
from fedsieve.config import Config
from fedsieve.errors import DataError, FedsieveError, UsageError
from fedsieve.report import tally
from fedsieve.report.records import SEED, flat, outcome, read, show
from fedsieve.report.table import digits, markdown
from fedsieve.report.tally import Tally
from fedsieve.settings import nearest

NAME = "algorithm.name"
FILES = ("sweep.json", "sweep.csv", "sweep.md")
_EXAMPLE = '[sweep]\n"algorithm.name" = ["fedavg", "fedprox"]\n"engine.seed" = [0, 1, 2]'


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    name: str
    """of its run folder"""
    title: str
    """what it varies, in words, without the seed"""
    values: Mapping[str, Any]
    """what the grid sets, by the keys of the file"""
    config: Config


# ---- the grid


def grid(path: Path) -> list[Point]:
    """Read a sweep file: a config with a table `sweep` of keys, each with a list of values. The last key varies fastest.

    A key is `section.key`, or `METHOD.key` for a setting that only one of the methods is to vary.

    Raises:
        UsageError: no such file, an unknown key, a value out of range; file and line are named.
    """
    text, tables = configs.parsed(path)
    swept = tables.pop("sweep", None)
    axes = flat(swept) if isinstance(swept, dict) else {}
    if not axes:
        raise UsageError(f"{path} has no table [sweep] of settings with lists of values, for example:\n{_EXAMPLE}")
    written = {key: f"sweep.{key}" for key in axes}
    fixed = tables.get("algorithm", {})
    with configs.located(path, text, written):
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"{key} = {show(values)}: in [sweep] it should be a list of one value or more.")
        if not isinstance(fixed, dict):
            raise UsageError(f"algorithm = {fixed}: it should be a table.")
        compressing = _compressing(tables, axes)
        methods = axes.pop(NAME, None) or [fixed.get("name")]
        owned = {method: _own(method, axes, methods, compressing) for method in methods}
    points = []
    for method, own in owned.items():
        where = written | {setting: f"sweep.{key}" for setting, key in own.items()}
        for values in product(*(axes[key] for key in own.values())):
            with configs.located(path, text, where):
                config = configs.from_tables(
                    tables | {"algorithm": fixed | {"name": method}}, dict(zip(own, values, strict=True))
                )
            points.append(Point("", "", {NAME: method} | dict(zip(own.values(), values, strict=True)), config))
    return _named(points, [key for key, values in axes.items() if len(values) > 1 or key == SEED])


def _compressing(tables: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of every setting of the compressors that a sweep names, fixed or varied."""
    found = dict[str, Any]()
    fixed = flat({"compress": tables.get("compress", {})})
    for way in configs.WAYS:
        key = f"{way}.name"
        for name in axes.get(key, [fixed[key]] if key in fixed else []):
            found |= configs.keys(configs.compressor(way, name)) | {f"{way}.name": str}
    return found


def _own(method: Any, axes: Collection[str], methods: Collection[Any], compressing: dict[str, Any]) -> dict[str, str]:
    """Return the settings that a method varies, each with its key in the file."""
    if not isinstance(method, str):
        raise UsageError(f"{NAME} is no name: give that of a method in [algorithm], or a list of names in [sweep].")
    known, own = configs.keys(configs.sections(method)) | compressing, dict[str, str]()
    mine = {f"{method}{setting.removeprefix('algorithm')}": setting for setting in known if setting.startswith("algorithm.")}
    for key in axes:
        section = key.partition(".")[0]
        shared = section in ("algorithm", "compress") or section in configs.SECTIONS
        if not shared and not key.startswith(f"{method}."):
            if not any(key.startswith(f"{other}.") for other in methods):
                near = nearest(section, [*configs.SECTIONS, "algorithm", "compress", *methods])
                raise UsageError(f"{key}: {section} is no section, and no method of this sweep.{near}")
            continue
        setting = key if shared else mine.get(key)
        if setting is None or setting not in known:
            said = f"{key} is no setting{f' of {method}' * (section == 'algorithm')}.{nearest(key, known if shared else mine)}"
            hint = f'\nFor one method alone write "METHOD.{key.partition(".")[2]}".' * (section == "algorithm")
            raise UsageError(f"{said}{hint}")
        if setting in own:
            raise UsageError(f"{key} sets what {own[setting]} sets too.")
        own[setting] = key
    return own


def _named(points: Sequence[Point], varied: Sequence[str]) -> list[Point]:
    """Give each point a name for its folder and a title, of what it varies."""
    words = {key: key.rpartition(".")[2] for key in varied}
    last = list(words.values())
    words = {key: word if last.count(word) == 1 else ".".join(key.split(".")[-2:]) for key, word in words.items()}
    taken, found = set(FILES), []
    for point in points:
        pairs = [("", str(point.values[NAME]), "")]
        for key, word in words.items():
            if key in point.values:
                pairs.append(("" if key.endswith(".name") else word, show(point.values[key]), key))
        name = _free(re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(f"{word}{value}" for word, value, _ in pairs)), taken)
        taken.add(name)
        title = ", ".join(f"{word} {value}".strip() for word, value, key in pairs if key != SEED)
        found.append(replace(point, name=name, title=title))
    return found


def _free(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken, with a number if need be."""
    stem = name.strip("-.")[:100] or "run"
    return next(each for n in range(1, len(taken) + 2) if (each := stem + (f"-{n}" if n > 1 else "")) not in taken)


# ---- the folder


def opened(out: Path, points: Sequence[Point], source: Path) -> list[Point]:
    """Return the points of a grid, with the names that a folder has for them already. Nothing is written.

    Raises:
        UsageError: the folder is no sweep's, or has points that the grid lacks; or the grid has a run twice.
    """
    known = _known(out)
    taken, found = {*FILES, *known.values()}, dict[str, Point]()
    for point in points:
        key = _identity(point.config)
        if key in found:
            raise UsageError(f"{source} has a run twice: {found[key].name} and {point.name} come to the same settings.")
        found[key] = replace(point, name=known[key] if key in known else _free(point.name, taken))
        taken.add(found[key].name)
    if gone := [name for key, name in known.items() if key not in found]:
        raise UsageError(
            f"{out} has points that {source} does not have: {', '.join(gone[:3])}{', ...' * (len(gone) > 3)}.\n"
            "Points may be added to a sweep, not changed or removed: put the file back as it was, or give another --out."
        )
    for key, point in found.items():
        if (out / point.name / "config.toml").is_file() and _identity(_there(point, out / point.name)) != key:
            raise UsageError(f"{out / point.name} holds a run with other settings than that point. Give another --out.")
    return list(found.values())


def _known(out: Path) -> dict[str, str]:
    """Return the names of the points that a folder is for, by their identities."""
    path = out / "sweep.json"
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
            raise UsageError(f"{out} exists and is no folder of a sweep: it holds no sweep.json. Give another --out.")
        return {}
    try:
        tables = json.loads(path.read_bytes())["points"]
        return {_identity(configs.from_tables(table)): name for name, table in tables.items()}
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise DataError(f"{path} cannot be read: {error}. Give another --out.") from error


def _there(point: Point, folder: Path) -> Config:
    """Return the config of a run folder; what was chosen for the machine counts as the point has it."""
    config = configs.from_file(folder / "config.toml")
    if point.config.local.convolution == "fast":
        return replace(config, local=replace(config.local, convolution="fast"))
    return config


def _identity(config: Config) -> str:
    from fedsieve.engine.folder import identity

    return identity(config.tables())


def check(points: Sequence[Point], source: Path) -> None:
    """Check all that can be checked before round 1, with data and models, for each point.

    Raises:
        FedsieveError: of the first point that cannot be run, which is named.
    """
    alike: dict[Any, list[Point]] = {}
    for point in points:
        alike.setdefault((point.config.data, point.config.model, point.config.engine.seed), []).append(point)
    for first, *others in alike.values():
        point = first
        try:
            prepared = first.config.prepare()
            for point in (first, *others):
                point.config.check(prepared)
        except FedsieveError as error:
            raise type(error)(f"{source}, {point.name}: {error}") from error


def write(out: Path, points: Sequence[Point]) -> None:
    """Write down which points a folder is for."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {point.name: point.config.tables() for point in points}
    files.replace(out / "sweep.json", json.dumps({"version": 1, "points": tables}, indent=1) + "\n")


def complete(folder: Path) -> bool:
    """Return whether a run folder is complete."""
    return (folder / "summary.json").is_file()


def run(point: Point, folder: Path, watch: Callable[[dict[str, Any]], None]) -> None:
    """Run a point into its folder, or go on there."""
    resume, config = (folder / "config.toml").is_file(), point.config
    if resume:  # with the algorithms that were chosen for the machine where it began
        config = replace(config, local=configs.from_file(folder / "config.toml").local)
    config.run(folder, resume=resume, watch=watch)


# ---- what it came to


def tallied(out: Path, points: Sequence[Point]) -> list[Tally]:
    """Take the runs of each setting together; those that are not complete have diverged."""
    together: dict[str, list[Point]] = {}
    for point in points:
        setting = {key: value for key, value in point.values.items() if key != SEED}
        together.setdefault(json.dumps(setting, sort_keys=True, default=str), []).append(point)
    found = []
    for group in together.values():
        done = [read(out / point.name) for point in group if complete(out / point.name)]
        setting = {key: show(value) for key, value in group[0].values.items() if key != SEED}
        found.append(Tally(group[0].title, setting, done, len(group) - len(done)))
    return found


def held_out(points: Sequence[Point]) -> bool:
    """Whether all runs are evaluated on training examples that were held out, and none on test examples."""
    return all(point.config.data.validation for point in points)


def choice(tallies: Sequence[Tally], key: str, *, by_test: bool) -> str:
    """Say which setting is best by a key of its records, of all and of each method; a choice by test examples is marked."""
    chosen, value = tally.best(tallies, key)
    said = [f"picked by {'largest' if tally.largest(key) else 'least'} mean {key}: {chosen.title} ({digits(value, 'share')})"]
    methods = dict.fromkeys(each.setting[NAME] for each in tallies)
    for method in methods if len(methods) > 1 else ():
        with suppress(UsageError):  # all its runs may have diverged
            own, value = tally.best([each for each in tallies if each.setting[NAME] == method], key)
            said.append(f"of {method}: {own.title} ({digits(value, 'share')})")
    if by_test and key in tally.TEST:
        said.append("PICKED BY TEST EXAMPLES: test figures of what is picked are too good, for it was picked by them.")
    return "\n".join(said)


def markdown_of(source: Path, out: Path, points: Sequence[Point], tallies: Sequence[Tally], picked: str) -> str:
    """Return the page of a sweep: the table, the choice, the grid, all runs."""
    values: dict[str, dict[str, None]] = {}
    for point in points:
        for key, value in point.values.items():
            values.setdefault(key, {})[show(value)] = None
    axes = markdown(["key", "values"], [[key, ", ".join(each)] for key, each in values.items()], right=False)
    runs = [["run", "status", "accuracy %", "train loss"]]
    for point in points:
        if not complete(out / point.name):
            runs.append([point.name, "diverged", "–", "–"])
            continue
        found = read(out / point.name)
        accuracy, loss = outcome(found).accuracy, tally.measure(found, "train_loss")
        cells = ["–" if accuracy is None else digits(100 * accuracy, "percent"), "–" if loss is None else digits(loss)]
        runs.append([point.name, "done", *cells])
    chosen = "".join(f"- {line}\n" for line in picked.splitlines()) + "\n" * bool(picked)
    examples = "held-out training" if held_out(points) else "test"
    return (
        f"# Sweep {source.name}\n\n{tally.table_markdown(tallies)}\n"
        f"Means over the runs of a setting. Accuracy is that of the last evaluation, on {examples} examples, ± half of the\n"
        "95 % interval of its mean (Student's t over the seeds; n/a for one run). MB = 10^6 bytes, evaluation left out.\n\n"
        f"{chosen}## Grid\n\n{axes}\n"
        f"## Runs\n\n{markdown(runs[0], runs[1:])}"
    )
