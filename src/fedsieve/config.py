"""A whole run as text: TOML and command line -> frozen settings, strictly, and settings -> a run that is ready to start."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from fedsieve.errors import UsageError
from fedsieve.settings import Data, Engine, Local, Model, as_table, checked, nearest

if TYPE_CHECKING:
    from fedsieve.compress.base import Compressor
    from fedsieve.data.batches import Federation
    from fedsieve.engine.link import Link
    from fedsieve.engine.loop import Result
    from fedsieve.models.spec import ModelSpec
    from fedsieve.params import Params

SECTIONS: dict[str, Any] = {"data": Data, "model": Model, "local": Local, "engine": Engine}
WAYS = {"compress.up": "clients' updates", "compress.down": "broadcasts"}
"""sections that are there only if something is compressed, and what they compress"""


@dataclass(frozen=True)
class Config:
    """The sections of a run; `algorithm` is the method object itself."""

    name: str
    """name of the algorithm"""
    algorithm: Any
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    local: Local = field(default_factory=Local)
    engine: Engine = field(default_factory=Engine)
    up: Compressor | None = None
    """compresses clients' updates; None: nothing does"""
    down: Compressor | None = None
    """compresses broadcasts"""

    @property
    def link(self) -> Link:
        """What compresses models on their way. UsageError if that cannot be."""
        from fedsieve.engine.link import Link

        return Link(self.up, self.down)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return the resolved settings as TOML tables: read back, they are this config again."""
        tables = {section: as_table(getattr(self, section)) for section in SECTIONS}
        tables = {"algorithm": {"name": self.name} | as_table(self.algorithm)} | tables
        return tables | ({"compress": self.link.tables()} if self.up or self.down else {})

    def run(self, out: Path, *, resume: bool = False, watch: Callable[[dict[str, Any]], None] = lambda row: None) -> Result:
        """Run it into a run folder, or go on there, as `fit` does."""
        from fedsieve.engine.loop import fit
        from fedsieve.local.convolution import resolved

        local = resolved(self.local)
        spec, data, start = self.prepare()
        return fit(
            self.algorithm,
            model=spec,
            data=data,
            local=local,
            engine=self.engine,
            link=self.link,
            start=start,
            out=out,
            resume=resume,
            config=replace(self, local=local).tables(),
            watch=watch,
        )

    def check(self, prepared: tuple[ModelSpec, Federation, Params] | None = None) -> None:
        """Raise what `run` would raise before round 1; `prepared` is what `prepare` returned, if it was called."""
        from fedsieve.engine.link import LinkState
        from fedsieve.engine.loop import job_of
        from fedsieve.engine.round import draw
        from fedsieve.local.convolution import resolved

        spec, data, start = prepared or self.prepare()
        LinkState.start(self.link, len(data.parts), spec.layout)
        job = job_of(spec, data, resolved(self.local), self.engine, start)
        state = self.algorithm.init(job)
        self.link.check(self.algorithm.broadcast(state, draw(job, self.engine, 1)) if self.link else {})

    def prepare(self) -> tuple[ModelSpec, Federation, Params]:
        """Load the data, share them out and build the model: what `fit` takes besides."""
        from fedsieve.data.batches import federate
        from fedsieve.data.datasets import load
        from fedsieve.models.spec import build
        from fedsieve.streams import Streams

        streams = Streams(self.engine.seed)
        data = federate(load(self.data), self.data, streams)
        spec = build(self.model, data.shape, data.classes, tokens=data.tokens)
        return spec, data, spec.initial(self.model.init, streams)


def from_name(name: str, values: Mapping[str, Any] | None = None) -> Config:
    """Return the default config of an algorithm, with some settings (`section.key` -> value) as given.

    Raises:
        UsageError: no such algorithm or setting, or a value out of range.
    """
    return from_tables({"algorithm": {"name": name}}, values)


def from_file(path: Path, values: Mapping[str, Any] | None = None) -> Config:
    """Read a config from a TOML file, with some settings (`section.key` -> value) in place of the file's.

    Raises:
        UsageError: no such file, no TOML, an unknown section or key, or a value out of range; file and line are named.
    """
    text, tables = parsed(path)
    with located(path, text):
        config = from_tables(tables)
    return from_tables(config.tables(), values) if values else config


def parsed(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a TOML file and its tables.

    Raises:
        UsageError: no such file, or no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Give a TOML file or the name of an algorithm.") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None


@contextmanager
def located(path: Path, text: str, written: Mapping[str, str] | None = None) -> Iterator[None]:
    """Put file and line before a UsageError that begins with the dotted name of a key.

    `written` maps keys to those that the file has in their place.
    """
    written = written or {}
    try:
        yield
    except UsageError as error:
        key = str(error).split()[0]
        line = next(filter(None, (_line(text, written.get(name, name)) for name in (key, "algorithm.name"))), 1)
        raise UsageError(f"{path}, line {line}: {error}") from None


def sections(algorithm: str, compressors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the class of settings of each section, for a method by its name, and for `compress.up` and `compress.down`."""
    from fedsieve.algorithms.base import find

    return (
        {"algorithm": find(algorithm)}
        | SECTIONS
        | {way: kind for given in (compressors or {}).items() for way, kind in compressor(*given).items()}
    )


def compressor(way: str, name: Any) -> dict[str, type[Compressor]]:
    """Return the class of settings of `compress.up` or `compress.down`, by the name of a compressor."""
    from fedsieve.compress.base import find

    if not isinstance(name, str):
        raise UsageError(f"{way}.name = {name}: it should be the name of a compressor (see `fedsieve list compressors`).")
    try:
        return {way: find(name)}
    except UsageError as error:
        raise UsageError(f"{way}.name: {error}") from None


def keys(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of every setting by its name, `section.key`."""
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            found |= keys({f"{name}.{entry.name}": hints[entry.name] for entry in fields(kind)})
        else:
            found[name] = kind
    return found


def from_tables(tables: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> Config:
    """Make a config of tables, with some values (`section.key` -> value) in place of theirs.

    Raises:
        UsageError: as for a file; it begins with the dotted name of the key.
    """
    name = tables["algorithm"].get("name") if isinstance(tables.get("algorithm"), dict) else None
    if not isinstance(name, str):
        raise UsageError('algorithm.name is not given: a config needs [algorithm] with name = "fedsparsify", for example.')
    known = ["algorithm", *SECTIONS, "compress"]
    for section, table in tables.items():
        if section not in known or not isinstance(table, dict):
            raise UsageError(f"{section} is no section.{nearest(section, known)} There are {', '.join(known)}.")
    whole = deepcopy({section: dict(tables.get(section, {})) for section in known})
    for key, value in (values or {}).items():
        *parents, last = key.split(".")
        table = whole
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    del whole["algorithm"]["name"]
    for way, table in whole.pop("compress").items():
        if f"compress.{way}" not in WAYS or not isinstance(table, dict):
            raise UsageError(
                f"compress.{way} is no table.{nearest(way, ('up', 'down'))} There are [compress.up], [compress.down]."
            )
        whole[f"compress.{way}"] = table
    named = {way: whole[way].pop("name", None) for way in WAYS if way in whole}
    if None in named.values():
        way = next(way for way, given in named.items() if given is None)
        raise UsageError(f"{way}.name is not given: which compressor? See `fedsieve list compressors`.")
    kinds = sections(name, named)
    names = keys(kinds)
    made = {section: checked(kind, whole[section], section, names) for section, kind in kinds.items()}
    return Config(name, **{section.removeprefix("compress."): value for section, value in made.items()})


def _line(text: str, key: str) -> int:
    """Return the line that sets a dotted key, or the line of the innermost table around it; 0 where there is none."""
    found, depth, table = 0, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        entry = re.match(r"\s*(\[{0,2})\s*([\w.\"' -]+?)\s*[\]=]", line)
        if not entry:
            continue
        name = re.sub(r"[\s\"']", "", entry[2])
        table = name if entry[1] else table
        here = name if entry[1] or not table else f"{table}.{name}"
        if f"{key}.".startswith(f"{here}.") and len(here) > depth:
            found, depth = number, len(here)
    return found
