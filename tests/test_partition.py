"""Partitions: every index exactly once, minimum sizes honoured or refused, same seed same split."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.data import partition as splits
from fedsieve.data.partition import partition
from fedsieve.errors import DataError
from fedsieve.settings import Data
from fedsieve.streams import Streams

KINDS = ("iid", "dirichlet", "shards", "classes", "quantity")
TEN = np.repeat(np.arange(10), 100)

labels = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(lambda values: np.array(values, dtype=np.int64))
seeds = st.integers(0, 2**63 - 1)


def once(parts, n):
    assert all(np.all(np.diff(part) > 0) for part in parts), "each part ascends"
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(labels, st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1e-3, 0.3, 1.0, 1e12]), seeds)
def test_every_index_once_or_refused(kind, y, clients, each, least, alpha, seed):
    data = Data(partition=kind, clients=clients, per_client=each, min_examples=least, alpha=alpha)
    try:
        parts = partition(y, data, Streams(seed))
    except DataError:
        impossible = clients * least > len(y)
        assert impossible or kind in ("dirichlet", "shards", "classes"), "iid and quantity always work where it is possible"
        return
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= least
    once(parts, len(y))
    again = partition(y, data, Streams(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides(kind):
    one, same, other = (partition(TEN, Data(partition=kind), Streams(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_is_even_and_golden():
    parts = partition(np.zeros(103, dtype=np.int64), Data(clients=10), Streams(0))
    assert sorted(map(len, parts)) == [10] * 7 + [11] * 3
    words = Streams(0)("partition").words(103)
    dumb = sorted(range(103), key=lambda i: int(words[i]))[:11]
    assert parts[0].tolist() == sorted(dumb)


@pytest.mark.parametrize("clients", [10, 100])
def test_classes_of_fedsparsify(clients):
    parts = partition(TEN, Data(partition="classes", clients=clients, per_client=2), Streams(0))
    once(parts, 1000)
    held = [tuple(np.unique(TEN[part])) for part in parts]
    assert all(len(classes) == 2 for classes in held)
    assert held[0] == (0, 1)
    assert held[-1] == (8, 9)
    assert {len(part) for part in parts} == {1000 // clients}


def test_classes_rule_by_hand():
    # 3 clients x 2; slices 0 0 1 1 2 2: (0, 1), (0, 1), then the third is left with 2 2: repaired to (0, 1), (2, 0), (1, 2)
    y = np.repeat([0, 1, 2], 4)
    parts = partition(y, Data(partition="classes", clients=3, per_client=2), Streams(0))
    assert [tuple(np.unique(y[part])) for part in parts] == [(0, 1), (0, 2), (1, 2)]
    once(parts, 12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.integers(1, 4))
def test_classes_refused_only_where_impossible(piles, each):
    """Slices of one example each: possible exactly when no label has more of them than there are clients (Gale-Ryser)."""
    y = np.repeat(np.arange(len(piles)), piles)
    y = y[: len(y) // each * each]
    clients = len(y) // each
    if not clients:
        return
    data = Data(partition="classes", clients=clients, per_client=each)
    if np.bincount(y).max() > clients:
        with pytest.raises(DataError, match="partition classes"):
            partition(y, data, Streams(0))
        return
    parts = partition(y, data, Streams(0))
    once(parts, len(y))
    assert all(len(np.unique(y[part])) == each for part in parts)


def test_shards_hold_few_labels():
    parts = partition(TEN, Data(partition="shards", clients=20, per_client=2), Streams(3))
    once(parts, 1000)
    assert {len(part) for part in parts} == {50}
    assert max(len(np.unique(TEN[part])) for part in parts) == 2
    assert len({tuple(np.unique(TEN[part])) for part in parts}) > 5, "dealt at random, not in turn"


def test_alpha_skews_labels():
    def largest_share(alpha):
        parts = partition(TEN, Data(partition="dirichlet", alpha=alpha), Streams(0))
        once(parts, 1000)
        return np.mean([np.bincount(TEN[part]).max() / len(part) for part in parts])

    assert largest_share(1e4) < 0.13
    assert largest_share(0.1) > 0.4


def test_alpha_skews_sizes_but_not_labels():
    many = np.tile(np.arange(10), 1000)
    even = partition(many, Data(partition="quantity", alpha=1e4), Streams(0))
    uneven = partition(many, Data(partition="quantity", alpha=0.3, min_examples=7), Streams(0))
    once(uneven, 10000)
    assert max(map(len, even)) < 1.1 * min(map(len, even))
    assert max(map(len, uneven)) > 5 * np.median([len(part) for part in uneven])
    assert min(map(len, uneven)) >= 7
    assert np.abs(np.bincount(many[max(uneven, key=len)]) / max(map(len, uneven)) - 0.1).max() < 0.03


@pytest.mark.parametrize(("clients", "alpha"), [(7, 5e-324), (7, 1.7e308)])
@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_extreme_alpha(kind, clients, alpha):
    data = Data(partition=kind, clients=clients, alpha=alpha)
    if kind == "dirichlet" and alpha < 1:
        with pytest.raises(DataError, match=r"data\.alpha"):
            partition(TEN[:200], data, Streams(0))
    else:
        once(partition(TEN, data, Streams(0)), 1000)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data(clients=1001), "1001 clients with at least 1 .* there are 1000"),
        (Data(clients=100, min_examples=11), "need 1100 examples"),
        (Data(clients=100, min_examples=11, partition="dirichlet"), "need 1100 examples"),
        (Data(clients=50, alpha=0.01, min_examples=5, partition="dirichlet"), r"100 draws.*got \d+(.|\n)*Raise data.alpha"),
        (Data(clients=600, per_client=2, partition="shards"), "600 clients x 2 slices"),
        (Data(clients=600, per_client=2, partition="classes"), "600 clients x 2 slices"),
        (Data(clients=2, per_client=11, partition="classes"), "at most the 10 classes"),
        (
            Data(clients=2, per_client=2, min_examples=500, partition="natural"),
            "no client ids(.|\n)*spoken-digits, shakespeare",
        ),
    ],
)
def test_refusals_say_what_to_change(data, said):
    with pytest.raises(DataError, match=said) as refused:
        partition(TEN, data, Streams(0))
    assert "data." in str(refused.value)
    assert str(refused.value).count("\n") < 8


def test_classes_refuse_a_label_too_common():
    with pytest.raises(DataError, match=r"label 0 fills 7 of 8 slices, more than there are clients \(4\)"):
        partition(np.repeat([0, 1], [900, 100]), Data(partition="classes", clients=4), Streams(0))


def test_natural_clients_are_the_owners():
    owners = np.array([7, 3, 3, 9, 7, 3, 20])
    y = np.zeros(7, dtype=np.int64)
    parts = partition(y, Data(partition="natural", clients=10), Streams(0), owners)
    assert [part.tolist() for part in parts] == [[1, 2, 5], [0, 4], [3], [6]]
    parts = partition(y, Data(partition="natural", clients=10, min_examples=2), Streams(0), owners)
    assert [part.tolist() for part in parts] == [[1, 2, 5], [0, 4]]
    with pytest.raises(DataError, match="the largest has 3"):
        partition(y, Data(partition="natural", min_examples=4), Streams(0), owners)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60).map(np.array), st.integers(1, 8), seeds)
def test_natural_draws_owners(owners, clients, seed):
    data = Data(partition="natural", clients=clients)
    parts = partition(np.zeros(len(owners), dtype=np.int64), data, Streams(seed), owners)
    chosen = [owners[part[0]] for part in parts]
    assert len(parts) == min(clients, len(np.unique(owners)))
    assert chosen == sorted(set(chosen))
    assert all(np.array_equal(part, np.flatnonzero(owners == owner)) for part, owner in zip(parts, chosen, strict=True))


def test_natural_draw_depends_on_the_seed():
    owners, y = np.repeat(np.arange(50), 2), np.zeros(100, dtype=np.int64)
    drawn = {
        tuple(owners[p[0]] for p in partition(y, Data(partition="natural", clients=3), Streams(s), owners)) for s in range(5)
    }
    assert len(drawn) == 5


@settings(deadline=None, max_examples=60)
@given(labels, labels, st.integers(1, 6), seeds)
def test_shares_follow_the_training_labels(y_test, y_train, clients, seed):
    clients = min(clients, len(y_train))
    parts = partition(y_train, Data(clients=clients), Streams(seed))
    shares = splits.test_shares(y_test, y_train, parts, Streams(seed))
    assert len(shares) == clients
    held = np.isin(y_test, y_train)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.flatnonzero(held))
    for label in np.unique(y_test[held]):
        n = np.count_nonzero(y_test == label)
        for part, share in zip(parts, shares, strict=True):
            exact = n * np.count_nonzero(y_train[part] == label) / np.count_nonzero(y_train == label)
            assert abs(np.count_nonzero(y_test[share] == label) - exact) < 1
    again = splits.test_shares(y_test, y_train, parts, Streams(seed))
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def test_shares_by_hand():
    # class 0: 5 test examples for 3 : 1 -> exact 3.75 and 1.25 -> 4 and 1; class 1: only the second client; class 2: nobody
    y_train = np.array([0, 0, 0, 0, 1])
    y_test = np.array([0, 1, 0, 0, 2, 0, 0, 1])
    first, second = splits.test_shares(y_test, y_train, (np.array([0, 1, 2]), np.array([3, 4])), Streams(0))
    assert np.bincount(y_test[first], minlength=3).tolist() == [4, 0, 0]
    assert np.bincount(y_test[second], minlength=3).tolist() == [1, 2, 0]


def test_shares_of_owners():
    owners_train, owners_test = np.array([1, 1, 2, 4]), np.array([2, 1, 4, 3, 2])
    parts = (np.array([2]), np.array([3]))
    y = np.zeros(5, dtype=np.int64)
    shares = splits.test_shares(y, y[:4], parts, Streams(0), owners_train=owners_train, owners_test=owners_test)
    assert [share.tolist() for share in shares] == [[0, 4], [2]]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 30), st.data(), seeds)
def test_sampled_clients_hold_as_many_as_asked_and_none_twice(population, clients, data, seed):
    each = data.draw(st.integers(1, population))
    parts = partition(np.zeros(population, dtype=np.int64), sampled(clients, each), Streams(seed))
    assert len(parts) == clients
    for part in parts:
        assert len(part) == each
        assert np.all(np.diff(part) > 0)
        assert 0 <= part[0] <= part[-1] < population
    again = partition(np.zeros(population, dtype=np.int64), sampled(clients, each), Streams(seed))
    assert np.array_equal(parts.flat, again.flat)


def sampled(clients, examples, **others):
    return Data(partition="sample", clients=clients, examples=examples, **others)


@pytest.mark.parametrize("each", [1, 3, 4, 6])
def test_every_set_is_sampled_alike(each):
    """Of 7 examples: each of the sets of this size comes with its share, within 5 standard deviations."""
    clients = 20_000
    parts = partition(np.zeros(7, dtype=np.int64), sampled(clients, each), Streams(1))
    number = comb(7, each)
    _, found = np.unique(parts.flat.reshape(clients, each), axis=0, return_counts=True)
    assert len(found) == number
    mean = clients / number
    assert np.abs(found - mean).max() < 5 * np.sqrt(mean)


def test_sampled_clients_are_independent_and_many():
    parts = partition(TEN, sampled(20_000, 60), Streams(0))
    held = np.zeros((2, 1000), dtype=bool)
    held[0, parts[0]] = held[1, parts[1]] = True
    assert 0 < np.count_nonzero(held.all(axis=0)) < 20
    counts = np.bincount(parts.flat, minlength=1000)
    assert np.abs(counts - 1200).max() < 5 * np.sqrt(1200)
    assert np.array_equal(parts.histogram(TEN, 10)[19_999], np.bincount(TEN[parts[19_999]], minlength=10))
    other = partition(TEN, sampled(20_000, 60), Streams(1))
    assert not np.array_equal(parts.flat, other.flat)


@pytest.mark.parametrize("data", [sampled(2, 1001), sampled(2, 3, min_examples=4)])
def test_a_sample_that_cannot_be_is_refused(data):
    with pytest.raises(DataError, match=r"data\.examples = (1001|3), allowed: from data\.min_examples = (1|4) to the 1000"):
        partition(TEN, data, Streams(0))


@given(st.lists(st.lists(st.integers(0, 9), max_size=5).map(lambda held: np.array(held, dtype=np.int64)), max_size=6))
def test_parts_are_the_arrays_they_were_made_of(arrays):
    parts = splits.Parts.of(arrays)
    assert splits.Parts.of(parts) is parts
    assert len(parts) == len(arrays)
    assert [part.tolist() for part in parts] == [array.tolist() for array in arrays]
    assert [part.tolist() for part in parts[1:]] == [array.tolist() for array in arrays[1:]]
    assert parts.sizes.tolist() == list(map(len, arrays))
    with pytest.raises(IndexError):
        parts[len(arrays)]
    labels = np.arange(10) % 3
    assert parts.histogram(labels, 3).tolist() == [np.bincount(labels[array], minlength=3).tolist() for array in arrays]


def test_a_hundred_thousand_natural_clients_are_found():
    owners = Streams(0)("owners").permutation(300_000) % 100_000
    parts = partition(np.zeros(300_000, dtype=np.int64), Data(partition="natural", clients=100_000), Streams(0), owners)
    assert (parts.sizes == 3).all()
    for client in (0, 1, 54_321, 99_999):
        assert parts[client].tolist() == np.flatnonzero(owners == client).tolist()
