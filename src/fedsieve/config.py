"""A whole run as text: TOML and command line -> frozen settings, strictly, and settings -> a run that is ready to start."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsieve.errors import UsageError
from fedsieve.settings import Data, Engine, Local, Model, nearest

if TYPE_CHECKING:
    from fedsieve.data.batches import Federation
    from fedsieve.models.spec import ModelSpec
    from fedsieve.params import Params

SECTIONS: dict[str, Any] = {"data": Data, "model": Model, "local": Local, "engine": Engine}


@dataclass(frozen=True)
class Config:
    """The five sections of a run; `algorithm` is the method object itself."""

    name: str
    """name of the algorithm"""
    algorithm: Any
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    local: Local = field(default_factory=Local)
    engine: Engine = field(default_factory=Engine)

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return the resolved settings as TOML tables: read back, they are this config again."""
        tables = {section: asdict(getattr(self, section)) for section in SECTIONS}
        whole: dict[str, dict[str, Any]] = _without_none({"algorithm": {"name": self.name} | asdict(self.algorithm)} | tables)
        return whole

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


def from_name(name: str) -> Config:
    """Return the default config of an algorithm."""
    from fedsieve.algorithms.base import find

    return Config(name, find(name)())


def from_file(path: Path) -> Config:
    """Read a config from a TOML file.

    Raises:
        UsageError: no such file, no TOML, an unknown section or key, or a value out of range; file and line are named.
    """
    from fedsieve.algorithms.base import find

    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Give a TOML file or the name of an algorithm.") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    known = ["algorithm", *SECTIONS]
    for section, table in tables.items():
        if section not in known or not isinstance(table, dict):
            near = nearest(section, known)
            raise UsageError(
                f"{path}, line {_line(text, section)}: no section [{section}].{near} There are {', '.join(known)}."
            )
    method = dict(tables.pop("algorithm", {}))
    name = method.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f'{path} does not say which algorithm: it needs [algorithm] with name = "fedsparsify", for example.')
    made = {section: _made(cls, tables.get(section, {}), path, text, section) for section, cls in SECTIONS.items()}
    return Config(name, _made(find(name), method, path, text, "algorithm"), **made)


def keys(config: Config) -> list[str]:
    """List every setting as `section.key`."""
    return [f"{section}.{key}" for section in ("algorithm", *SECTIONS) for key in _keys(getattr(config, section))]


def _keys(section: Any) -> list[str]:
    found = []
    for entry in fields(section):
        value = getattr(section, entry.name)
        found += [f"{entry.name}.{key}" for key in _keys(value)] if is_dataclass(value) else [entry.name]
    return found


def _made(cls: Any, table: Mapping[str, Any], path: Path, text: str, section: str) -> Any:
    try:
        return cls(**table)
    except UsageError as error:
        key = re.search(rf"{cls.__name__.lower()}(?:\.| has no setting ')([\w.]+)", str(error))
        line = _line(text, key[1].rpartition(".")[2] if key else section, section)
        raise UsageError(f"{path}, line {line}: {error}") from None


def _line(text: str, key: str, section: str | None = None) -> int:
    """Return the line of a key or a section header, 1 where it is not found."""
    inside = section is None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([\w.]+)", line)
        if header:
            inside = section is None or header[1].split(".")[0] == section
        if (header and header[1] == key) or (inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line)):
            return number
    return 1


def _without_none(tree: Any) -> Any:
    """TOML has no null: leave such keys out, their default is null."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return list(tree) if isinstance(tree, tuple) else tree
