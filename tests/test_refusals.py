"""What does not fit together is refused before round 1: what was given, what is allowed, and where to change it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsieve import Engine, FedAvg, FedDST, FedTiny, PruneFL, UsageError, cli, fit
from fedsieve.config import from_name, keys, sections

SMALL = {"data.clients": 4, "data.train_limit": 80, "data.test_limit": 20, "model.hidden": (16,)}
"""an MLP of two tensors, with 1024 and 160 weights; 20 rounds"""
SPARSE = ["feddst", "fedmask", "fedpm", "fedsparsify", "fedtiny", "hidenseek", "lotteryfl", "oneshot", "prunefl", "snip"]
SPARSE += ["sparsyfed", "ssfl"]
FLOORS = ["hidenseek", "oneshot", "snip", "ssfl"]
BY_LOSS, LOCAL = {"algorithm.selection": "loss"}, {"algorithm.variant": "local"}
ALONE, TWO = {"engine.cohort": 1}, {"engine.cohort": 2}


def config(name, **values):
    """The config of a run that is small, and with `values` as given."""
    return from_name(name, SMALL | (BY_LOSS if name == "fedtiny" else {}) | values)


REFUSED = {
    # ---- statistics that a model does not keep
    "fedtiny-no-norm": (
        "fedtiny",
        {"algorithm.selection": "statistics"},
        ("algorithm.selection = statistics", "'mlp' has no normalisation"),
        ("model.norm = batch", "lenet, cnn6", "algorithm.pool = 1"),
        "algorithm.selection = loss",
    ),
    "fedtiny-group-norm": (
        "fedtiny",
        {"algorithm.selection": "statistics", "model.name": "resnet8", "model.norm": "group", "model.hidden": ()},
        ("algorithm.selection = statistics", "'resnet8' has GroupNorm"),
        ("model.norm = batch",),
        "algorithm.selection = loss",
    ),
    # ---- fewer clients than a vote needs
    "fedsparsify-vote-of-one": (
        "fedsparsify",
        LOCAL | ALONE,
        ("algorithm.variant = local", "there are 1 (engine.cohort = 1, data.clients = 4)"),
        ("needs 2 clients of a round or more",),
        "Set engine.cohort (0: all) and data.clients to 2 or more, or algorithm.variant = global",
    ),
    "fedsparsify-repo-vote-of-one": (
        "fedsparsify",
        LOCAL | {"algorithm.vote": "repo", "data.clients": 1},
        ("there are 1 (engine.cohort = 0, data.clients = 1)",),
        ("needs 2 clients",),
        "Set engine.cohort",
    ),
    "hidenseek-vote-of-one": (
        "hidenseek",
        ALONE,
        ("algorithm.merge = vote", "engine.cohort = 1"),
        ("needs 2 clients",),
        "or algorithm.merge = mean",
    ),
    "fedmask-overlap": (
        "fedmask",
        {"algorithm.overlap": 4, "engine.cohort": 3},
        ("algorithm.overlap = 4", "engine.cohort = 3"),
        ("needs 4 clients",),
        "or algorithm.overlap to fewer",
    ),
    "fedmask-vote-of-one": (
        "fedmask",
        {"algorithm.merge": "all"} | ALONE,
        ("algorithm.merge = all", "engine.cohort = 1"),
        ("needs 2 clients",),
        "or algorithm.merge to overlap",
    ),
    "fedpm-vote-of-one": (
        "fedpm",
        ALONE,
        ("algorithm.estimate = mode", "engine.cohort = 1"),
        ("needs 2 clients",),
        "or algorithm.estimate = mean, or algorithm.reset = 2",
    ),
    "snip-asked": (
        "snip",
        {"algorithm.clients": 3} | TWO,
        ("algorithm.clients = 3",),
        ("at most the 2 clients of a round",),
        "engine.cohort",
    ),
    # ---- stages that do not fit the model or the run
    "progfed-too-many": (
        "progfed",
        {"algorithm.stages": 4, "model.hidden": (8, 8)},
        ("algorithm.stages = 4", "'mlp' has 2 blocks"),
        ("at most 2",),
        "algorithm.boundaries: flatten, fc1, relu1, fc2, relu2",
    ),
    "progfed-empty-name": (
        "progfed",
        {"algorithm.boundaries": ("",)},
        ("no part ''",),
        ("There are: flatten, fc1",),
        "boundaries",
    ),
    "progfed-order": (
        "progfed",
        {"algorithm.boundaries": ("fc2", "fc1"), "model.hidden": (8, 8)},
        ("algorithm.boundaries = fc2, fc1",),
        ("in order: flatten, fc1, relu1, fc2, relu2",),
        "algorithm.boundaries",
    ),
    "progfed-twice": (
        "progfed",
        {"algorithm.boundaries": ("fc1", "fc1"), "model.hidden": (8, 8)},
        ("algorithm.boundaries = fc1, fc1",),
        ("each once",),
        "algorithm.boundaries",
    ),
    "progfed-rounds": (
        "progfed",
        {"engine.rounds": 1, "model.hidden": (8, 8)},
        ("engine.rounds = 1", "2 stages"),
        ("at least 2",),
        "fewer algorithm.stages",
    ),
    "progfed-beyond-the-run": (
        "progfed",
        {"algorithm.schedule": "list", "algorithm.grow_at": (21,), "model.hidden": (8, 8)},
        ("algorithm.grow_at = 21",),
        ("2 stages need 1", "from 2 to engine.rounds = 20"),
        "algorithm.grow_at",
    ),
    "progfed-no-list": (
        "progfed",
        {"algorithm.schedule": "list", "model.hidden": (8, 8)},
        ("algorithm.grow_at = none",),
        ("2 stages need 1",),
        "algorithm.grow_at",
    ),
    "progfed-descending": (
        "progfed",
        {"algorithm.schedule": "list", "algorithm.grow_at": (9, 5), "model.hidden": (8, 8, 8)},
        ("algorithm.grow_at = 9, 5",),
        ("ascending",),
        "algorithm.grow_at",
    ),
    # ---- masks that would never move, or not to the end
    "feddst-never": (
        "feddst",
        {"engine.rounds": 10},
        ("algorithm.every = 10", "engine.rounds = 10"),
        ("round 9 is the last",),
        "algorithm.every to at most 9, or engine.rounds and algorithm.stop larger; or algorithm.alpha = 0",
    ),
    "feddst-stopped": (
        "feddst",
        {"algorithm.stop": 10},
        ("algorithm.every = 10",),
        ("round 9 is the last",),
        "algorithm.every to at most 9",
    ),
    "fedtiny-never": (
        "fedtiny",
        {"engine.rounds": 2},
        ("algorithm.every = 10", "engine.rounds = 2"),
        ("round 1 is the last",),
        "algorithm.every to at most 1",
    ),
    "fedtiny-one-round": (
        "fedtiny",
        {"engine.rounds": 1, "algorithm.every": 1},
        ("algorithm.every = 1",),
        ("round 0 is the last",),
        "Set engine.rounds and algorithm.stop larger; or algorithm.alpha = 0",
    ),
    "prunefl-never": (
        "prunefl",
        {"algorithm.every": 20},
        ("algorithm.every = 20", "engine.rounds = 20"),
        ("round 19 is the last",),
        "algorithm.every to at most 19, or engine.rounds and algorithm.stop larger; or algorithm.free = 0",
    ),
    "prunefl-stopped": (
        "prunefl",
        {"algorithm.every": 5, "algorithm.stop": 4},
        ("algorithm.every = 5",),
        ("round 4 is the last",),
        "algorithm.every to at most 4",
    ),
    "fedsparsify-not-to-the-end": (
        "fedsparsify",
        {"algorithm.every": 3},
        ("algorithm.every = 3 purges after round 18 last", "engine.rounds = 20"),
        ("multiple of algorithm.every, such as 21",),
        "Set engine.rounds",
    ),
    "fedsparsify-never": (
        "fedsparsify",
        {"algorithm.every": 30},
        ("algorithm.every = 30 would purge after no round", "engine.rounds = 20"),
        ("such as 30",),
        "Set engine.rounds",
    ),
    "oneshot-too-late": (
        "oneshot",
        {"algorithm.at": 21},
        ("algorithm.at = 21",),
        ("engine.rounds = 20",),
        "engine.rounds",
    ),
}
"""what is given -> method, settings, and the three parts of the message: given, allowed, where to change it"""
for name in SPARSE:
    REFUSED[f"{name}-density"] = (
        name,
        {"algorithm.density": 0.001},
        ("algorithm.density = 0.001 keeps 1 of 1184 weights",),
        ("2 are needed, with 1 at least in each of 2 tensors", "0.001689 or more"),
        f"Set algorithm.density to 0.001689 or more{', or lower algorithm.floor' if name in FLOORS else ''}; model.dense",
    )
    REFUSED[f"{name}-nothing-to-mask"] = (
        name,
        {"model.dense": ("fc1.weight", "fc2.weight")},
        ("the model has no maskable weight",),
        ("model.maskable",),
        "model.dense",
    )
    REFUSED[f"{name}-cohort"] = (
        name,
        {"engine.cohort": 5},
        ("engine.cohort = 5",),
        ("the 4 clients that there are",),
        "data.clients",
    )


@pytest.mark.parametrize(("name", "values", "given", "allowed", "where"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_what_was_given_what_is_allowed_and_where_to_change_it(
    name, values, given, allowed, where
):
    with pytest.raises(UsageError) as caught:
        config(name, **values).check()
    said = str(caught.value)
    for part in (*given, *allowed, where):
        assert part in said
    assert len(said.splitlines()) <= 8
    known = keys(sections(name))
    assert all(key in known for key in values)


ACCEPTED = {
    "fedtiny-one-candidate": ("fedtiny", {"algorithm.selection": "statistics", "algorithm.pool": 1}),
    "fedtiny-batch-norm": (
        "fedtiny",
        {"algorithm.selection": "statistics", "model.name": "resnet8", "model.norm": "batch", "model.hidden": ()},
    ),
    "fedtiny-loss": ("fedtiny", {}),
    "fedtiny-still": ("fedtiny", {"algorithm.alpha": 0.0, "engine.rounds": 1}),
    "fedsparsify-vote-of-two": ("fedsparsify", LOCAL | TWO),
    "fedsparsify-alone": ("fedsparsify", ALONE),
    "fedsparsify-every": ("fedsparsify", {"algorithm.every": 4}),
    "hidenseek-vote-of-two": ("hidenseek", TWO),
    "hidenseek-mean": ("hidenseek", {"algorithm.merge": "mean"} | ALONE),
    "hidenseek-no-floor": ("hidenseek", {"algorithm.density": 0.001, "algorithm.floor": 0}),
    "fedmask-overlap": ("fedmask", {"algorithm.overlap": 3, "engine.cohort": 3}),
    "fedmask-overlap-of-one": ("fedmask", {"algorithm.overlap": 1} | ALONE),
    "fedmask-vote-of-two": ("fedmask", {"algorithm.merge": "all"} | TWO),
    "fedpm-mean": ("fedpm", {"algorithm.estimate": "mean"} | ALONE),
    "fedpm-reset": ("fedpm", {"algorithm.reset": 2} | ALONE),
    "ssfl-alone": ("ssfl", ALONE),
    "snip-asked": ("snip", {"algorithm.clients": 2} | TWO),
    "snip-more-batches-than-there-are": ("snip", {"algorithm.batches": 99}),
    "snip-no-floor": ("snip", {"algorithm.density": 0.001, "algorithm.floor": 0}),
    "progfed-stages": ("progfed", {"algorithm.stages": 2, "model.hidden": (8, 8), "engine.rounds": 2}),
    "progfed-one-stage": ("progfed", {"algorithm.stages": 1, "model.hidden": (8, 8)}),
    "feddst-last-move": ("feddst", {"engine.rounds": 11}),
    "feddst-still": ("feddst", {"algorithm.alpha": 0.0, "engine.rounds": 2}),
    "prunefl-last-move": ("prunefl", {"algorithm.every": 19}),
    "prunefl-by-itself": ("prunefl", {"engine.rounds": 2}),
    "prunefl-still": ("prunefl", {"algorithm.every": 20, "algorithm.free": 0.0}),
} | {f"{name}-density": (name, {"algorithm.density": 0.001689}) for name in SPARSE}


@pytest.mark.parametrize(("name", "values"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_said_to_be_allowed_is(name, values):
    config(name, **values).check()


@pytest.mark.parametrize(
    "case", ["fedtiny-no-norm", "fedsparsify-vote-of-one", "progfed-too-many", "snip-density", "feddst-never"]
)
def test_a_refused_run_leaves_no_folder(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, values, given, _, _ = REFUSED[case]
    words = [word for key, value in (SMALL | values).items() for word in (f"--{key}", *map(str, np.atleast_1d(value)))]
    assert cli.main(["run", name, *words, "--out", "run"]) == 2
    assert given[0] in " ".join(capsys.readouterr().err.split())
    assert not any(Path().iterdir())


@pytest.mark.parametrize("every", [4, 7])
def test_masks_that_are_said_to_move_do_and_those_that_stand_do_not(every, digits, small):
    """The rule of refusals is that of the run: the last accepted `every` moves a mask once, which the last round then sends."""
    settings = {"model": small, "data": digits, "engine": Engine(rounds=every + 1, eval_clients=0)}
    for algorithm, still in (
        (FedTiny(density=0.2, pool=1, every=every, progress="all", alpha=1.0), {"alpha": 0.0}),
        (FedDST(density=0.2, every=every, alpha=1.0), {"alpha": 0.0}),
        (PruneFL(density=0.2, every=every, initial=1), {"free": 0.0}),
    ):
        for each, moves in ((algorithm, True), (replace(algorithm, **still), False)):
            assert ("masks" in fit(each, **settings).rows[-1]["phases"]) is moves, each


def test_a_client_without_training_examples_is_refused(digits, small):
    data = replace(digits, parts=[*digits.parts[:2], np.arange(0), *digits.parts[3:]])
    with pytest.raises(
        UsageError, match=r"(?s)client 2 holds no training example.*one or more \(data\.min_examples\).*Leave it out"
    ):
        fit(FedAvg(), model=small, data=data, engine=Engine(rounds=1))
