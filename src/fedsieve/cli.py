"""Entry of the command line: overview, exit codes, signals. The commands are in `commands`, imported only when one runs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from fedsieve.errors import FedsieveError, Interrupted, UsageError

COMMANDS = {
    "demo": "train FedSparsify and dense FedAvg on embedded data, and compare them",
    "run": "train: fedsieve run NAME|FILE.toml [--section.key value ...] [--out DIR]",
    "sweep": "run a grid of settings and seeds, and tabulate it: fedsieve sweep FILE.toml [--out DIR]",
    "resume": "go on with an interrupted run, as if it had not been: fedsieve resume DIR",
    "report": "write report.html, report.md and records.csv of a run: fedsieve report DIR",
    "compare": "compare runs in a table and on one page: fedsieve compare DIR...",
    "inspect": "show each layer's density, dead units and operations, and how masks moved: fedsieve inspect DIR [--json]",
    "audit": "attack the final model: does it tell who was in the training data? fedsieve audit DIR [--json]",
    "list": "list algorithms, compressors, datasets, models or partitions [--json]",
    "bench": "measure where sparse kernels pay on this machine: fedsieve bench kernels",
    "export": "write the final model for use elsewhere: fedsieve export DIR [--runtime sparse]",
}

OVERVIEW = f"""\
fedsieve: train small, sparse models across many devices, with every byte counted.

examples
  fedsieve demo
  fedsieve run fedsparsify --data digits --algorithm.density 0.1 --out runs/sparse
  fedsieve run fedavg --data digits --engine.rounds 40 --engine.workers 2 --out runs/dense
  fedsieve compare runs/dense runs/sparse

commands
{chr(10).join(f"  {name:8} {text}" for name, text in COMMANDS.items())}

`fedsieve COMMAND --help` says more; `fedsieve run NAME --help` shows every setting with its range and default.
--debug shows the traceback of an error, --version the version.
Data files are looked for in --data.root, then in the folder FEDSIEVE_DATA names.
exit codes: 0 done, 1 internal error, 2 usage, 3 data, 4 diverged, 130 interrupted, 143 terminated,
141 nobody reads the output any more"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _command(words)
        sys.stdout.flush()
        return 0
    except Interrupted as interrupted:
        return interrupted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (FedsieveError, OSError) as error:
        if debug:
            traceback.print_exc()
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"fedsieve: {said}", file=sys.stderr)
        return getattr(error, "exit_code", UsageError.exit_code)


def _command(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(OVERVIEW)
        return
    if name == "--version":
        from fedsieve import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        from fedsieve.settings import nearest

        raise UsageError(f"no command {name!r}.{nearest(name, COMMANDS)} There are {', '.join(COMMANDS)}.")
    if name in ("run", "sweep", "resume", "demo", "audit"):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    sys.path.insert(0, os.getcwd())  # own methods, data and models are found in the current folder
    from fedsieve import commands

    getattr(commands, f"{name}_command")(words[1:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop after the round that is complete; a second signal stops at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
