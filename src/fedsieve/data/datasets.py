"""The data sets: real ones, checked against their SHA-256, and the user's own.

Nothing is downloaded and nothing is cached. Files are looked for in the folder that the setting names or, where it names
none, in FEDSIEVE_DATA, in ./data and in /usr/share/datasets, each time also in a subfolder of the data set's name. What is
parsed is the very bytes that were hashed, and nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.errors import DataError, UsageError
from fedsieve.settings import Data, nearest
from fedsieve.streams import Stream, Streams

WINDOW = 80
"""characters of one example of shakespeare"""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and test examples, with the data's own client ids where it has them."""

    name: str
    x_train: Tensor
    """uint8 (N, C, H, W) images, float32 (N, ...) features, or int64 (N, T) tokens"""
    y_train: Tensor
    """int64 (N,), or (N, T): one label a token"""
    x_test: Tensor
    y_test: Tensor
    classes: int
    """labels are 0 to classes - 1; tokens, where each has a label, too"""
    mean: tuple[float, ...] = ()
    """per channel over all training examples, in units of the stored values; empty: not to be normalised"""
    std: tuple[float, ...] = ()
    owner_train: NDArray[np.int64] | None = None
    """client id of each training example, shape (N,)"""
    owner_test: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What `fedsieve list datasets` says about a data set."""

    name: str
    title: str
    examples: tuple[int, int]
    """training and test"""
    shape: tuple[int, ...]
    """of one example"""
    classes: int
    natural: str
    """what the natural clients are; empty: there are none"""
    source: str
    files: tuple[str, ...]


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

CATALOGUE = (
    Entry(
        "digits", "handwritten digits, 8x8", (1437, 360), (1, 8, 8), 10, "",
        "UCI Optical Recognition of Handwritten Digits, inside scikit-learn; CC BY 4.0", (),
    ),
    Entry(
        "fashion-mnist", "clothes, 28x28", (60000, 10000), (1, 28, 28), 10, "",
        "Xiao et al. 2017, arXiv:1708.07747; MIT; Debian package dataset-fashion-mnist", tuple(f"{stem}.gz" for stem in _IDX),
    ),
    Entry(
        "mnist", "handwritten digits, 28x28", (60000, 10000), (1, 28, 28), 10, "",
        "LeCun et al. 1998; CC BY-SA 3.0; mnist.npz or the four idx files", ("mnist.npz",),
    ),
    Entry(
        "cifar10", "photographs, 32x32 colour", (50000, 10000), (3, 32, 32), 10, "",
        "Krizhevsky 2009; research use; 111 of the 60,000 images are decoded from JPEG",
        ("cifar10_train_a.npz", "cifar10_train_b.npz", "cifar10_test.npz"),
    ),
    Entry(
        "spoken-digits", "spoken digits, 40 mel bands x 64 frames", (2700, 300), (1, 40, 64), 10, "6 speakers",
        "Free Spoken Digit Dataset, official split; CC BY-SA 4.0", ("fsdd_logmel.npz",),
    ),
    Entry(
        "shakespeare", "next character, windows of 80", (10195, 2476), (80,), 65, "232 roles",
        "Tiny Shakespeare by role; public domain", ("shakespeare_roles.npz",),
    ),
    Entry(
        "wisdm", "activities from a phone's accelerometer", (4402, 1016), (43,), 6, "36 users",
        "Kwapisz et al. 2010, WISDM v1.1 transformed; research use", ("wisdm_windows.npz",),
    ),
    Entry(
        "heart-disease", "heart disease of hospital patients", (740, 180), (23,), 2, "4 hospitals",
        "Janosi et al. 1988, UCI; CC BY 4.0", ("heart_disease_4sites.npz",),
    ),
)  # fmt: skip
"""the built-in data sets"""

_SHA256 = {
    "digits": "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "mnist/mnist.npz": "b0aa38a3807bd085423a7e8fb3f93400f25406681921dbc81b07b887e13df3cc",
    "cifar10/cifar10_train_a.npz": "7d70a4332d3003f16b5b5f2b1d9b70992d751a30aa66e204ba018a6de78178d5",
    "cifar10/cifar10_train_b.npz": "299ed385692e37035c2cd7c72bb19180c601d761306ee7036a793518fb6747f1",
    "cifar10/cifar10_test.npz": "435349a4ddcb7890045ca4e8d5cc5db2a5d12c77344b4ad88cf31e671f47b504",
    "spoken-digits/fsdd_logmel.npz": "3775072758f2fdb7e0e0fcc3af5e6e6c6f247b7093a75c576d3e803a97a69e68",
    "shakespeare/shakespeare_roles.npz": "ad867dceb94ee93e2427b99dcdc2a85634a8c3025953ce3d5eeca20cc1d34807",
    "wisdm/wisdm_windows.npz": "0d2c23e0e29601c471315a262466584e78c5b966eaeba4dad72c5761cb3ad0c5",
    "heart-disease/heart_disease_4sites.npz": "ec3ab23a3b908ab018768813e9cbe227a25a9a1db6441033cb83ba5c7b2e86e2",
}
"""of an .npz as it is; of an idx file after decompression, so that any gzip of it will do; of digits: the parsed table"""


def load(settings: Data) -> Dataset:
    """Load the data set that `settings.name` names, cut to the limits.

    A limit takes examples evenly spaced in the order of class, client id and position: every class, and within it every
    client, keeps its share to within one example. It is not random and does not depend on the seed. Mean and std stay those
    of all training examples.

    Raises:
        UsageError: no data set, module or function of that name.
        DataError: a file is missing or damaged, or arrays do not fit together.
    """
    name, root = settings.name, settings.root
    if name in _READERS:
        dataset = _READERS[name](root)
    elif name.startswith("npz:"):
        dataset = _npz(name.removeprefix("npz:"), root)
    elif name.startswith("hf:"):
        dataset = _hub(name.removeprefix("hf:"), root)
    elif ":" in name:
        dataset = _own(name)
    else:
        raise UsageError(
            f"data.name = {name!r} is no data set.{nearest(name, _READERS)}\nAllowed: {', '.join(_READERS)};"
            " npz:PATH; hf:NAME; package.module:function."
        )
    return _limited(dataset, settings)


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    owner_train: Any = None,
    owner_test: Any = None,
    name: str = "arrays",
) -> Dataset:
    """Make a data set of numpy arrays or tensors, checked.

    Args:
        x_train: uint8 images (N, H, W) or (N, C, H, W); floats (N, ...), kept as float32 and not normalised; uint8 (N, F),
            taken as floats; other integers (N, T): tokens, >= 0. Booleans count as uint8.
        y_train: integer labels (N,), counted from 0; or (N, T), one a token.
        x_test: of the same kind and shape.
        y_test: of the same shape; no label that training lacks altogether.
        owner_train: integer client ids, (N,).
        owner_test: likewise; only together with owner_train.
        name: what reports call it.

    Returns:
        The data set; uint8 images come with mean and std over x_train.

    Raises:
        DataError: an array has another type or shape, a value is not finite, or a label is negative.
    """
    train, test = _examples("x_train", x_train), _examples("x_test", x_test)
    labels, test_labels = _integers("y_train", y_train), _integers("y_test", y_test)
    owners = [
        None if o is None else _integers(f"owner_{s}", o).numpy() for s, o in (("train", owner_train), ("test", owner_test))
    ]
    classes = 1 + int(labels.max()) if labels.numel() else 0
    if labels.dim() > 1 and train.dtype == test.dtype == torch.int64 and train.numel() and test.numel():
        classes = max(classes, 1 + int(train.max()), 1 + int(test.max()), 1 + int(test_labels.max()))
    mean, std = _moments(train) if train.dtype == torch.uint8 and len(train) else ((), ())
    return _checked(Dataset(name, train, labels, test, test_labels, classes, mean, std, *owners))


def _checked(dataset: Dataset) -> Dataset:
    """Refuse a data set whose parts do not fit together."""
    for split in ("train", "test"):
        x, y, owner = (getattr(dataset, f"{part}_{split}") for part in ("x", "y", "owner"))
        sequence = x.dtype == torch.int64 and y.shape == x.shape
        if not x.numel():
            raise DataError(f"x_{split} of {dataset.name} is empty: its shape is {tuple(x.shape)}.")
        if x.dtype not in (torch.uint8, torch.float32, torch.int64) or y.dtype != torch.int64:
            raise DataError(
                f"x_{split} of {dataset.name} is {x.dtype}, y_{split} {y.dtype}; allowed: uint8, float32 or int64, and int64."
                "\nfedsieve.from_arrays makes such a data set of any arrays."
            )
        if y.shape != x.shape[:1] and not sequence:
            raise DataError(
                f"y_{split} of {dataset.name} has shape {tuple(y.shape)}, x_{split} {tuple(x.shape)}.\n"
                f"Allowed: y_{split} of shape ({len(x)},), or that of x_{split} where it holds tokens."
            )
        low, high = int(y.min()), int(y.max())
        if low < 0:
            raise DataError(f"labels y_{split} of {dataset.name} begin at {low}; they are counted from 0.")
        if high >= dataset.classes:
            raise DataError(
                f"labels y_{split} of {dataset.name} go up to {high}; allowed: up to {dataset.classes - 1}, as in training."
            )
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise DataError(f"x_{split} of {dataset.name}: {bad} values are not finite. Fill or remove them first.")
        if x.dtype == torch.int64 and int(x.min()) < 0:
            raise DataError(f"tokens x_{split} of {dataset.name} go down to {int(x.min())}; allowed: whole numbers >= 0.")
        if owner is not None and owner.shape != (len(x),):
            raise DataError(f"owner_{split} of {dataset.name} has shape {owner.shape}; allowed: ({len(x)},).")
    if dataset.y_train.dim() == 1 and int(dataset.y_train.min()) > 0:
        raise DataError(f"labels y_train of {dataset.name} begin at {int(dataset.y_train.min())}; they are counted from 0.")
    if dataset.x_train.shape[1:] != dataset.x_test.shape[1:] or dataset.x_train.dtype != dataset.x_test.dtype:
        raise DataError(
            f"{dataset.name}: an example of x_train is {dataset.x_train.dtype} {tuple(dataset.x_train.shape[1:])},"
            f" one of x_test {dataset.x_test.dtype} {tuple(dataset.x_test.shape[1:])}; they must be alike."
        )
    channels = dataset.x_train.shape[1]
    if len(dataset.mean) not in (0, channels) or len(dataset.std) != len(dataset.mean):
        raise DataError(
            f"{dataset.name} has {len(dataset.mean)} means and {len(dataset.std)} stds; allowed: {channels} each, or none."
        )
    if dataset.owner_train is None and dataset.owner_test is not None:
        raise DataError(f"{dataset.name} has client ids of its test examples only; give owner_train (client_train) too.")
    return dataset


def _tensor(what: str, values: Any) -> Tensor:
    """Bring an array to uint8, int64 or float32."""
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        if tensor.is_complex():
            raise DataError(f"{what} is {tensor.dtype}; allowed: numbers that are not complex.")
        small = tensor.dtype in (torch.uint8, torch.bool)
        return tensor.to(torch.float32 if tensor.is_floating_point() else torch.uint8 if small else torch.int64)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} is no array: {error}") from None
    if array.dtype.kind not in "buif":
        raise DataError(f"{what} is an array of {array.dtype}; allowed: numbers (no objects, no strings).")
    wanted = np.float32 if array.dtype.kind == "f" else np.uint8 if array.dtype in (np.uint8, np.bool_) else np.int64
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return torch.from_numpy(np.require(array.astype(wanted, copy=False), requirements=["C", "W"]))


def _examples(what: str, values: Any) -> Tensor:
    x = _tensor(what, values)
    shape = tuple(x.shape)
    if len(shape) == 4 and shape[1] == shape[2] > 4 and shape[3] in (1, 3, 4):
        raise DataError(f"{what} has shape {shape}, channels last; allowed: (N, C, H, W). Use {what}.transpose(0, 3, 1, 2).")
    if x.dtype == torch.uint8 and len(shape) == 2:
        x = x.float()
    if x.dtype == torch.uint8 and len(shape) == 3:
        x = x.unsqueeze(1)
    allowed = {torch.uint8: "(N, H, W), (N, C, H, W) or (N, F)", torch.int64: "(N, T)", torch.float32: "(N, ...)"}[x.dtype]
    if x.dim() < 2 or {torch.uint8: 4, torch.int64: 2}.get(x.dtype, x.dim()) != x.dim():
        kind = {torch.uint8: "uint8 images", torch.int64: "integer tokens", torch.float32: "float features"}[x.dtype]
        raise DataError(f"{what} has shape {shape}; allowed for {kind}: {allowed}.")
    return x


def _integers(what: str, values: Any) -> Tensor:
    tensor = _tensor(what, values)
    if tensor.is_floating_point():
        raise DataError(f"{what} holds floating-point numbers; allowed: whole numbers of an integer type.")
    return tensor.long()


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel of uint8 images (N, C, H, W), exact from their histogram; a constant channel has std 1."""
    counts = np.stack([np.bincount(c.reshape(-1).numpy(), minlength=256) for c in images.unbind(1)])
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = share @ values
    std = np.sqrt(np.maximum((share * (values - mean[:, None]) ** 2).sum(axis=1), 0))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())


def held_out(dataset: Dataset, share: float, stream: Stream) -> Dataset:
    """Hold out a share of the training examples, drawn alike from each class and owner, in place of the test examples.

    Raises:
        UsageError: nothing would be held out, or nothing left to train on.
    """
    examples = len(dataset.y_train)
    count = round(share * examples)
    if not 0 < count < examples:
        raise UsageError(
            f"data.validation = {share} holds out {count} of the {examples} training examples of {dataset.name}; allowed: one"
            " or more, and not all.\nChange data.validation, or data.train_limit."
        )
    held = np.isin(np.arange(examples), _spread(dataset.y_train, dataset.owner_train, count, stream.permutation(examples)))
    return replace(dataset, **_rows(dataset, "train", ~held, "train"), **_rows(dataset, "train", held, "test"))


def _limited(dataset: Dataset, settings: Data) -> Dataset:
    parts: dict[str, Any] = {}
    for split, limit in (("train", settings.train_limit), ("test", settings.test_limit)):
        y, owner = getattr(dataset, f"y_{split}"), getattr(dataset, f"owner_{split}")
        if 0 < limit < len(y):
            parts |= _rows(dataset, split, np.sort(_spread(y, owner, limit, np.arange(len(y)))), split)
    return replace(dataset, **parts)


def _spread(y: Tensor, owner: NDArray[np.int64] | None, count: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `count` positions of examples, of each class and owner their share; among equals by `order`, a permutation."""
    keys = ([] if owner is None else [owner[order]]) + ([y.numpy()[order]] if y.dim() == 1 else [])
    sorted_ = order[np.lexsort(keys)] if keys else order
    return sorted_[np.arange(count) * len(order) // count]


def _rows(dataset: Dataset, split: str, rows: NDArray[Any], to: str) -> dict[str, Any]:
    """Return some examples of a split, as the fields of a data set that they are to be."""
    parts = {part: getattr(dataset, f"{part}_{split}") for part in ("x", "y", "owner")}
    return {f"{part}_{to}": None if values is None else values[rows] for part, values in parts.items()}


def _digits(root: str | None) -> Dataset:
    """1,797 images with values 0 to 16; 36 of each class, drawn once and for all, are the test set.

    Reads the table inside scikit-learn without importing it, which would take longer than a short run.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("digits is part of scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(BytesIO(_unzipped(path)), delimiter=",", dtype=np.uint8)
    _verify(path, table.tobytes(), _SHA256["digits"])
    x, y = table[:, :64].reshape(-1, 8, 8), table[:, 64]
    shuffled = Streams(0)("digits/split").permutation(len(y))
    test = np.sort(np.concatenate([shuffled[y[shuffled] == label][:36] for label in range(10)]))
    train = np.setdiff1d(np.arange(len(y)), test)
    return _images("digits", (x[train], y[train], x[test], y[test]), (4.8787,), (6.0118,))


def _fashion_mnist(root: str | None) -> Dataset:
    arrays = [_idx("fashion-mnist", root, stem) for stem in _IDX]
    return _images("fashion-mnist", arrays, (72.9404,), (90.0212,))


def _mnist(root: str | None) -> Dataset:
    """From mnist.npz or, where a folder has that first, from the four idx files."""
    path = _find("mnist", root, "mnist.npz", *_names(_IDX[0]))
    if path.name == "mnist.npz":
        npz = _verified_npz("mnist", root, "mnist.npz")
        arrays = [npz[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    else:
        arrays = [_idx("mnist", root, stem) for stem in _IDX]
    return _images("mnist", arrays, (33.3184,), (78.5675,))


def _cifar10(root: str | None) -> Dataset:
    """Undo the differences between colours and between neighbouring pixels (all modulo 256)."""

    def decoded(file: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        npz = _verified_npz("cifar10", root, file)
        planes = npz["residual"]
        for row in range(1, 32):  # a running sum, three times as fast as cumsum on bytes
            planes[:, :, row] += planes[:, :, row - 1]
        for column in range(1, 32):
            planes[..., column] += planes[..., column - 1]
        planes[0] += planes[1]
        planes[2] += planes[1]
        return planes.transpose(1, 0, 2, 3), npz["label"]

    with ThreadPoolExecutor() as pool:
        (xa, ya), (xb, yb), (x_test, y_test) = pool.map(
            decoded, ("cifar10_train_a.npz", "cifar10_train_b.npz", "cifar10_test.npz")
        )
    x_train, y_train = np.concatenate([xa, xb]), np.concatenate([ya, yb])
    mean, std = (125.3069, 122.9503, 113.8653), (62.9924, 62.0885, 66.7046)
    return _images("cifar10", (x_train, y_train, x_test, y_test), mean, std)


def _spoken_digits(root: str | None) -> Dataset:
    npz = _verified_npz("spoken-digits", root, "fsdd_logmel.npz")
    x, held_out = npz["x"][:, None], npz["index"] < 5
    return _split("spoken-digits", x, npz["label"], npz["speaker"], held_out, 10, (56.5369,), (70.2678,))


def _shakespeare(root: str | None) -> Dataset:
    """Cut each role's lines into windows of 80 characters, each labelled by the next; the last fifth of a role's is its test.

    Characters are numbered 0 to 64 in the order of their codes. A role with fewer than two windows is left out.
    """
    npz = _verified_npz("shakespeare", root, "shakespeare_roles.npz")
    alphabet, coded = np.unique(npz["raw"]), npz["text"]
    text, offset = np.searchsorted(alphabet, coded), npz["offset"]
    x, y, owner, held_out = [], [], [], []
    for role, (begin, end) in enumerate(pairwise(offset)):
        windows = (end - begin - 1) // WINDOW
        if windows < 2:
            continue
        stop = begin + windows * WINDOW
        x.append(text[begin:stop].reshape(windows, WINDOW))
        y.append(text[begin + 1 : stop + 1].reshape(windows, WINDOW))
        owner.append(np.full(windows, role))
        held_out.append(np.arange(windows) >= windows - max(1, windows // 5))
    columns = [np.concatenate(column) for column in (x, y, owner, held_out)]
    return _split("shakespeare", columns[0], columns[1], columns[2], columns[3], len(alphabet))


def _wisdm(root: str | None) -> Dataset:
    """Hold out the last fifth (rounded down) of each user's windows of each activity, in the order of the file.

    A missing feature becomes its median over the training windows; features are standardised by training mean and std, over
    all users, which a real federation would have to agree on first.
    """
    npz = _verified_npz("wisdm", root, "wisdm_windows.npz")
    held_out = _last_fifth(npz["user"].astype(np.int64) * 6 + npz["label"])
    x = _standardised(_filled(npz["x"], held_out), held_out)
    return _split("wisdm", x, npz["label"], npz["user"], held_out, 6)


def _heart_disease(root: str | None) -> Dataset:
    """Hold out a fifth (rounded down) of each hospital's patients with and without disease, drawn once and for all.

    A missing value (a cholesterol of 0 is one) becomes the feature's median over the training patients, and each feature that
    lacks values gets a second one that says where: 13 + 10. All are standardised as in wisdm.
    """
    npz = _verified_npz("heart-disease", root, "heart_disease_4sites.npz")
    held_out = _last_fifth(npz["site"].astype(np.int64) * 2 + npz["label"], Streams(0)("heart-disease/split"))
    x = npz["x"].copy()
    cholesterol = x[:, list(npz["feature_names"]).index("chol")]
    cholesterol[cholesterol == 0] = np.nan
    missing = np.isnan(x)
    x = np.concatenate([_filled(x, held_out), missing[:, missing.any(axis=0)]], axis=1)
    return _split("heart-disease", _standardised(x, held_out), npz["label"], npz["site"], held_out, 2)


_READERS: dict[str, Callable[[str | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "spoken-digits": _spoken_digits,
    "shakespeare": _shakespeare,
    "wisdm": _wisdm,
    "heart-disease": _heart_disease,
}


def _images(name: str, arrays: Iterable[NDArray[np.uint8]], mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    """A data set of uint8 arrays x_train, y_train, x_test, y_test, in 10 classes."""
    x_train, y_train, x_test, y_test = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
    if x_train.dim() == 3:
        x_train, x_test = x_train.unsqueeze(1), x_test.unsqueeze(1)
    return Dataset(name, x_train, y_train.long(), x_test, y_test.long(), 10, mean, std)


def _split(
    name: str,
    x: NDArray[Any],
    y: NDArray[Any],
    owner: NDArray[Any],
    held_out: NDArray[np.bool_],
    classes: int,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Dataset:
    """A data set of rows with owners, part of which is held out for testing."""
    kept = ~held_out
    x_train, x_test = torch.from_numpy(x[kept]), torch.from_numpy(x[held_out])
    y_train, y_test = (torch.from_numpy(y[rows].astype(np.int64)) for rows in (kept, held_out))
    owners = owner.astype(np.int64)
    return Dataset(name, x_train, y_train, x_test, y_test, classes, mean, std, owners[kept], owners[held_out])


def _last_fifth(groups: NDArray[np.int64], stream: Stream | None = None) -> NDArray[np.bool_]:
    """Mark the last fifth, rounded down, of each group, in the order given or in a drawn one."""
    order = np.arange(len(groups)) if stream is None else stream.permutation(len(groups))
    held_out = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = order[groups[order] == group]
        held_out[members[len(members) - len(members) // 5 :]] = True
    return held_out


def _filled(x: NDArray[np.float32], held_out: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Put each feature's median over the training rows where a value is missing."""
    return np.where(np.isnan(x), np.nanmedian(x[~held_out], axis=0), x).astype(np.float32)


def _standardised(x: NDArray[np.float32], held_out: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Subtract the training rows' mean and divide by their std (1 where a feature is constant)."""
    train = x[~held_out].astype(np.float64)
    std = train.std(axis=0)
    scaled = (x - train.mean(axis=0)) / np.where(std > 0, std, 1.0)
    return np.asarray(scaled, dtype=np.float32)


def _npz(path: str, root: str | None) -> Dataset:
    """The user's own arrays x_train, y_train, x_test, y_test, and client_train, client_test where there are client ids."""
    file = Path(root or "").expanduser() / Path(path).expanduser()
    try:
        arrays = _parsed_npz(file, file.read_bytes())
    except OSError as error:
        raise DataError(
            f"data.name = npz:{path}: cannot read {file}: {error.strerror or error}.\nGive the path of an .npz file, from the"
            f" folder data.root if that is set."
        ) from None
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise DataError(
            f"{file} has no array {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'none'}.\n"
            "Needed: x_train, y_train, x_test, y_test; optional: client_train, client_test."
        )
    return from_arrays(
        arrays["x_train"],
        arrays["y_train"],
        arrays["x_test"],
        arrays["y_test"],
        owner_train=arrays.get("client_train"),
        owner_test=arrays.get("client_test"),
        name=file.stem,
    )


def _own(name: str) -> Dataset:
    """What the user's function returns: a `Dataset`, or arrays (x_train, y_train, x_test, y_test)."""
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UsageError(f"data.name = {name!r}; allowed for a function of your own: package.module:function.")
    try:
        make = getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise UsageError(
            f"data.name = {name!r}: there is no module {error.name!r}.\nAllowed: package.module:function, importable from"
            " here (installed, or its folder in PYTHONPATH)."
        ) from None
    if not callable(make):
        raise UsageError(f"data.name = {name!r}: module {module!r} has no function {function!r}.")
    made = make()
    if isinstance(made, Dataset):
        return _checked(made)
    if isinstance(made, tuple) and len(made) == 4:
        return from_arrays(*made, name=name)
    raise UsageError(
        f"data.name = {name!r}: the function returned {type(made).__name__}.\nAllowed: a fedsieve.Dataset, or a tuple"
        " (x_train, y_train, x_test, y_test) of arrays."
    )


def _hub(name: str, root: str | None) -> Dataset:
    """A data set of the Hugging Face hub, or of a local folder, through the library `datasets`.

    The splits train and test (or validation) are used; labels are the ClassLabel column or one called label, labels, y or
    target; examples are the image column, one called x or features, or all other columns as features; a column client is
    the client id.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"data.name = hf:{name} needs the library datasets: pip install 'fedsieve[hf]'\n"
            "Without it: --data.name digits, or your own arrays as npz:PATH."
        ) from None
    folder = Path(root or "").expanduser() / name
    place = str(folder) if folder.is_dir() else name
    try:
        saved = (folder / "dataset_dict.json").is_file()
        splits = datasets.load_from_disk(place) if saved else datasets.load_dataset(place)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(
            f"data.name = hf:{name}: {reason}\nGive a data set of the hub or a local folder of csv, parquet or images."
        ) from error
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise DataError(f"hf:{name} has the splits {', '.join(map(str, splits))}; needed: train, and test or validation.")
    x_train, y_train, owner_train = _columns(name, splits["train"])
    x_test, y_test, owner_test = _columns(name, splits[held_out])
    return from_arrays(x_train, y_train, x_test, y_test, owner_train=owner_train, owner_test=owner_test, name=name)


def _columns(name: str, split: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Examples, labels and client ids of a split of the library `datasets`."""
    kinds = {column: type(feature).__name__ for column, feature in split.features.items()}
    label = next((c for c, kind in kinds.items() if kind == "ClassLabel"), None)
    label = label or next((c for c in ("label", "labels", "y", "target") if c in kinds), None)
    image = next((c for c, kind in kinds.items() if kind == "Image"), None)
    single = image or next((c for c in ("x", "features") if c in kinds and c != label), None)
    inputs = [single] if single else [c for c in kinds if c not in (label, "client")]
    if label is None or not inputs:
        raise DataError(
            f"hf:{name} has the columns {', '.join(kinds)}: no label (a ClassLabel, or label, labels, y, target), or nothing"
            " else.\nFor anything unusual write a function and give it as package.module:function."
        )
    rows = split.with_format("numpy")[:]
    try:
        x = np.asarray(rows[single]) if single else np.stack([np.asarray(rows[c], dtype=np.float32) for c in inputs], axis=1)
    except (ValueError, TypeError) as error:
        raise DataError(f"hf:{name}: columns {', '.join(inputs)} are no table of numbers: {str(error)[:200]}") from None
    if image and x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)
    return x, np.asarray(rows[label]), np.asarray(rows["client"]) if "client" in kinds else None


def _names(stem: str) -> tuple[str, str]:
    return f"{stem}.gz", stem


def _find(name: str, root: str | None, *files: str) -> Path:
    """The first of these files in the first folder that has one."""
    if root is not None:
        places = [Path(root).expanduser()]
    else:
        named = os.environ.get("FEDSIEVE_DATA")
        places = [*([Path(named).expanduser()] if named else []), Path("data"), Path("/usr/share/datasets")]
    for folder in (folder for place in places for folder in (place / name, place)):
        for file in files:
            if (folder / file).is_file():
                return folder / file
    package = "install the Debian package dataset-fashion-mnist, or " if name == "fashion-mnist" else ""
    raise DataError(
        f"data set {name}: there is no {' or '.join(files)}\n"
        f"  in {', '.join(map(str, places))} (nor in a subfolder {name}).\n"
        f"To get it: {package}put the file into a folder\n"
        "  and name that with --data.root FOLDER or the environment variable FEDSIEVE_DATA.\n"
        "Without files: --data.name digits."
    )


def _verify(path: Path, content: bytes, expected: str) -> None:
    found = sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged or another version.\nSHA-256 expected {expected[:16]}..., found {found[:16]}...\n"
            "Replace the file, or use it unchecked: own arrays are loaded with --data.name npz:PATH."
        )


def _unzipped(path: Path) -> bytes:
    """Content of a file, decompressed if it is a gzip."""
    content = _read(path)
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}.\nReplace the file.") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def _idx(name: str, root: str | None, stem: str) -> NDArray[np.uint8]:
    """One idx file: 2 zero bytes, type 8 (uint8), the number of dimensions, each as a big-endian uint32, then the bytes."""
    path = _find(name, root, *_names(stem))
    content = _unzipped(path)
    _verify(path, content, _SHA256[f"{name}/{stem}"])
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4).astype(np.int64)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _verified_npz(name: str, root: str | None, file: str) -> dict[str, NDArray[Any]]:
    path = _find(name, root, file)
    content = _read(path)
    _verify(path, content, _SHA256[f"{name}/{file}"])
    return _parsed_npz(path, content)


def _parsed_npz(path: Path, content: bytes) -> dict[str, NDArray[Any]]:
    if content[:4] != b"PK\x03\x04":
        raise DataError(f"{path} is not an .npz file (numpy.savez writes them); pickled files are never read.")
    try:
        with np.load(BytesIO(content), allow_pickle=False) as npz:
            return {key: npz[key] for key in npz.files}
    except (BadZipFile, ValueError, OSError, EOFError, KeyError, zlib.error, NotImplementedError) as error:
        raise DataError(
            f"{path} cannot be read: {str(error)[:200]}\nIt may be damaged; pickled arrays are never read."
        ) from None
