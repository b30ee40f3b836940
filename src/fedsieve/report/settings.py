"""The page docs/settings.md: every setting with its type, range and default, read from the dataclasses themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from fedsieve.algorithms.base import find, names
from fedsieve.compress import base as compressors
from fedsieve.settings import Data, Engine, Local, Model

_HEAD = """\
# Settings

Written from the settings dataclasses by `fedsieve.report.settings`; do not edit it by hand.

Each key can stand in a TOML file (`[local]`, then `lr = 0.05`), on the command line (`--local.lr 0.05`) and in Python
(`Local(lr=0.05)`), with the same checks in all three: an unknown key or a value out of range is refused before round 1.
The name of the algorithm is the first word of `fedsieve run`, and `name` in the section `[algorithm]` of a file.
Sections `[compress.up]` and `[compress.down]` name a compressor ([compression.md](compression.md)); options are
`--compress.up NAME` and `--compress.up.share 0.1`, for example.
"""
_COLUMNS = "| key | type | allowed | default | meaning |\n|---|---|---|---|---|\n"
_SIGNS = {"ge": (">=", "["), "gt": (">", "("), "le": ("<=", "]"), "lt": ("<", ")")}
"""bound -> its sign in an inequality, and at the end of an interval"""
_TYPES = {bool: "bool", int: "int", float: "float", str: "text"}


class Setting(NamedTuple):
    """One setting as the page shows it."""

    key: str
    """name within its section, dotted in a nested one"""
    type: str
    """bool, int, float, text, choice, or a list of one of them"""
    allowed: str
    """choices or range; empty where anything of the type is allowed"""
    default: str
    text: str


def settings_markdown() -> str:
    """Return the page: one table for each section, then one for each algorithm and each compressor."""
    sections: list[tuple[str, Any]] = [(f"[{cls.__name__.lower()}]", cls) for cls in (Data, Model, Local, Engine)]
    sections += [(f'[algorithm] name = "{name}"', find(name)) for name in names()]
    sections += [(f'[compress.up] name = "{name}"', compressors.find(name)) for name in compressors.names()]
    return _HEAD + "".join(_section(title, cls) for title, cls in sections)


def entries(cls: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a dataclass in order, those of a nested one in its place."""
    for name, entry in cls.__pydantic_fields__.items():
        if is_dataclass(entry.annotation):
            yield from entries(entry.annotation, f"{prefix}{name}.")
            continue
        kind, allowed = _described(entry.annotation, entry.metadata)
        yield Setting(f"{prefix}{name}", kind, allowed, _default(entry.default), " ".join((entry.description or "").split()))


def _section(title: str, cls: Any) -> str:
    return f"\n## {title}\n\n{cls.__doc__}\n\n{_COLUMNS}{''.join(map(_row, entries(cls)))}"


def _row(entry: Setting) -> str:
    cells = (_code(entry.key), entry.type, _code(entry.allowed), _code(entry.default), entry.text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _described(annotation: Any, metadata: list[Any]) -> tuple[str, str]:
    """Return a type and what it allows as text."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _described(inner[0], [bound for field in inner[1:] for bound in getattr(field, "metadata", [field])])
    if origin is Literal:
        return "choice", ", ".join(map(str, inner))
    if origin is tuple:
        kind, allowed = _described(inner[0], [])
        return f"list of {kind}", f"each {allowed}" if allowed else ""
    if NoneType in inner:
        return _described(next(choice for choice in inner if choice is not NoneType), metadata)
    return _TYPES.get(annotation) or annotation.__name__, _range(metadata)


def _range(metadata: list[Any]) -> str:
    """Return bounds as an interval or an inequality, and a pattern as it is."""
    found = {name: getattr(bound, name) for bound in metadata for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)}
    low, high = (next((name for name in pair if name in found), None) for pair in (("ge", "gt"), ("le", "lt")))
    if low and high:
        return f"{_SIGNS[low][1]}{_bound(found[low])}, {_bound(found[high])}{_SIGNS[high][1]}"
    patterns = [f"pattern {bound.pattern}" for bound in metadata if hasattr(bound, "pattern")]
    return ", ".join([f"{_SIGNS[name][0]} {_bound(value)}" for name, value in found.items()] + patterns)


def _bound(value: float) -> str:
    """Return a bound as text; a large power of two as one."""
    if isinstance(value, int) and value > 2**32 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return str(value)


def _default(value: Any) -> str:
    """Return a default as it would stand in a TOML file; nothing for one that TOML cannot hold."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
