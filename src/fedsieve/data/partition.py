"""Who holds which examples: label skew, size skew, or the data's own clients.

A partition is a sequence of ascending index arrays, one a client; every index is in exactly one of them (a natural partition
that takes only some owners leaves the others' examples out; in a sample, several clients may hold the same example). All draws
come from streams named `partition/...` of the run's seed, so the same settings and seed give the same split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedsieve.data.datasets import CATALOGUE
from fedsieve.errors import DataError
from fedsieve.settings import Data
from fedsieve.streams import Stream, Streams

Indices = NDArray[np.int64]

DRAWS = 100
"""how often a dirichlet partition is drawn before it is refused"""


@dataclass(frozen=True, slots=True, eq=False)
class Parts(Sequence[Indices]):
    """Positions of each client, held as one array: 100,000 small ones would take seconds to make, pickle and hash."""

    flat: Indices
    """the positions of client 0, then those of client 1, ..."""
    bounds: Indices
    """where those of each client begin, and the end, shape (clients + 1,)"""

    @classmethod
    def of(cls, arrays: Sequence[Indices]) -> Parts:
        """Join arrays; parts are returned as they are."""
        if isinstance(arrays, cls):
            return arrays
        bounds = np.cumsum([0, *map(len, arrays)])
        return cls(np.concatenate([*arrays, np.arange(0)]), bounds)

    @classmethod
    def by_owner(cls, owners: Indices, positions: Indices, clients: int) -> Parts:
        """Give each position to its owner in [0, clients), both of shape (n,)."""
        order = np.lexsort((positions, owners))
        return cls(positions[order], np.searchsorted(owners[order], np.arange(clients + 1)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, client: int) -> Indices: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Indices]: ...
    def __getitem__(self, client: int | slice) -> Indices | Sequence[Indices]:
        clients = range(len(self))[client]
        if isinstance(clients, range):
            return [self[each] for each in clients]
        return self.flat[self.bounds[clients] : self.bounds[clients + 1]]

    @property
    def sizes(self) -> Indices:
        """Number of positions of each client, shape (clients,)."""
        return np.diff(self.bounds)

    def histogram(self, labels: Indices, classes: int) -> Indices:
        """Count by client and label, shape (clients, classes)."""
        cells = np.repeat(np.arange(len(self)) * classes, self.sizes) + labels[self.flat]
        return np.bincount(cells, minlength=len(self) * classes).reshape(len(self), classes)


def partition(labels: Indices, settings: Data, streams: Streams, owners: Indices | None = None) -> Parts:
    """Share out the training examples among the clients.

    Args:
        labels: class of each example, shape (N,).
        settings: partition, clients, alpha, per_client, examples and min_examples are used.
        streams: of the run's seed; purposes begin with `partition`.
        owners: the data's own client ids, shape (N,), for the natural partition.

    Returns:
        One ascending array of positions in `labels` a client.

    Raises:
        DataError: the examples cannot be shared out as asked; nothing is relaxed silently.
    """
    if settings.partition == "natural":
        return _natural(settings, streams, owners)
    if settings.partition == "sample":
        return _sample(len(labels), settings, streams)
    clients, need = settings.clients, settings.clients * settings.min_examples
    if need > len(labels):
        raise DataError(
            f"{clients} clients with at least {settings.min_examples} training examples each need {need} examples; there are"
            f" {len(labels)}.\nLower data.clients or data.min_examples, or raise data.train_limit."
        )
    if settings.partition == "dirichlet":
        return _dirichlet(labels, settings, streams)
    stream = streams("partition")
    if settings.partition == "iid":
        parts = np.array_split(stream.permutation(len(labels)), clients)
    elif settings.partition == "quantity":
        parts = _quantity(len(labels), settings, stream)
    elif settings.partition == "shards":
        parts = _shards(labels, settings, stream)
    else:
        parts = _classes(labels, settings, stream)
    return _accepted(parts, settings)


def test_shares(
    test_labels: Indices,
    train_labels: Indices,
    train_parts: Sequence[Indices],
    streams: Streams,
    *,
    owners_train: Indices | None = None,  # noqa: PT028 (no test)
    owners_test: Indices | None = None,  # noqa: PT028
) -> Parts:
    """Give each client its own test examples, distributed as its training examples are.

    With owners, a client gets the test examples of its owner. Without, the test examples of each class are shared out in
    proportion to the training examples of that class (largest remainder; a stream breaks ties and says which examples), so
    every test index is in exactly one share. Test examples that no client stands for are left out: those of a class that no
    client holds, or of an owner that is no client. A client may end with none.
    """
    parts = Parts.of(train_parts)
    if owners_train is not None and owners_test is not None:
        return _of_owners(owners_test, owners_train[parts.flat[parts.bounds[:-1]]])
    histogram = parts.histogram(train_labels, 1 + max(test_labels.max(), train_labels.max()))
    owners, owned = [np.arange(0)], [np.arange(0)]
    for label in np.unique(test_labels):
        held = histogram[:, label]
        if not held.any():
            continue
        stream = streams(f"partition/shares/{label}")
        positions = np.flatnonzero(test_labels == label)
        positions = positions[stream.permutation(len(positions))]
        numbers = _apportion(held, len(positions), stream.permutation(len(held)))
        owners.append(np.repeat(np.arange(len(held)), numbers))
        owned.append(positions)
    return Parts.by_owner(np.concatenate(owners), np.concatenate(owned), len(parts))


def sample(population: int, clients: int, each: int, stream: Stream) -> Parts:
    """Draw `each` of range(population) without replacement for each client, independently of the other clients.

    Every set of that size is equally likely, but for a bias below population / 2**32: positions that a client drew twice are
    drawn anew until there are none, and where more than half is to be drawn, what is left out is drawn instead.
    """
    number = min(each, population - each)

    def draw(n: int) -> Indices:
        return ((stream.words(n) >> np.uint64(32)) * np.uint64(population) >> np.uint64(32)).astype(np.int64)

    drawn = np.sort(draw(clients * number).reshape(clients, number))
    left = np.arange(clients)
    while len(left):
        rows = drawn[left]
        twice = np.zeros(rows.shape, dtype=bool)
        twice[:, 1:] = rows[:, 1:] == rows[:, :-1]
        again = twice.any(axis=1)
        left, rows, twice = left[again], rows[again], twice[again]
        rows[twice] = draw(int(np.count_nonzero(twice)))
        drawn[left] = np.sort(rows)
    if number < each:
        kept = np.ones((clients, population), dtype=bool)
        np.put_along_axis(kept, drawn, False, axis=1)
        drawn = np.nonzero(kept)[1]
    return Parts(drawn.reshape(-1), each * np.arange(clients + 1))


def _accepted(parts: list[Indices], settings: Data) -> Parts:
    smallest = min(len(part) for part in parts)
    if smallest < settings.min_examples:
        raise DataError(
            f"partition {settings.partition}: the smallest client has {smallest} training examples, data.min_examples is"
            f" {settings.min_examples}.\nLower data.min_examples, data.clients or data.per_client."
        )
    return Parts.of([np.sort(part) for part in parts])


def _sample(examples: int, settings: Data, streams: Streams) -> Parts:
    """Let each client draw data.examples training examples."""
    if not settings.min_examples <= settings.examples <= examples:
        raise DataError(
            f"partition sample: data.examples = {settings.examples}, allowed: from data.min_examples = {settings.min_examples}"
            f" to the {examples} training examples."
        )
    return sample(examples, settings.clients, settings.examples, streams("partition"))


def _of_owners(owners: Indices, chosen: Indices) -> Parts:
    """Make a client of each chosen owner: the positions at which it stands in `owners`. No owner is chosen twice."""
    order = np.argsort(chosen)
    place = np.minimum(np.searchsorted(chosen[order], owners), len(chosen) - 1)
    held = np.flatnonzero(chosen[order][place] == owners)
    return Parts.by_owner(order[place[held]], held, len(chosen))


def _natural(settings: Data, streams: Streams, owners: Indices | None) -> Parts:
    """Make a client of each owner with min_examples or more, by ascending id; draw among them where they are too many."""
    if owners is None:
        known = ", ".join(entry.name for entry in CATALOGUE if entry.natural)
        raise DataError(
            f"data.partition = natural: the data set {settings.name!r} has no client ids.\nSets that have them: {known};"
            " in npz:PATH the array client_train.\nOr choose another data.partition: iid, dirichlet, shards, classes, quantity,"
            " sample."
        )
    ids, counts = np.unique(owners, return_counts=True)
    eligible = ids[counts >= settings.min_examples]
    if not len(eligible):
        raise DataError(
            f"none of the {len(ids)} natural clients has {settings.min_examples} training examples; the largest has"
            f" {counts.max()}.\nLower data.min_examples."
        )
    if settings.clients < len(eligible):
        eligible = eligible[streams("partition").choice(len(eligible), settings.clients)]
    return _of_owners(owners, eligible)


def _dirichlet(labels: Indices, settings: Data, streams: Streams) -> Parts:
    """Share out each class among the clients in proportions drawn from Dirichlet(alpha), anew until min_examples is honoured.

    As Yurochkin et al. 2019 (arXiv:1905.12022, sec. 4): one draw over the clients for each class.
    """
    best = 0
    for draw in range(DRAWS):
        stream = streams(f"partition/{draw}")
        shuffled = stream.permutation(len(labels))
        generator = stream.numpy()
        owned: list[list[Indices]] = [[] for _ in range(settings.clients)]
        for label in np.unique(labels):
            positions = shuffled[labels[shuffled] == label]
            cuts = _cuts(settings.alpha, settings.clients, len(positions), generator)
            for mine, some in zip(owned, np.split(positions, cuts), strict=True):
                mine.append(some)
        parts = [np.sort(np.concatenate(mine)) for mine in owned]
        smallest = min(len(part) for part in parts)
        if smallest >= settings.min_examples:
            return Parts.of(parts)
        best = max(best, smallest)
    raise DataError(
        f"partition dirichlet with data.alpha = {settings.alpha} and {settings.clients} clients: in {DRAWS} draws the smallest"
        f" client got {best} training examples at best, data.min_examples is {settings.min_examples}.\n"
        "Raise data.alpha, or lower data.clients or data.min_examples."
    )


def _quantity(examples: int, settings: Data, stream: Stream) -> list[Indices]:
    """Give min_examples to each client and the rest in proportions drawn from Dirichlet(alpha); labels are iid."""
    shuffled = stream.permutation(examples)
    rest = examples - settings.clients * settings.min_examples
    cuts = _cuts(settings.alpha, settings.clients, rest, stream.numpy())
    return np.split(shuffled, cuts + settings.min_examples * np.arange(1, settings.clients))


def _shards(labels: Indices, settings: Data, stream: Stream) -> list[Indices]:
    """Deal clients x per_client slices of label-sorted data at random (McMahan et al. 2017, arXiv:1602.05629, sec. 3)."""
    slices = _slices(labels, settings, stream)
    dealt = stream.permutation(len(slices)).reshape(settings.clients, settings.per_client)
    return [np.concatenate([slices[i] for i in mine]) for mine in dealt]


def _classes(labels: Indices, settings: Data, stream: Stream) -> list[Indices]:
    """Give each client slices of per_client different labels (Stripelis et al. 2022, FedSparsify, arXiv:2204.12430).

    A slice counts as its most frequent label; where the number of examples of a class is no multiple of the slice, a slice
    also holds some of the next class.
    """
    classes = len(np.unique(labels))
    if settings.per_client > classes:
        raise DataError(f"partition classes: data.per_client = {settings.per_client}, allowed: at most the {classes} classes.")
    slices = _slices(labels, settings, stream)
    majority = [int(np.bincount(labels[part]).argmax()) for part in slices]
    dealt = _deal_in_turn(majority, settings) or _deal_most_left(majority, settings)
    return [np.concatenate([slices[i] for i in mine]) for mine in dealt]


def _slices(labels: Indices, settings: Data, stream: Stream) -> list[Indices]:
    """Sort by label, in random order within one, and cut into clients x per_client slices whose sizes differ by at most 1."""
    number = settings.clients * settings.per_client
    if number > len(labels):
        raise DataError(
            f"partition {settings.partition}: {settings.clients} clients x {settings.per_client} slices are more than the"
            f" {len(labels)} training examples.\nLower data.clients or data.per_client."
        )
    shuffled = stream.permutation(len(labels))
    return np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], number)


def _deal_in_turn(majority: list[int], settings: Data) -> list[list[int]]:
    """Let each client in turn take the first slices whose labels it does not hold yet; empty where slices would remain."""
    left, dealt = list(range(len(majority))), []
    for _ in range(settings.clients):
        mine: dict[int, int] = {}
        for position in left:
            mine.setdefault(majority[position], position)
            if len(mine) == settings.per_client:
                break
        else:
            return []
        dealt.append(list(mine.values()))
        left = [position for position in left if mine.get(majority[position]) != position]
    return dealt


def _deal_most_left(majority: list[int], settings: Data) -> list[list[int]]:
    """Let each client in turn take one slice of each of the labels with most slices left, lower labels first.

    This places all slices whenever that is possible at all, which is when no label has more slices than there are clients.

    Deviates: FedSparsify refuses where its own rule leaves slices over.
    """
    piles = {label: [i for i, its in enumerate(majority) if its == label] for label in sorted(set(majority))}
    largest = max(piles, key=lambda label: len(piles[label]))
    if len(piles[largest]) > settings.clients:
        raise DataError(
            f"partition classes: label {largest} fills {len(piles[largest])} of {len(majority)} slices, more than there are"
            f" clients ({settings.clients}),\nso {settings.per_client} different labels a client are impossible."
            " Lower data.per_client, or use data.partition = shards or dirichlet."
        )
    dealt = []
    for _ in range(settings.clients):
        most = sorted(piles, key=lambda label: (-len(piles[label]), label))[: settings.per_client]
        dealt.append([piles[label].pop(0) for label in most])
    return dealt


def _cuts(alpha: float, clients: int, examples: int, generator: np.random.Generator) -> Indices:
    """Where to cut `examples` into shares of proportions drawn from Dirichlet(alpha), shape (clients - 1,)."""
    proportions = generator.dirichlet(np.full(clients, min(alpha, 1e9)))  # beyond, all are equal, and sums would overflow
    cuts = np.floor(np.cumsum(proportions)[:-1] * examples + 0.5).astype(np.int64)
    return np.minimum(cuts, examples)


def _apportion(weights: Indices, total: int, order: Indices) -> Indices:
    """Divide `total` by whole-number weights, largest remainder first, ties in the order given. Exact in integers."""
    numbers, remainders = np.divmod(weights * total, weights.sum())
    ranked = order[np.argsort(-remainders[order], kind="stable")]
    numbers[ranked[: total - numbers.sum()]] += 1
    return np.asarray(numbers, dtype=np.int64)
