"""Entry of the command line: overview, exit codes, signals. The commands are in `commands`, imported only when one runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from fedsieve.errors import FedsieveError, Interrupted, UsageError

COMMANDS = {
    "demo": "train FedSparsify and dense FedAvg on embedded data, and compare them",
    "run": "train: fedsieve run NAME|FILE.toml [--section.key value ...] [--out DIR]",
    "resume": "go on with an interrupted run, as if it had not been: fedsieve resume DIR",
    "report": "write report.html, report.md and records.csv of a run: fedsieve report DIR",
    "compare": "compare runs in a table and on one page: fedsieve compare DIR...",
    "list": "list algorithms, datasets, models or partitions [--json]",
    "export": "write the final model for use elsewhere: fedsieve export DIR",
}

OVERVIEW = f"""\
fedsieve: train small, sparse models across many devices, with every byte counted.

examples
  fedsieve demo
  fedsieve run fedsparsify --data.name digits --data.partition dirichlet --algorithm.density 0.1
  fedsieve run fedavg --data.name fashion-mnist --engine.rounds 40 --engine.workers 2 --out runs/dense
  fedsieve compare runs/dense runs/sparse

commands
{chr(10).join(f"  {name:8} {text}" for name, text in COMMANDS.items())}

`fedsieve COMMAND --help` says more; `fedsieve run NAME --help` shows every setting with its range and default.
--debug shows the traceback of an error, --version the version.
Data files are looked for in --data.root, then in the folder FEDSIEVE_DATA names.
exit codes: 0 done, 1 internal error, 2 usage, 3 data, 4 diverged, 130 interrupted, 143 terminated"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0
    try:
        return _command(words[0], words[1:])
    except FedsieveError as error:
        if debug:
            raise
        print(f"fedsieve: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        return interrupted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(name: str, words: list[str]) -> int:
    if name == "--version":
        from fedsieve import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        from fedsieve.settings import nearest

        raise UsageError(f"no command {name!r}.{nearest(name, COMMANDS)} There are {', '.join(COMMANDS)}.")
    if name in ("run", "resume", "demo"):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    from fedsieve import commands

    getattr(commands, f"{name}_command")(words)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop after the round that is complete; a second signal stops at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
