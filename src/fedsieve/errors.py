"""Errors a user can cause or meet, each with the exit code of the command line.

    0 done    1 internal error    2 usage    3 data    4 diverged    130 interrupted (Ctrl-C)    143 terminated

A message says what was given, what is allowed and where to change it, in at most eight lines.
"""

from __future__ import annotations


class FedsieveError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code = 1


class UsageError(FedsieveError):
    """A key, a value or a folder that the user gave cannot be used."""

    exit_code = 2


class DataError(FedsieveError):
    """A data file is missing, damaged, or does not fit the federation asked for."""

    exit_code = 3


class Diverged(FedsieveError):
    """A loss or a parameter is no longer finite."""

    exit_code = 4


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Not an `Exception`, so that no handler on the way swallows it."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.exit_code = 128 + signal
