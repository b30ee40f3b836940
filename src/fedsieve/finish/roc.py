"""How well scores tell two kinds apart: the ROC curve, what is read from it, and how far chance moves that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsieve.streams import Stream

Reals = NDArray[np.float64]

LOW_RATE = 0.01
"""false positive rate at which the true positive rate is told"""
LEVEL = 0.95
"""of the bootstrap intervals"""
GRID = 200
"""points of a curve that is kept"""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """True against false positive rate over all thresholds: point k takes those with one of the k highest distinct scores."""

    scores: Reals
    """distinct scores, descending"""
    false: Reals
    """shape (scores + 1,), ascending from 0 to 1"""
    true: Reals

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a positive scores higher than a negative, ties counted as one half."""
        return float((np.diff(self.false) * (self.true[1:] + self.true[:-1])).sum() / 2)

    @property
    def advantage(self) -> float:
        """Largest difference between true and false positive rate over all thresholds."""
        return float((self.true - self.false).max())

    def true_at(self, rates: Reals) -> Reals:
        """Return the highest true positive rate at no more than each false positive rate; nothing is interpolated."""
        found: Reals = self.true[np.searchsorted(self.false, rates + 1e-12, side="right") - 1]
        return found

    def balanced(self, threshold: float) -> float:
        """Return the balanced accuracy of taking scores from a threshold on as positive."""
        point = int(np.searchsorted(-self.scores, -threshold, side="right"))
        return float((self.true[point] + 1 - self.false[point]) / 2)

    def measures(self, threshold: float) -> dict[str, float]:
        """Return all that is told of a curve."""
        return {
            "auc": self.auc,
            "tpr_at_1_fpr": float(self.true_at(np.array([LOW_RATE]))[0]),
            "balanced_accuracy": self.balanced(threshold),
            "advantage": self.advantage,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Scores of positives and negatives, sorted once for many weightings."""

    scores: Reals
    positive: NDArray[np.int64]
    """place of each positive among the distinct scores"""
    negative: NDArray[np.int64]

    @classmethod
    def of(cls, positive: Reals, negative: Reals) -> Ranked:
        """Sort the scores of both kinds, each of at least one."""
        scores, places = np.unique(-np.concatenate([positive, negative]), return_inverse=True)
        return cls(-scores, places[: len(positive)], places[len(positive) :])

    def curve(self, positive: Reals | None = None, negative: Reals | None = None) -> Curve:
        """Return the curve, with weights >= 0 of the positives or the negatives that add up to more than 0."""
        count = len(self.scores)
        true = np.cumsum(np.bincount(self.positive, positive, count), dtype=np.float64)
        false = np.cumsum(np.bincount(self.negative, negative, count), dtype=np.float64)
        return Curve(self.scores, np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1]))


def grid(negatives: int) -> Reals:
    """Return false positive rates from that of one negative to 1, evenly spaced on a log axis."""
    return np.geomspace(1 / negatives, 1.0, GRID)


def described(ranked: Ranked, threshold: float, resamples: int, stream: Stream) -> dict[str, Mapping[str, object]]:
    """Return measures with bootstrap intervals, and the curve on a grid with a band.

    Positives and negatives are drawn anew separately, with replacement; an interval is between percentiles of the measure.

    Args:
        ranked: the scores.
        threshold: of the balanced accuracy; it stays as it is.
        resamples: of the bootstrap, >= 1.
        stream: draws them.
    """
    rates, draws = grid(len(ranked.negative)), stream.numpy()
    whole, n, m = ranked.curve(), len(ranked.positive), len(ranked.negative)
    found: list[dict[str, float]] = []
    curves = np.empty((resamples, len(rates)))
    for i in range(resamples):
        positive = np.bincount(draws.integers(n, size=n), minlength=n).astype(np.float64)
        negative = np.bincount(draws.integers(m, size=m), minlength=m).astype(np.float64)
        curve = ranked.curve(positive, negative)
        found.append(curve.measures(threshold))
        curves[i] = curve.true_at(rates)
    share = 100 * (1 - LEVEL) / 2
    told: dict[str, Mapping[str, object]] = {}
    for key, value in whole.measures(threshold).items():
        low, high = np.percentile([each[key] for each in found], [share, 100 - share])
        told[key] = {"value": value, "low": float(low), "high": float(high)}
    low_band, high_band = np.percentile(curves, [share, 100 - share], axis=0)
    told["roc"] = {
        "fpr": rates.tolist(),
        "tpr": whole.true_at(rates).tolist(),
        "low": low_band.tolist(),
        "high": high_band.tolist(),
    }
    return told
