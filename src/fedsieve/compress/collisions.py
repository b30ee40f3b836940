"""How many clients of a cohort sent the same number, and what that says: the decoders of Rand-k-Spatial.

Clients send random numbers of their vectors, client i each with probability p. Of n clients that could send a number, M did.
The server multiplies what it has of it by beta / T(M): then the mean over the cohort is right on average for any T > 0, if

    1 / beta = sum over r = 1..n of p Binomial(r - 1; n - 1, p) / T(r)

since M - 1 others sent it too, if a client did. T decides how errors of like vectors cancel (Jhunjhunwala, Mallick, Gadhikar,
Kadhe and Joshi 2021, arXiv 2110.07751):

    one  T(m) = 1                                   Rand-k
    max  T(m) = m                                   best if all vectors are equal
    avg  T(m) = 1 + n / 2 (m - 1) / (n - 1)         if it is not known how like they are
    opt  T(m) = 1 + R2 / R1 (m - 1) / (n - 1)       best, with R1 the sum of squared vectors, R2 that of their inner products
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma, log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Transform = Literal["one", "max", "avg", "opt"]
LEAST = 1e-6
"""what T is at least: with R2 / R1 = -1 it would be zero"""


def transform(kind: Transform, n: int, ratio: float = 0.0) -> NDArray[np.float64]:
    """Return T(1), ..., T(n), shape (n,).

    Args:
        kind: which.
        n: clients that could send a number, >= 1.
        ratio: R2 / R1, for opt; it is clipped to [-1, n - 1].
    """
    others = np.arange(n, dtype=np.float64)
    slope = {"one": 0.0, "max": n - 1.0, "avg": n / 2, "opt": min(max(ratio, -1.0), n - 1.0)}[kind]
    values: NDArray[np.float64] = np.maximum(1 + slope * others / max(1, n - 1), LEAST)
    return values


def binomial(n: int, p: float) -> NDArray[np.float64]:
    """Return the probabilities of 0, ..., n successes, shape (n + 1,); computed from logarithms, so n may be large."""
    if p in (0.0, 1.0):
        certain: NDArray[np.float64] = np.eye(n + 1)[n if p else 0]
        return certain
    chosen = np.array([lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) for k in range(n + 1)])
    k = np.arange(n + 1)
    found: NDArray[np.float64] = np.exp(chosen + k * log(p) + (n - k) * log(1 - p))
    return found


def poisson_binomial(shares: Sequence[float]) -> NDArray[np.float64]:
    """Return the probabilities of 0, ..., n successes of n trials of their own probabilities each, shape (n + 1,)."""
    found = np.ones(1)
    for p in shares:
        found = np.append(found * (1 - p), 0.0) + np.append(0.0, found * p)
    return found


def beta(values: NDArray[np.float64], p: float) -> float:
    """Return the factor that makes T, given by its values T(1), ..., T(n), right on average; infinity for p = 0."""
    total = float(p * np.sum(binomial(len(values) - 1, p) / values))
    return 1 / total if total else float("inf")


def betas(values: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    """Return the factor of each client, whose probabilities to send a number differ; O(n^3) time for n clients."""
    found = np.empty(len(shares))
    for i, p in enumerate(shares):
        total = float(p * np.sum(poisson_binomial([*shares[:i], *shares[i + 1 :]]) / values))
        found[i] = 1 / total if total else np.inf
    return found


def squared_error(values: NDArray[np.float64], p: float, r1: float, r2: float) -> float:
    """Return the expected squared error of the mean over the cohort: ((1/p - 1) R1 + c1 R1 - c2 R2) / n^2."""
    n = len(values)
    c1, c2 = coefficients(values, p)
    return ((1 / p - 1) * r1 + c1 * r1 - c2 * r2) / n**2


def coefficients(values: NDArray[np.float64], p: float) -> tuple[float, float]:
    """Return c1 and c2 of `squared_error`."""
    n, b = len(values), beta(values, p)
    c1 = b**2 * p * float(np.sum(binomial(n - 1, p) / values**2)) - 1 / p
    c2 = 1 - b**2 * p**2 * float(np.sum(binomial(n - 2, p) / values[1:] ** 2)) if n > 1 else 0.0
    return c1, c2


def factors(
    kind: Transform, p: float, holders: NDArray[np.int64], sent: NDArray[np.int64], ratio: float = 0.0
) -> NDArray[np.float32]:
    """Return beta / T(M) for each number.

    Args:
        kind: T.
        p: probability with which each client sends a number that it holds, in (0, 1].
        holders: clients that hold each number, n above, shape (d,).
        sent: clients that sent it, M above, shape (d,).
        ratio: R2 / R1.
    """
    table = np.zeros((int(holders.max(initial=0)) + 1, int(sent.max(initial=0)) + 1))
    for n in np.unique(holders[holders > 0]):
        values = transform(kind, int(n), ratio)
        m = min(n, table.shape[1] - 1)
        table[n, 1 : m + 1] = beta(values, p) / values[:m]
    return table[holders, sent].astype(np.float32)
