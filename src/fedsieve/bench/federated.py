"""Every method at equal density on non-IID splits: `python -m fedsieve.bench.federated`, part of `make reproduce`.

    fashion-dirichlet, fashion-2classes  Fashion-MNIST, 12,000 examples, 20 clients, an MLP with 118,016 weights
    cifar-dirichlet, cifar-2classes      CIFAR-10, 5,000 examples, 20 clients, LeNet-5 with 61,770 weights and GroupNorm
    cifar-batchnorm                      by Dirichlet and with BatchNorm, for the methods that FedTiny is measured against
    phones                               activities from phone sensors, 36 users as they are, an MLP with 22,656 weights

Ten clients a round, seeds 0 and 1. See `bench/methods.py` for how learning rates are chosen; all else are the methods'
defaults, but that those which move their masks, or prune by and by, do so some ten times in a run: their papers have hundreds
of rounds for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedsieve.bench.methods import Method, Scenario, Study, main
from fedsieve.settings import Data, Model

DENSE: dict[str, Any] = {"densities": (None,)}
SERVER: dict[str, Any] = DENSE | {"rate": "algorithm.server.lr"}
SCORES: dict[str, Any] = {"rate": "algorithm.lr"}

METHODS = (
    Method("fedavg", "fedavg", **DENSE),
    Method("fedprox", "fedprox", **DENSE),
    Method("scaffold", "scaffold", **DENSE),
    Method("fednova", "fednova", **DENSE),
    Method("fedavgm", "fedavg", {"server.name": "momentum"}, **SERVER),
    Method("fedadagrad", "fedavg", {"server.name": "adagrad"}, first=(0.003, 0.01), **SERVER),
    Method("fedadam", "fedavg", {"server.name": "adam"}, first=(0.003, 0.01), **SERVER),
    Method("fedyogi", "fedavg", {"server.name": "yogi"}, first=(0.003, 0.01), **SERVER),
    Method("progfed", "progfed", **DENSE),
    Method("progfed-equal", "progfed", {"schedule": "equal"}, **DENSE),
    Method("fedsparsify-global", "fedsparsify"),
    Method("fedsparsify-local", "fedsparsify", {"variant": "local"}),
    Method("snip", "snip"),
    Method("grasp", "snip", {"score": "grasp"}),
    Method("synflow", "snip", {"score": "synflow"}),
    Method("random", "snip", {"score": "random", "allocation": "erk"}),
    Method("ssfl", "ssfl"),
    Method("oneshot", "oneshot"),
    Method("lotteryfl", "lotteryfl", {"rate": 0.5}),
    Method("sparsyfed", "sparsyfed"),
    Method("prunefl", "prunefl", {"every": 4}),
    Method("feddst", "feddst", {"every": 4}),
    Method("fedtiny", "fedtiny", {"every": 3, "selection": "loss"}),
    Method("fedtiny-erk", "fedtiny", {"every": 3, "selection": "loss", "layers": "erk"}),
    Method("hidenseek", "hidenseek", **SCORES),
    Method("hidenseek-logit", "hidenseek", {"merge": "logit", "bits": 4}, **SCORES),
    Method("fedmask", "fedmask", first=(0.003, 0.01), **SCORES),
    Method("fedpm", "fedpm", **SCORES),
)


def _fashion(**split: Any) -> Data:
    return Data(name="fashion-mnist", clients=20, train_limit=12_000, min_examples=10, **split)


def _cifar(**split: Any) -> Data:
    return Data(name="cifar10", clients=20, train_limit=5_000, test_limit=2_000, min_examples=10, **split)


DIRICHLET: dict[str, Any] = {"partition": "dirichlet", "alpha": 0.3}
TWO_CLASSES: dict[str, Any] = {"partition": "classes", "per_client": 2}
MLP, LENET, NORMALISED = Model(name="mlp"), Model(name="lenet", norm="group"), Model(name="lenet", norm="batch")
WISDM = Data(name="wisdm", partition="natural", clients=36)
FASHION = Scenario("fashion-dirichlet", _fashion(**DIRICHLET), MLP, 40, 2, 80.0, "fashion-dirichlet")
SCENARIOS = (
    FASHION,
    Scenario("fashion-2classes", _fashion(**TWO_CLASSES), MLP, 40, 2, 65.0, "fashion-dirichlet"),
    Scenario("cifar-dirichlet", _cifar(**DIRICHLET), LENET, 30, 5, 35.0, "cifar-dirichlet"),
    Scenario("cifar-2classes", _cifar(**TWO_CLASSES), LENET, 30, 5, 25.0, "cifar-dirichlet"),
    Scenario(
        "cifar-batchnorm",
        _cifar(**DIRICHLET),
        NORMALISED,
        30,
        5,
        35.0,
        "cifar-batchnorm",
        ("fedavg", "snip", "synflow", "prunefl", "feddst", "fedtiny", "fedtiny-erk"),
        {"fedtiny": {"selection": "statistics"}},
    ),
    Scenario("phones", WISDM, MLP, 40, 2, 70.0, "phones"),
)
STUDY = Study(Path("results/federated"), SCENARIOS, METHODS)

if __name__ == "__main__":
    sys.exit(main(STUDY, "python -m fedsieve.bench.federated", __doc__ or "", sys.argv[1:]))
