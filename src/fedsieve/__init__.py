"""fedsieve: federated lottery tickets, with every byte counted. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsieve.algorithms.fedavg import FedAvg
    from fedsieve.algorithms.feddst import FedDST
    from fedsieve.algorithms.fedmask import FedMask
    from fedsieve.algorithms.fednova import FedNova
    from fedsieve.algorithms.fedpm import FedPM
    from fedsieve.algorithms.fedprox import FedProx
    from fedsieve.algorithms.fedsparsify import FedSparsify
    from fedsieve.algorithms.fedtiny import FedTiny
    from fedsieve.algorithms.hidenseek import HideNSeek
    from fedsieve.algorithms.lotteryfl import LotteryFL
    from fedsieve.algorithms.oneshot import OneShot
    from fedsieve.algorithms.progfed import ProgFed
    from fedsieve.algorithms.prunefl import PruneFL
    from fedsieve.algorithms.scaffold import Scaffold
    from fedsieve.algorithms.snip import Snip
    from fedsieve.algorithms.sparsyfed import SparsyFed
    from fedsieve.algorithms.ssfl import Ssfl
    from fedsieve.compress.base import Compressor
    from fedsieve.data.batches import Federation, federate
    from fedsieve.data.datasets import Dataset, from_arrays, load
    from fedsieve.engine.link import Link
    from fedsieve.engine.loop import Result, fit
    from fedsieve.engine.nursery import warm_up
    from fedsieve.errors import DataError, Diverged, FedsieveError, UsageError
    from fedsieve.finish.runtime import SparseModel
    from fedsieve.finish.runtime import load as load_sparse
    from fedsieve.models.spec import ModelSpec, build
    from fedsieve.params import Kind, Layout, Masks, Params, Slot
    from fedsieve.settings import Data, Engine, Local, Model
    from fedsieve.streams import Stream, Streams
    from fedsieve.wire.message import Message, WireError, pack, unpack

__version__ = "0.1.0"

_HOME = {
    "FedAvg": "algorithms.fedavg",
    "FedDST": "algorithms.feddst",
    "FedMask": "algorithms.fedmask",
    "FedNova": "algorithms.fednova",
    "FedPM": "algorithms.fedpm",
    "FedProx": "algorithms.fedprox",
    "FedSparsify": "algorithms.fedsparsify",
    "FedTiny": "algorithms.fedtiny",
    "HideNSeek": "algorithms.hidenseek",
    "LotteryFL": "algorithms.lotteryfl",
    "OneShot": "algorithms.oneshot",
    "ProgFed": "algorithms.progfed",
    "PruneFL": "algorithms.prunefl",
    "Scaffold": "algorithms.scaffold",
    "Snip": "algorithms.snip",
    "SparsyFed": "algorithms.sparsyfed",
    "Ssfl": "algorithms.ssfl",
    "Compressor": "compress.base",
    "Federation": "data.batches",
    "federate": "data.batches",
    "Dataset": "data.datasets",
    "from_arrays": "data.datasets",
    "load": "data.datasets",
    "Link": "engine.link",
    "Result": "engine.loop",
    "fit": "engine.loop",
    "warm_up": "engine.nursery",
    "DataError": "errors",
    "Diverged": "errors",
    "FedsieveError": "errors",
    "UsageError": "errors",
    "SparseModel": "finish.runtime",
    "load_sparse": "finish.runtime:load",
    "ModelSpec": "models.spec",
    "build": "models.spec",
    "Kind": "params",
    "Layout": "params",
    "Masks": "params",
    "Params": "params",
    "Slot": "params",
    "Data": "settings",
    "Engine": "settings",
    "Local": "settings",
    "Model": "settings",
    "Stream": "streams",
    "Streams": "streams",
    "Message": "wire.message",
    "WireError": "wire.message",
    "pack": "wire.message",
    "unpack": "wire.message",
}

__all__ = [
    "Compressor", "Data", "DataError", "Dataset", "Diverged", "Engine", "FedAvg", "FedDST", "FedMask", "FedNova", "FedPM",
    "FedProx", "FedSparsify", "FedTiny", "Federation", "FedsieveError", "HideNSeek", "Kind", "Layout", "Link", "Local",
    "LotteryFL", "Masks", "Message", "Model", "ModelSpec", "OneShot", "Params", "ProgFed", "PruneFL", "Result", "Scaffold",
    "Slot", "Snip", "SparseModel", "SparsyFed", "Ssfl", "Stream", "Streams", "UsageError", "WireError", "build", "federate",
    "fit", "from_arrays", "load", "load_sparse", "pack", "unpack", "warm_up",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedsieve' has no attribute {name!r}")
    home, _, own = _HOME[name].partition(":")
    return getattr(import_module(f"fedsieve.{home}"), own or name)
