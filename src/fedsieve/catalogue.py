"""What there is to choose from, as plain entries: for `fedsieve list` and the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any, get_args

from fedsieve.settings import Partition

_PARTITIONS = {
    "iid": ("shuffled and dealt out equally",),
    "dirichlet": ("for each class, shares of the clients drawn from a Dirichlet distribution", "alpha"),
    "shards": ("label-sorted data in equal slices, dealt at random", "per_client"),
    "classes": ("each client holds a fixed number of classes", "per_client"),
    "quantity": ("sizes drawn from a Dirichlet distribution, labels shuffled", "alpha"),
    "sample": ("each client draws its own, which others may hold too", "examples"),
    "natural": ("by the data's own client ids",),
}


def algorithms() -> list[dict[str, Any]]:
    """List the methods with the first line of their files and their settings."""
    from fedsieve.algorithms.base import find, names

    found = []
    for name in names():
        cls = find(name)
        title = (import_module(cls.__module__).__doc__ or "").strip().splitlines()[0]
        found.append({"name": name, "title": title, "settings": [entry.name for entry in fields(cls)]})
    return found


def compressors() -> list[dict[str, Any]]:
    """List the compressors with the first line of their files, what they are like, and their settings."""
    from fedsieve.compress.base import find, names

    found = []
    for name in names():
        cls = find(name)
        title = (import_module(cls.__module__).__doc__ or "").strip().splitlines()[0]
        like = [entry.name for entry in fields(cls.caps) if getattr(cls.caps, entry.name)]
        made = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
        found.append({"name": name, "title": title, "like": like, "settings": made})
    return found


def datasets() -> list[dict[str, Any]]:
    """List the data sets."""
    from fedsieve.data.datasets import CATALOGUE

    found = []
    for entry in CATALOGUE:
        said = asdict(entry)
        train, test = said.pop("examples")
        found.append({"name": said.pop("name"), "title": said.pop("title"), "train": train, "test": test} | said)
    return found


def models() -> list[dict[str, Any]]:
    """List the models."""
    from fedsieve.models.spec import CATALOGUE

    return [asdict(entry) for entry in CATALOGUE]


def partitions() -> list[dict[str, Any]]:
    """List the ways to share examples out."""
    return [
        {"name": name, "title": _PARTITIONS[name][0], "settings": list(_PARTITIONS[name][1:])} for name in get_args(Partition)
    ]


LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "algorithms": algorithms,
    "compressors": compressors,
    "datasets": datasets,
    "models": models,
    "partitions": partitions,
}
