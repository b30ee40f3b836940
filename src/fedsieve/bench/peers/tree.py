"""All processes that a program starts, directly or not, daemons too: their memory together, and their end. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
INTERVAL = 0.5
"""seconds between two looks at the memory"""
PATIENCE = 5.0
"""seconds that processes have to end by themselves"""


class Tree:
    """Every process that is started, by this one or below it, while the block runs; those still there at its end are ended.

    This process becomes the parent of descendants whose own parent has ended, so that a daemon is not lost sight of.
    """

    def __init__(self) -> None:
        self.peak = 0
        """most bytes of memory that the processes were seen to hold together"""
        self._spare: frozenset[int] = frozenset()
        self._started: list[subprocess.Popen[bytes]] = []
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Tree:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self._spare = frozenset(_descendants(os.getpid()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + PATIENCE
            for process in self.processes():
                with suppress(OSError):
                    os.kill(process, number)
            while left := self.processes():
                for child in self._started:
                    child.poll()
                for process in left:
                    with suppress(OSError):  # not a child of ours, or not yet
                        os.waitpid(process, os.WNOHANG)
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        for child in self._started:
            child.wait()

    def start(self, words: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        """Start a program as `Popen` does, in a session of its own: a Ctrl-C does not reach it."""
        self._started.append(subprocess.Popen(words, start_new_session=True, **how))
        return self._started[-1]

    def processes(self) -> list[int]:
        """Return the ids of the processes that there are now."""
        return [process for process in _descendants(os.getpid()) if process not in self._spare]

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, sum(map(memory, self.processes())))


def memory(process: int) -> int:
    """Return the memory of a process in bytes, pages shared with others divided among them; 0 if it has ended.

    Where the system does not tell that share, all of its resident pages.
    """
    folder = Path("/proc") / str(process)
    with suppress(OSError):
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    with suppress(OSError):
        return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _descendants(root: int) -> list[int]:
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                children[int(parent)].append(int(folder.name))
    found, pending = [], [root]
    while pending:
        below = children[pending.pop()]
        found += below
        pending += below
    return found
