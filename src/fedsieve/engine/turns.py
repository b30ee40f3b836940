"""Several clients of a group under way at once, so that what they train can be trained together.

A method's client step is one function that calls `client.train` in its middle, if at all, or several times. Each client of a
group gets a thread, and the threads take turns: one runs at a time, in ascending client id, until it wants to train or is done.
When all that are left wait for training, their calls are answered together. So a step need not be written for groups, shares
nothing with others while it runs, and the order of everything that happens is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from fedsieve.errors import FedsieveError
from fedsieve.local.batched import Call
from fedsieve.local.executor import Trained
from fedsieve.wire.message import WireError

T = TypeVar("T")

Play = Callable[[Callable[..., Trained]], T]
"""plays a client that trains by the given function, whose arguments are those of `Executor.train`"""


class Turns:
    """Threads for up to `group` clients; they are kept, for a new thread takes torch a millisecond to get used to."""

    def __init__(self, group: int) -> None:
        self._pool = ThreadPoolExecutor(group, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))

    def take(
        self, plays: Sequence[Play[T]], train: Callable[[Sequence[Call]], Sequence[Trained | FedsieveError]]
    ) -> list[T | FedsieveError | WireError]:
        """Play the clients of a group; return what each returns or, if it is lost, why.

        Raises:
            BaseException: what a client raises that is neither of these; the others are ended where they wait.
        """
        players = [_Player(play, self._pool) for play in plays]
        try:
            for player in players:
                player.run()
            while waiting := [player for player in players if player.call is not None]:
                answers = train([player.call for player in waiting if player.call is not None])
                for player, answer in zip(waiting, answers, strict=True):
                    player.run(answer)
        finally:
            for player in players:
                player.end()
        return [player.outcome for player in players]


class _Ended(BaseException):
    """Raised where a client waits, when its group has been given up."""


class _Player(Generic[T]):
    """A client on a thread that runs only while `run` waits for it."""

    outcome: T | FedsieveError | WireError
    """what it returned, or why it is lost; not there before it is done"""

    def __init__(self, play: Play[T], pool: ThreadPoolExecutor) -> None:
        self.call: Call | None = None
        """what it waits for; None before its first turn, and when it is done"""
        self._play, self._pool = play, pool
        self._answers: SimpleQueue[Trained | BaseException] = SimpleQueue()
        self._paused: SimpleQueue[BaseException | None] = SimpleQueue()
        self._done: Future[None] | None = None
        self._ended = False

    def run(self, answer: Trained | FedsieveError | None = None) -> None:
        """Let it run, with the answer that it waits for, until it waits again or is done."""
        self.call = None
        if answer is None:
            self._done = self._pool.submit(self._run)
        else:
            self._answers.put(answer)
        if (error := self._paused.get()) is not None:
            raise error

    def end(self) -> None:
        """Have it end: where it waits, if it is not done."""
        if self._done is not None:
            self._ended = True
            self._answers.put(_Ended())
            self._done.result()

    def _run(self) -> None:
        failure = None
        try:
            self.outcome = self._play(self._train)
        except (FedsieveError, WireError) as error:
            self.outcome = error
        except BaseException as error:
            failure = error
        self._paused.put(failure)

    def _train(self, *args: Any, **settings: Any) -> Trained:
        if self._ended:
            raise _Ended
        self.call = Call(*args, **settings)
        self._paused.put(None)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer
