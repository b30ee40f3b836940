"""Density over the rounds, and shares of weights that are exchanged."""

from __future__ import annotations

from math import cos, pi


def polynomial(t: int, *, first: int, last: int, start: float, end: float, power: float = 3.0, every: int = 1) -> float:
    """Density of round t, falling from `start` at round `first` to `end` at round `last`; power 3 is the cubic schedule.

        t' = every * floor(t / every);  d(t) = end + (start - end) * (1 - (t' - first) / (last - first))**power

    Source: Zhu and Gupta 2017 (arXiv 1710.01878, equation 1) in rounds, as FedSparsify uses it (Stripelis et al. 2022,
    arXiv 2204.12430). Before `first` it is `start`, after `last` it is `end`.
    """
    step = every * (t // every)
    progress = min(1.0, max(0.0, (step - first) / (last - first)))
    return float(end + (start - end) * (1.0 - progress) ** power)


def one_shot(t: int, *, at: int, end: float) -> float:
    """Density of round t: 1 before round `at`, `end` from there on."""
    return end if t >= at else 1.0


def exponential(t: int, *, last: int, end: float) -> float:
    """Density of step t of `last`, by equal factors: end**(t / last) (SynFlow: Tanaka et al. 2020, arXiv 2006.05467)."""
    return float(end ** (min(t, last) / last))


def levels(t: int, *, every: int, factor: float = 0.8, end: float = 0.0) -> float:
    """Density of round t that falls by a factor every so many rounds, to no less than `end`: iterative pruning by levels."""
    return max(end, float(factor ** (t // every)))


def cosine(t: int, *, last: int, start: float, end: float) -> float:
    """Density of round t, falling from `start` at 0 to `end` at `last` along half a cosine."""
    return float(end + (start - end) * exchanged(t, last=last, share=1.0))


def exchanged(t: int, *, last: int, share: float) -> float:
    """Share of the kept weights that are exchanged in round t: share / 2 * (1 + cos(pi t / last)), 0 after `last`.

    Source: Evci et al. 2020 (RigL), arXiv 1911.11134, section 3.
    """
    return share / 2 * (1 + cos(pi * t / last)) if t < last else 0.0


def moving(t: int, *, every: int, stop: int, rounds: int, share: float) -> float:
    """Share of the kept weights that are to move in round t of `rounds`: every so many rounds what `exchanged` says, else 0.

    It has fallen to 0 by round `stop` (0: the last one), and nothing moves in the last round whatever `stop` is.
    """
    return exchanged(t, last=stop or rounds, share=share) if t % every == 0 and t < rounds else 0.0
