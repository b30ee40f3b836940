"""What simulated clients keep between their rounds: on disk, so that memory does not grow with the clients that took part.

One SQLite file holds a row for each client and round in which it kept something. A checkpoint of round r means the newest row
of each client up to r. Rows of later rounds are dropped when a run is resumed from there, and a row that the checkpoint on disk
means is not dropped before the next checkpoint is there. So it does not matter when a run is killed: what was not committed,
SQLite takes back when the file is next opened, from the journal that lies beside it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsieve.errors import DataError

CACHE = 16 * 2**20
"""bytes of pages that SQLite keeps in memory; below that, a run without a folder writes nothing"""

SCHEMA = f"""
PRAGMA page_size = {2**16};
PRAGMA cache_size = {-CACHE // 2**10};
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA secure_delete = OFF;
CREATE TABLE IF NOT EXISTS states (
    client INTEGER NOT NULL, round INTEGER NOT NULL, state BLOB NOT NULL, UNIQUE (client, round)
);
CREATE INDEX IF NOT EXISTS by_round ON states (round);
"""

STANDING = """
SELECT count(*), coalesce(sum(newest), 0)
FROM (SELECT max(round) AS newest FROM states WHERE round <= ? GROUP BY client)
"""

PRUNE = """
DELETE FROM states WHERE rowid IN (
    SELECT old.rowid FROM states AS new CROSS JOIN states AS old ON old.client = new.client AND old.round < new.round
    WHERE new.round > :since AND old.round > :after
)
"""


class ClientStates:
    """Frozen states by client, in a file that is made when the first one is put.

    Args:
        path: the file; None: a temporary one without a name, which the system removes when the process ends, however it ends.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._saved = 0
        self.round = 0
        """round in which states are put"""

    def __bool__(self) -> bool:
        """Whether there may be a state of any client."""
        return self._connection is not None

    def get(self, client: int) -> bytes | None:
        """Return the newest state of a client; None if it never kept one."""
        if self._connection is None:
            return None
        with self._told():
            rows = self._connection.execute("SELECT state FROM states WHERE client = ? ORDER BY round DESC LIMIT 1", (client,))
            row = rows.fetchone()
        return None if row is None else bytes(row[0])

    def put(self, client: int, state: bytes) -> None:
        """Keep a client's state of this round."""
        with self._told():
            self._open().execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", (client, self.round, state))

    def commit(self, round: int) -> tuple[int, int]:
        """Forget what was put after a round and have the rest on disk.

        Cost: in proportion to the states put since the last call, but for one pass over the index, 16 bytes a client.

        Returns:
            Number of clients that have a state, and the sum of the rounds of these states: both stand in the checkpoint.
        """
        if self._connection is None:
            return 0, 0
        standing = self._standing(round)
        with self._told():
            self._connection.execute("DELETE FROM states WHERE round > ?", (round,))
            if self._connection.in_transaction:  # not if a signal came between the next two lines the last time
                self._connection.execute("COMMIT")
            self._connection.execute("BEGIN")
        return standing

    def prune(self, round: int) -> None:
        """Drop what this round, now complete, has replaced, but for what the checkpoint on disk means."""
        self._prune(since=round - 1, after=self._saved)

    def saved(self, round: int) -> None:
        """Drop all that has been replaced, now that a checkpoint of this round, the last committed, is on disk."""
        self._prune(since=self._saved, after=-1)
        self._saved = round

    def restore(self, round: int, standing: tuple[int, int]) -> None:
        """Go back to the states that a checkpoint of this round means, for which `commit` returned these numbers.

        Raises:
            DataError: the file is not there, damaged, or not the one of the checkpoint; it is left as it is.
        """
        if self._path is None or not (standing[0] or self._path.exists()):
            return
        if not self._path.exists():
            raise DataError(f"{self._path} is not there: the checkpoint needs it. Put it back, or start the run anew.")
        try:
            if (found := self._standing(round)) != standing:
                raise DataError(
                    f"{self._path} holds states of {found[0]} clients up to round {round}, of rounds that add up to {found[1]};"
                    f"\nthe checkpoint beside it means {standing[0]} clients and {standing[1]}: they are not of one moment.\n"
                    "Put the right file back, or start the run anew in another folder."
                )
            self.commit(round)
            self.saved(round)
        except DataError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file as it is: a checkpoint tells which rows count."""
        if self._connection is not None:
            with suppress(sqlite3.Error):  # what is not on disk was put after the last checkpoint
                self._connection.execute("COMMIT")
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path is not None:
                self._path.parent.mkdir(exist_ok=True)
            with self._told():
                connection = sqlite3.connect(self._path or "", isolation_level=None)
                connection.executescript(SCHEMA)
                connection.execute("BEGIN")
                self._connection = connection
        return self._connection

    def _standing(self, round: int) -> tuple[int, int]:
        """Count the clients that have a state up to a round, and add up the rounds of their newest ones."""
        with self._told():
            clients, rounds = self._open().execute(STANDING, (round,)).fetchone()
        return clients, rounds

    def _prune(self, **rounds: int) -> None:
        """Drop rows after a round that have a newer one since another."""
        if self._connection is not None:
            with self._told():
                self._connection.execute(PRUNE, rounds)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what SQLite met as an error that a user can act on."""
        try:
            yield
        except sqlite3.Error as error:
            place = self._path or "the temporary file of the clients' states"
            raise DataError(
                f"{place} cannot be used: {error}.\nIf the disk is full, make room and resume. If another process runs in this"
                " folder, wait for it. If the file is damaged, start the run anew in another folder."
            ) from None
