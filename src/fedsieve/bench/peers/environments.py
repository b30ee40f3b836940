"""A virtual environment for each peer, built once from a list that pins every package in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fedsieve import files
from fedsieve.errors import UsageError

DRIVERS = Path(__file__).parent / "drivers"
PYTHON = (3, 11)
"""the lists were made for it"""


def prepare(name: str, folder: Path) -> Path:
    """Return the Python of a peer's environment; build it if it is not there or was built from another list.

    torch goes in first, with what it needs; then every other package of the list, and nothing else: two peers ask for releases
    that cannot be had together with it (see the lists).

    Raises:
        UsageError: it cannot be built; the message ends with what pip said.
    """
    wanted = DRIVERS / f"{name}.txt"
    place = (folder / name).absolute()
    built_from = place / "built-from.txt"
    python = place / "bin" / "python"
    if built_from.is_file() and built_from.read_text() == wanted.read_text():
        return python
    if sys.version_info[:2] != PYTHON:
        this = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(f"{wanted.name} pins packages for Python 3.11, this is {this}: run it with a Python 3.11.")
    shutil.rmtree(place, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for words in (
        [sys.executable, "-m", "venv", str(place)],
        [*pip, "--constraint", str(wanted), "torch"],
        [*pip, "--no-deps", "--requirement", str(wanted)],
    ):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise UsageError(f"{place} cannot be built from {wanted.name}: " + " ".join(said[-3:]))
    files.replace(built_from, wanted.read_text())
    return python
