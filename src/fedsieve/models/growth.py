"""When a network that is cut into stages grows (see `fedsieve.models.stages`)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedsieve.errors import UsageError

Schedule = Literal["half", "equal", "list"]


@dataclass(frozen=True, slots=True)
class Growth:
    """The stage of each round. Rounds of warm-up follow each growth; the others are the main rounds."""

    starts: tuple[int, ...]
    """first round of each stage"""
    warmup: int
    """rounds of it at the beginning of each stage but the first"""
    rounds: int

    def stage(self, round: int) -> int:
        """Stage of a round, from 1 on."""
        return max(1, bisect_right(self.starts, round))

    def warming(self, round: int) -> bool:
        """Whether a round is one of warm-up."""
        stage = self.stage(round)
        return stage > 1 and round < self.starts[stage - 1] + self.warmup

    def main(self, round: int) -> tuple[int, int]:
        """Which main round a round is, if it is one, and how many there are."""
        return round - self.warmup * (self.stage(round) - 1), self.rounds - self.warmup * (len(self.starts) - 1)


def growth(rounds: int, stages: int, schedule: Schedule, warmup: int = 0, grow_at: tuple[int, ...] = ()) -> Growth:
    """Return when a network of so many stages grows in so many rounds.

    Args:
        rounds: in total.
        stages: the last is the whole network.
        schedule: main rounds of each stage but the last: half (1 / (2 stages) of them, as published) or equal (1 / stages),
            whole, at least 1; or list.
        warmup: rounds of it after each growth.
        grow_at: schedule list: first rounds of stages 2 to the last.

    Raises:
        UsageError: the rounds do not suffice, or the list does not fit.
    """
    main = rounds - warmup * (stages - 1)
    if main < stages:
        raise UsageError(
            f"engine.rounds = {rounds} is too few for {stages} stages with algorithm.warmup = {warmup}: the network would not"
            f" be whole at the end.\nGive at least {stages + warmup * (stages - 1)}, or fewer algorithm.stages."
        )
    if schedule == "list":
        return Growth(_checked((1, *grow_at), rounds, stages, warmup), warmup, rounds)
    if grow_at:
        raise UsageError(
            f"algorithm.grow_at goes with algorithm.schedule = list, and that is {schedule}: set it, or leave grow_at out."
        )
    each = max(1, main // (stages if schedule == "equal" else 2 * stages))
    return Growth((1, *(1 + s * each + (s - 1) * warmup for s in range(1, stages))), warmup, rounds)


def _checked(starts: tuple[int, ...], rounds: int, stages: int, warmup: int) -> tuple[int, ...]:
    lengths = [after - before for before, after in pairwise((*starts, rounds + 1))]
    if len(starts) != stages or lengths[0] < 1 or any(length <= warmup for length in lengths[1:]):
        raise UsageError(
            f"algorithm.grow_at = {', '.join(map(str, starts[1:])) or 'none'}: {stages} stages need {stages - 1} rounds in"
            f" which all but the first begin,\nascending, from 2 to engine.rounds = {rounds}, and each of these lasts longer"
            f" than algorithm.warmup = {warmup}."
        )
    return starts
