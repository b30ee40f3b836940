"""Data sets are what they claim to be or are refused; batches are the dumb loop, only faster."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.data import datasets
from fedsieve.data.batches import PAD, Examples, federate
from fedsieve.data.datasets import CATALOGUE, WINDOW, Dataset, from_arrays, load
from fedsieve.errors import DataError, UsageError
from fedsieve.settings import Data
from fedsieve.streams import Streams

FOLDER = os.environ.get("FEDSIEVE_DATA")
ENTRIES = {entry.name: entry for entry in CATALOGUE}


@cache
def real(name):
    """The data set itself, or skip the test: only digits is always there."""
    places = [Path(FOLDER)] if FOLDER else []
    places += [p / name for p in places] + [Path("/usr/share/datasets") / name]
    if not all(any((place / file).is_file() for place in places) for file in ENTRIES[name].files):
        pytest.skip(f"the files of {name} are not on this machine (FEDSIEVE_DATA)")
    return load(Data(name=name))


@pytest.fixture(scope="module")
def digits():
    return load(Data())


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """An empty working folder, and no FEDSIEVE_DATA."""
    monkeypatch.delenv("FEDSIEVE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(n=12, m=6, shape=(3,), classes=3):
    """Small valid arrays."""
    rng = Streams(0)("test/arrays").numpy()
    x, z = rng.random((n, *shape), dtype=np.float32), rng.random((m, *shape), dtype=np.float32)
    return x, np.arange(n) % classes, z, np.arange(m) % classes


# --- the built-in sets


@pytest.mark.parametrize("name", [e.name for e in CATALOGUE])
def test_catalogue_tells_the_truth(name):
    entry, dataset = ENTRIES[name], real(name)
    assert (len(dataset.x_train), len(dataset.x_test)) == (len(dataset.y_train), len(dataset.y_test)) == entry.examples
    assert tuple(dataset.x_train.shape[1:]) == tuple(dataset.x_test.shape[1:]) == entry.shape
    assert dataset.classes == entry.classes
    assert int(dataset.y_train.max()) == entry.classes - 1
    assert dataset.x_train.is_contiguous()
    assert (dataset.owner_train is not None) == bool(entry.natural)
    if entry.natural:
        assert len(np.unique(dataset.owner_train)) == int(entry.natural.split()[0])
        assert set(dataset.owner_test) <= set(dataset.owner_train)
    if dataset.x_train.dtype == torch.uint8:
        values = dataset.x_train.numel() / dataset.x_train.shape[1]
        mean = dataset.x_train.sum((0, 2, 3)).double() / values
        squares = sum(images.float().square().sum((2, 3)).double().sum(0) for images in dataset.x_train.split(5000)) / values
        assert torch.allclose(torch.tensor(dataset.mean).double(), mean, rtol=0, atol=1e-4)
        assert torch.allclose(torch.tensor(dataset.std).double(), (squares - mean**2).sqrt(), rtol=0, atol=1e-4)
    datasets._checked(dataset)
    federation = federate(dataset, Data(name=name, partition="natural" if entry.natural else "iid"), Streams(0))
    assert min(map(len, federation.parts)) > 0
    x, y = next(federation.train.epoch(federation.parts[0], 4))
    assert x.shape == (4, *entry.shape)
    assert y.shape[0] == 4


def test_digits_split_is_fixed(digits):
    assert torch.bincount(digits.y_test).tolist() == [36] * 10
    assert int(digits.x_train.max()) == 16
    text = digits.x_train.numpy().tobytes() + digits.x_test.numpy().tobytes() + digits.y_train.numpy().astype("<i8").tobytes()
    assert sha256(text).hexdigest()[:16] == "52c77af15777136e"
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = torch.cat([digits.x_train, digits.x_test]).reshape(1797, 64).numpy()
    ours = sorted(zip(rows.tolist(), torch.cat([digits.y_train, digits.y_test]).tolist(), strict=True))
    assert ours == sorted(zip(images.astype(int).tolist(), labels.tolist(), strict=True))


def test_cifar10_decodes_to_the_original_bytes():
    dataset = real("cifar10")
    parts = dataset.x_train[:25000], dataset.x_train[25000:], dataset.x_test
    found = [sha256(part.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest()[:16] for part in parts]
    assert found == ["bf0741526492013c", "6903e0a4db0d9b19", "31fb9e9628079d95"]


def test_spoken_digits_split_is_the_official_one():
    dataset = real("spoken-digits")
    assert np.bincount(dataset.owner_test).tolist() == [50] * 6
    assert torch.bincount(dataset.y_test).tolist() == [30] * 10


def test_shakespeare_predicts_the_next_character():
    dataset = real("shakespeare")
    assert dataset.x_train.shape[1] == WINDOW == dataset.y_train.shape[1]
    assert torch.equal(dataset.x_train[:, 1:], dataset.y_train[:, :-1])
    follows = dataset.owner_train[1:] == dataset.owner_train[:-1]
    assert torch.equal(dataset.x_train[1:][follows][:, 0], dataset.y_train[:-1][follows][:, -1]), "windows are consecutive"
    train, test = (np.bincount(owner, minlength=299) for owner in (dataset.owner_train, dataset.owner_test))
    assert np.array_equal(test, np.where(train + test > 0, np.maximum(1, (train + test) // 5), 0))


@pytest.mark.parametrize("name", ["wisdm", "heart-disease"])
def test_features_are_filled_and_standardised(name):
    dataset = real(name)
    x = dataset.x_train.double()
    assert torch.isfinite(x).all()
    assert torch.isfinite(dataset.x_test).all()
    assert x.mean(0).abs().max() < 1e-5
    std = x.std(0, correction=0)
    assert ((std - 1).abs() < 1e-4).logical_or(std == 0).all()
    groups = [
        owner * 10 + y.numpy() for owner, y in ((dataset.owner_train, dataset.y_train), (dataset.owner_test, dataset.y_test))
    ]
    train, test = (np.bincount(group, minlength=400) for group in groups)
    assert np.array_equal(test, (train + test) // 5)


@pytest.mark.parametrize("name", ["digits", "spoken-digits", "wisdm", "shakespeare"])
def test_limits_keep_the_shares(name):
    whole = real(name)
    cut = load(Data(name=name, train_limit=300, test_limit=7))
    assert (len(cut.x_train), len(cut.y_train), len(cut.x_test), len(cut.y_test)) == (300, 300, 7, 7)
    assert (cut.mean, cut.std, cut.classes) == (whole.mean, whole.std, whole.classes)
    for key in (lambda d: d.owner_train, lambda d: d.y_train.numpy() if d.y_train.dim() == 1 else None):
        if key(whole) is not None:
            exact = np.bincount(key(whole), minlength=400) * 300 / len(whole.x_train)
            slack = 1 if key(whole) is whole.y_train.numpy() or whole.y_train.dim() > 1 else whole.classes
            assert np.abs(np.bincount(key(cut), minlength=400) - exact).max() <= slack
    again = load(Data(name=name, train_limit=300, test_limit=7))
    assert torch.equal(cut.x_train, again.x_train)
    assert len(load(Data(name=name, train_limit=10**6)).x_train) == len(whole.x_train)


def test_limits_balance_the_classes(digits):
    balanced = from_arrays(*arrays(n=3000, m=30))
    cut = datasets._limited(balanced, Data(train_limit=300, test_limit=9))
    assert torch.bincount(cut.y_train).tolist() == [100] * 3
    assert torch.bincount(cut.y_test).tolist() == [3] * 3


@pytest.mark.parametrize("name", ["digits", "spoken-digits", "wisdm", "shakespeare"])
def test_held_out_examples_are_no_training_examples_and_no_test_examples(name):
    whole, limit = real(name), Data(name=name, train_limit=1000)
    cut = load(limit)
    held = datasets.held_out(cut, 0.25, Streams(3)("validation"))
    assert (len(held.y_train), len(held.y_test)) == (750, 250)
    rows = (
        torch.cat([held.x_train.flatten(1), held.x_test.flatten(1)]).double()
        @ torch.arange(1, held.x_train[0].numel() + 1).double()
    )
    before = cut.x_train.flatten(1).double() @ torch.arange(1, held.x_train[0].numel() + 1).double()
    assert torch.equal(rows.sort().values, before.sort().values)
    if cut.owner_train is not None:
        apart = np.bincount(held.owner_test, minlength=400) - np.bincount(cut.owner_train, minlength=400) / 4
        assert np.abs(apart).max() <= (1 if cut.y_train.dim() > 1 else whole.classes)
    again, other = (datasets.held_out(cut, 0.25, Streams(seed)("validation")) for seed in (3, 4))
    assert torch.equal(held.x_test, again.x_test)
    assert not torch.equal(held.x_test, other.x_test)


def test_held_out_examples_are_of_each_class_alike(digits):
    held = datasets.held_out(from_arrays(*arrays(n=300, m=30)), 0.1, Streams(0)("validation"))
    assert torch.bincount(held.y_test).tolist() == [10] * 3


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_nothing_held_out_is_refused(share):
    with pytest.raises(
        UsageError, match=r"data.validation = 0.\d+ holds out (0|300) of the 300.*allowed: one or more, and not all"
    ):
        datasets.held_out(from_arrays(*arrays(n=300, m=30)), share, Streams(0)("validation"))


def test_validation_takes_the_place_of_test_examples_in_a_federation():
    data = federate(load(Data(name="digits")), Data(name="digits", clients=4, validation=0.2), Streams(0))
    assert (len(data.train), len(data.test)) == (1437 - 287, 287)
    assert sum(map(len, data.parts)) == len(data.train)
    assert sum(map(len, data.shares)) == len(data.test)


# --- files


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(nowhere, monkeypatch):
    """Four tiny idx files that stand for Fashion-MNIST, with their checksums."""
    contents = {
        stem: idx((np.arange(np.prod(shape)) % 10).astype(np.uint8).reshape(shape))
        for stem, shape in zip(datasets._IDX, [(20, 28, 28), (20,), (10, 28, 28), (10,)], strict=True)
    }
    sums = {f"fashion-mnist/{stem}": sha256(content).hexdigest() for stem, content in contents.items()}
    monkeypatch.setattr(datasets, "_SHA256", datasets._SHA256 | sums)
    return contents


@pytest.mark.parametrize("level", [None, 0, 1, 9])
@pytest.mark.parametrize("inside", ["", "fashion-mnist"])
def test_any_gzip_of_an_idx_file_will_do(fashion, nowhere, level, inside):
    (nowhere / inside).mkdir(exist_ok=True)
    for stem, content in fashion.items():
        file = stem if level is None else f"{stem}.gz"
        (nowhere / inside / file).write_bytes(content if level is None else gzip.compress(content, level))
    dataset = load(Data(name="fashion-mnist", root=str(nowhere)))
    assert dataset.x_train.shape == (20, 1, 28, 28)
    assert dataset.x_train[1, 0, 0, :3].tolist() == [4, 5, 6]
    assert dataset.y_test.tolist() == list(range(10))


@pytest.mark.parametrize("cut", [1, 8, 40, -1])
def test_damaged_gzip_is_named(fashion, nowhere, cut):
    for stem, content in fashion.items():
        (nowhere / f"{stem}.gz").write_bytes(gzip.compress(content))
    path = nowhere / f"{datasets._IDX[0]}.gz"
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-cut] if cut > 0 else damaged[:50] + bytes([damaged[50] ^ 255]) + damaged[51:])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is (a damaged gzip|damaged or another)"):
        load(Data(name="fashion-mnist", root=str(nowhere)))


def test_wrong_checksum_says_which(nowhere):
    np.savez(nowhere / "mnist.npz", x_train=np.zeros(3))
    found = sha256((nowhere / "mnist.npz").read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"mnist\.npz is damaged(.|\n)*expected b0aa38a3807bd085\.\.\., found {found[:16]}"):
        load(Data(name="mnist", root=str(nowhere)))
    assert sorted(path.name for path in nowhere.iterdir()) == ["mnist.npz"], "nothing is written"


def test_mnist_from_idx_files(nowhere, monkeypatch):
    original = real_mnist()
    for stem, array in zip(datasets._IDX, original, strict=True):
        (nowhere / stem).write_bytes(idx(array))
    dataset = load(Data(name="mnist", root=str(nowhere)))
    assert np.array_equal(dataset.x_test[:, 0].numpy(), original[2])


def real_mnist():
    path = Path(FOLDER or "nowhere") / "mnist.npz"
    if not path.is_file():
        pytest.skip("mnist.npz is not on this machine (FEDSIEVE_DATA)")
    with np.load(path) as npz:
        return [npz[key] for key in ("x_train", "y_train", "x_test", "y_test")]


@pytest.mark.parametrize("name", [e.name for e in CATALOGUE if e.files])
def test_missing_file_says_how_to_get_it(nowhere, name, monkeypatch):
    monkeypatch.setenv("FEDSIEVE_DATA", str(nowhere / "elsewhere"))
    for root in (None, str(nowhere)):
        if root is None and name == "fashion-mnist" and Path("/usr/share/datasets/fashion-mnist").is_dir():
            continue
        with pytest.raises(DataError) as refused:
            load(Data(name=name, root=root))
        said = str(refused.value)
        assert ENTRIES[name].files[0] in said
        assert "--data.root" in said
        assert "--data.name digits" in said
        assert said.count("\n") < 8
        assert ("elsewhere" in said) == (root is None), "an explicit root is not left for another folder"
        assert ("dataset-fashion-mnist" in said) == (name == "fashion-mnist")


def test_environment_folder_is_searched(fashion, nowhere, monkeypatch):
    (nowhere / "deep" / "fashion-mnist").mkdir(parents=True)
    for stem, content in fashion.items():
        (nowhere / "deep" / "fashion-mnist" / stem).write_bytes(content)
    monkeypatch.setenv("FEDSIEVE_DATA", str(nowhere / "deep"))
    assert len(load(Data(name="fashion-mnist")).x_train) == 20
    with pytest.raises(DataError, match="empty"):
        load(Data(name="fashion-mnist", root=str(nowhere / "empty")))


def test_unknown_name_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"'cifar10'(.|\n)*npz:PATH"):
        load(Data(name="cifar-10"))


# --- own arrays


def test_npz_brings_clients(tmp_path):
    x, y, z, w = arrays()
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=z, y_test=w, client_train=y + 5, client_test=w + 5)
    for data in (Data(name=f"npz:{tmp_path}/mine.npz"), Data(name="npz:mine.npz", root=str(tmp_path))):
        dataset = load(data)
        assert dataset.name == "mine"
        assert np.array_equal(dataset.x_train.numpy(), x)
        assert np.array_equal(dataset.owner_train, y + 5)
    federation = federate(dataset, Data(partition="natural"), Streams(0))
    assert [part.tolist() for part in federation.parts] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [share.tolist() for share in federation.shares] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("how", ["object", "pickle", "text", "missing", "folder", "keys", "cut"])
def test_bad_npz_is_refused(tmp_path, how, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    path, (x, y, z, w) = tmp_path / "bad.npz", arrays()
    if how == "object":
        np.savez(path, x_train=np.array([Evil(), Evil()], dtype=object), y_train=y, x_test=z, y_test=w)
    elif how == "pickle":
        import pickle

        path.write_bytes(pickle.dumps(Evil()))
    elif how == "text":
        path.write_text("a,b,c")
    elif how == "folder":
        path.mkdir()
    elif how == "keys":
        np.savez(path, x_train=x, y=y)
    elif how == "cut":
        np.savez(path, x_train=x, y_train=y, x_test=z, y_test=w)
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"bad\.npz"):
        load(Data(name=f"npz:{path}"))
    assert not ran


BAD = {
    "labels from 1": ({"y_train": np.arange(12) % 3 + 1, "y_test": np.arange(6) % 3 + 1}, "begin at 1"),
    "negative label": ({"y_train": np.arange(12) - 1}, "begin at -1"),
    "unseen label": ({"y_test": np.full(6, 3)}, r"go up to 3; allowed: up to 2"),
    "float labels": ({"y_train": np.zeros(12)}, "whole numbers"),
    "lengths": ({"y_train": np.arange(11) % 3}, r"shape \(11,\)"),
    "label columns": ({"y_train": np.zeros((12, 1), dtype=int)}, r"shape \(12, 1\)"),
    "nan": ({"x_train": np.full((12, 3), np.nan)}, "36 values are not finite"),
    "too large": ({"x_test": np.full((6, 3), 1e300)}, "18 values are not finite"),
    "strings": ({"x_train": np.full((12, 3), "a")}, "<U1"),
    "ragged": ({"x_train": [[1.0], [1.0, 2.0]]}, "x_train is no array"),
    "complex": ({"x_train": torch.zeros(12, 3, dtype=torch.complex64)}, "complex"),
    "flat": ({"x_train": np.zeros(12)}, r"\(12,\); allowed for float"),
    "empty": ({"x_test": np.zeros((0, 3)), "y_test": np.zeros(0, dtype=int)}, "x_test .* is empty"),
    "shapes": ({"x_test": np.zeros((6, 4))}, "must be alike"),
    "types": ({"x_test": np.zeros((6, 3), dtype=np.int64)}, "must be alike"),
    "negative token": ({"x_train": np.full((12, 3), -1), "x_test": np.zeros((6, 3), dtype=int)}, "go down to -1"),
    "channels last": ({"x_train": np.zeros((12, 8, 8, 3), dtype=np.uint8)}, r"transpose\(0, 3, 1, 2\)"),
    "integer images": ({"x_train": np.zeros((12, 8, 8), dtype=np.int64)}, r"integer tokens: \(N, T\)"),
    "five dimensions": ({"x_train": np.zeros((12, 1, 8, 8, 8), dtype=np.uint8)}, "uint8 images"),
    "owners": ({"owner_train": np.arange(11)}, r"owner_train .* \(11,\); allowed: \(12,\)"),
    "owners of the test only": ({"owner_test": np.arange(6)}, "give owner_train"),
    "float owners": ({"owner_train": np.zeros(12)}, "owner_train holds floating"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_do_not_fit_are_refused(case):
    changed, said = BAD[case]
    good = dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays(), strict=True))
    from_arrays(**good)
    with pytest.raises(DataError, match=said):
        from_arrays(**(good | changed))


@pytest.mark.parametrize(
    ("x", "shape", "dtype", "normalised"),
    [
        (np.ones((2, 8, 8), dtype=np.uint8), (2, 1, 8, 8), torch.uint8, True),
        (np.ones((2, 3, 8, 8), dtype=np.uint8), (2, 3, 8, 8), torch.uint8, True),
        (np.ones((2, 5), dtype=np.uint8), (2, 5), torch.float32, False),
        (np.ones((2, 5), dtype=bool), (2, 5), torch.float32, False),
        (np.ones((2, 5), dtype=">f8"), (2, 5), torch.float32, False),
        (np.ones((2, 5, 4, 3, 2), dtype=np.float16), (2, 5, 4, 3, 2), torch.float32, False),
        (np.ones((2, 5), dtype=np.uint16), (2, 5), torch.int64, False),
        (torch.ones(2, 5, dtype=torch.bfloat16, requires_grad=True), (2, 5), torch.float32, False),
        (torch.ones(2, 5, dtype=torch.int32), (2, 5), torch.int64, False),
        ([[1.0, 2.0], [3.0, 4.0]], (2, 2), torch.float32, False),
    ],
)
def test_kinds_of_arrays(x, shape, dtype, normalised):
    dataset = from_arrays(x, [0, 1], x, [1, 0])
    assert tuple(dataset.x_train.shape) == shape
    assert dataset.x_train.dtype == dtype
    assert not dataset.x_train.requires_grad
    assert dataset.classes == 2
    assert len(dataset.mean) == len(dataset.std) == (shape[1] if normalised else 0)


def test_moments_are_exact():
    x = Streams(0)("test/moments").numpy().integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
    x[:, 2] = 9
    dataset = from_arrays(x, np.arange(7), x, np.arange(7))
    assert np.allclose(dataset.mean, x.mean((0, 2, 3)))
    assert np.allclose(dataset.std, [x[:, 0].std(), x[:, 1].std(), 1.0]), "a constant channel is not divided by 0"


def test_tokens_share_the_labels_vocabulary():
    x = np.array([[0, 1, 6], [2, 3, 4]])
    assert from_arrays(x, x % 3, x, x % 2).classes == 7


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("own_module")
    monkeypatch.setitem(sys.modules, "own_module", made)
    return made


def test_own_function(module):
    module.tuple_ = arrays
    assert load(Data(name="own_module:tuple_")).classes == 3
    module.dataset = lambda: from_arrays(*arrays(), name="mine")
    assert load(Data(name="own_module:dataset", train_limit=6)).name == "mine"
    assert len(load(Data(name="own_module:dataset", train_limit=6)).x_train) == 6


def test_own_function_is_checked(module, tmp_path, monkeypatch):
    x, y, z, w = (torch.from_numpy(array) for array in arrays())
    module.wrong = lambda: Dataset("mine", x.double(), y, z, w, 3)
    module.means = lambda: Dataset("mine", x, y, z, w, 3, (0.0,), (1.0,))
    module.three = lambda: (x, y, z)
    for name, kind, said in (
        ("own_module:wrong", DataError, "float64"),
        ("own_module:means", DataError, "1 means and 1 stds; allowed: 3 each"),
        ("own_module:three", UsageError, "returned tuple"),
        ("own_module:absent", UsageError, "no function 'absent'"),
        ("absent_package.data:make", UsageError, "no module 'absent_package'"),
        (":make", UsageError, "package.module:function"),
        (".sibling:make", UsageError, "package.module:function"),
    ):
        with pytest.raises(kind, match=f"(?i){said}"):
            load(Data(name=name))
    (tmp_path / "needs_more.py").write_text("import absent_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        load(Data(name="needs_more:make"))


# --- the Hugging Face library


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'fedsieve\[hf\]'"):
        load(Data(name="hf:mnist"))


def split(columns):
    """What is used of a split of the library: features by name, and the rows as numpy arrays."""
    kinds = {name: type(kind, (), {})() for name, (kind, _) in columns.items()}
    rows = {name: values for name, (_, values) in columns.items()}
    return SimpleNamespace(features=kinds, with_format=lambda _: Rows(rows))


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, which):
        assert which == slice(None)
        return self.rows


def hub(monkeypatch, splits):
    """A stand-in for the library's two functions, for what it returns or raises."""

    def load_dataset(place):
        if isinstance(splits, Exception):
            raise splits
        return splits

    library = ModuleType("datasets")
    library.load_dataset, library.exceptions = load_dataset, SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_hub_columns(monkeypatch):
    x, y, _, w = arrays()
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    table = {"a": ("Value", x[:, 0]), "label": ("Value", y), "b": ("Value", x[:, 1]), "client": ("Value", y)}
    hub(monkeypatch, {"train": split(table), "validation": split(table)})
    dataset = load(Data(name="hf:table"))
    assert np.array_equal(dataset.x_train.numpy(), x[:, :2])
    assert np.array_equal(dataset.owner_test, y)
    photos = {"photo": ("Image", images), "name": ("Value", np.array(["a"] * 6)), "kind": ("ClassLabel", w)}
    hub(monkeypatch, {"train": split(photos), "test": split(photos)})
    assert load(Data(name="hf:photos")).x_train.shape == (6, 3, 8, 8)


def test_hub_refusals(monkeypatch):
    _, y, _, _ = arrays()
    words = split({"text": ("Value", np.array(["some words"] * 12)), "label": ("ClassLabel", y)})
    for splits, said in (
        (FileNotFoundError("no such set\nmore"), "no such set\nGive"),
        (RuntimeError("offline"), "offline"),
        ({"train": words}, "splits train; needed"),
        ({"train": words, "test": words}, "no table of numbers"),
        ({"train": split({"x": ("List", y)}), "test": words}, "no label"),
    ):
        hub(monkeypatch, splits)
        with pytest.raises(DataError, match=said):
            load(Data(name="hf:anything"))


def test_hub_reads_a_local_folder(tmp_path):
    library = pytest.importorskip("datasets")
    x, y, z, w = arrays()
    for name, rows, label in (("train", x, y), ("test", z, w)):
        lines = [",".join(map(str, [*row, k])) for row, k in zip(rows.tolist(), label, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,b,c,label", *lines]))
    for place in (str(tmp_path), tmp_path.name):
        dataset = load(Data(name=f"hf:{place}", root=None if place == str(tmp_path) else str(tmp_path.parent)))
        assert np.allclose(dataset.x_train.numpy(), x)
        assert np.array_equal(dataset.y_test.numpy(), w)
    saved = library.DatasetDict({"train": library.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})})
    saved["test"] = saved["train"]
    saved.save_to_disk(str(tmp_path / "saved"))
    assert np.allclose(load(Data(name=f"hf:{tmp_path}/saved")).x_test.numpy(), x)


# --- batches


def dumb(examples, order, batch, shifts=None):
    """One example after another, in float64."""
    rows = []
    for position, i in enumerate(order):
        image = examples.x[int(i)].double()
        if shifts is not None:
            down, right, mirrored = shifts[position]
            padded = torch.zeros(image.shape[0], image.shape[1] + 2 * PAD, image.shape[2] + 2 * PAD, dtype=torch.double)
            padded[:, PAD:-PAD, PAD:-PAD] = image
            image = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
            image = image.flip(2) if mirrored else image
        for channel, (mean, std) in enumerate(zip(examples.mean, examples.std, strict=True)):
            image = image.clone()
            image[channel] = (image[channel] - mean) / std
        rows.append((image, examples.y[int(i)]))
    return [rows[k : k + batch] for k in range(0, len(rows), batch)]


def photographs(shape, memory_format, mean, augment=False):
    x = Streams(0)("test/photographs").numpy().integers(0, 256, (40, *shape), dtype=np.uint8)
    x = torch.from_numpy(x).contiguous(memory_format=memory_format)
    moments = (tuple(range(5, 5 + shape[0])), tuple(range(2, 2 + shape[0]))) if mean else ((), ())
    return Examples(x, torch.arange(40) % 7, *moments, augment)


def assert_batches(batches, expected):
    assert len(batches) == len(expected)
    for (x, y), rows in zip(batches, expected, strict=True):
        assert x.dtype == torch.float32
        assert y.tolist() == [int(label) for _, label in rows]
        assert torch.allclose(x.double(), torch.stack([image for image, _ in rows]), atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 8, 8), (3, 8, 6)]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 39), max_size=50),
    st.integers(1, 60),
    st.sampled_from([1, 2**10, 2**18]),
)
def test_epoch_is_the_dumb_loop(shape, memory_format, mean, augment, order, batch, block):
    examples = photographs(shape, memory_format, mean, augment)
    shifts = None
    if augment:
        uniform = Streams(4)("augment").uniform(3 * len(order)).reshape(-1, 3)
        shifts = [(int(9 * a), int(9 * b), int(2 * c)) for a, b, c in uniform]
    stored = examples.x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.data.batches.BLOCK", block)
        batches = list(examples.epoch(np.array(order, dtype=np.int64), batch, Streams(4)("augment")))
    assert_batches(batches, dumb(examples, order, batch, shifts))
    assert torch.equal(examples.x, stored)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    if shape[0] == 1:
        assert all(x.is_contiguous() for x, _ in batches)


def test_augmentation_needs_a_stream_and_follows_it():
    examples = photographs((3, 8, 8), torch.channels_last, True, augment=True)
    order = np.arange(40)
    plain, one, same, other = (
        torch.cat([x for x, _ in examples.epoch(order, 16, stream)])
        for stream in (None, Streams(1)("a"), Streams(1)("a"), Streams(2)("a"))
    )
    assert_batches([(plain, examples.y)], dumb(examples, order, 40))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_augmentation_reaches_every_shift():
    from fedsieve.data.batches import _shifts

    drawn = {tuple(shift) for shift in _shifts(4000, Streams(0)("a")).tolist()}
    assert drawn == {(a, b, c) for a in range(9) for b in range(9) for c in range(2)}


def test_one_gather_an_epoch(monkeypatch):
    calls = []
    gather = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda self, *args: calls.append(1) or gather(self, *args))
    assert len(list(photographs((3, 8, 8), torch.channels_last, True).epoch(np.arange(40), 4))) == 10
    assert len(calls) == 2, "one of x and one of y"


def test_other_kinds_of_examples_pass_through():
    tokens = Examples(torch.arange(30).view(10, 3), torch.arange(30).view(10, 3) + 1, (), ())
    (x, y), (last, _) = tokens.epoch(torch.tensor([4, 1, 9]), 2)
    assert x.tolist() == [[12, 13, 14], [3, 4, 5]]
    assert torch.equal(y, x + 1)
    assert last.shape == (1, 3)
    features = Examples(torch.arange(10.0).view(5, 2), torch.arange(5), (1.0, 2.0), (2.0, 4.0))
    ((x, _),) = features.epoch(np.array([3, 0]), 8)
    assert x.tolist() == [[2.5, 1.25], [-0.5, -0.25]]
    frozen = np.arange(3)
    frozen.flags.writeable = False
    assert len(list(features.epoch(frozen, 1))) == 3
    assert list(features.epoch(np.arange(0), 4)) == []


# --- federations


def test_federation_counts(digits):
    settings = Data(partition="dirichlet", clients=5, alpha=0.5)
    federation = federate(digits, settings, Streams(1))
    histogram = federation.histogram()
    assert histogram.shape == (5, 10)
    assert np.array_equal(histogram.sum(0), np.bincount(digits.y_train))
    assert histogram.sum(1).tolist() == [len(part) for part in federation.parts]
    assert federation.shape == (1, 8, 8)
    assert (federation.name, federation.classes, federation.natural) == ("digits", 10, False)
    assert sum(map(len, federation.shares)) == len(federation.test) == 360
    assert len(federation.train) == 1437
    again = federate(digits, settings, Streams(1))
    assert all(
        np.array_equal(a, b)
        for a, b in zip([*federation.parts, *federation.shares], [*again.parts, *again.shares], strict=True)
    )


def test_federation_of_tokens():
    x = np.arange(60).reshape(20, 3) % 5
    dataset = from_arrays(x, x, x[:4], x[:4], owner_train=np.repeat([4, 2], 10), owner_test=np.array([4, 4, 2, 7]))
    federation = federate(dataset, Data(partition="natural"), Streams(0))
    assert federation.natural
    assert federation.histogram().tolist() == [[10], [10]]
    assert [share.tolist() for share in federation.shares] == [[2], [0, 1]]
    assert sum(map(len, federate(dataset, Data(clients=3), Streams(0)).shares)) == 4
    with pytest.raises(DataError, match="needs one label an example"):
        federate(dataset, Data(partition="shards"), Streams(0))


def test_only_training_images_are_augmented(digits):
    federation = federate(digits, Data(augment="crop-flip"), Streams(0))
    assert federation.train.augment
    assert not federation.test.augment
    with pytest.raises(UsageError, match="needs images"):
        federate(from_arrays(*arrays()), Data(clients=2, augment="crop-flip"), Streams(0))


def test_natural_partition_without_ids(digits):
    with pytest.raises(DataError, match="wisdm, heart-disease"):
        federate(digits, Data(partition="natural"), Streams(0))


def test_colour_images_are_held_channels_last():
    x = np.zeros((4, 3, 8, 8), dtype=np.uint8)
    federation = federate(from_arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1]), Data(clients=2), Streams(0))
    assert federation.train.x.is_contiguous(memory_format=torch.channels_last)
