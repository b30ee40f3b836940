"""Density over the rounds."""

from __future__ import annotations


def polynomial(t: int, *, first: int, last: int, start: float, end: float, power: float = 3.0, every: int = 1) -> float:
    """Density of round t, falling from `start` at round `first` to `end` at round `last`; power 3 is the cubic schedule.

        t' = every * floor(t / every);  d(t) = end + (start - end) * (1 - (t' - first) / (last - first))**power

    Source: Zhu and Gupta 2017 (arXiv 1710.01878, equation 1) in rounds, as FedSparsify uses it (Stripelis et al. 2022,
    arXiv 2204.12430). Before `first` it is `start`, after `last` it is `end`.
    """
    step = every * (t // every)
    progress = min(1.0, max(0.0, (step - first) / (last - first)))
    return float(end + (start - end) * (1.0 - progress) ** power)
