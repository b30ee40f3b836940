"""The study of membership inference: its runs are comparable and valid, audited once, and its table is that of their audits."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedsieve import Data, DataError, FedAvg, Local, Model
from fedsieve.bench import privacy
from fedsieve.bench.privacy import DENSE, SCENARIOS, SEEDS, Cell, Found, Scenario, alike, beyond, cells, spread
from fedsieve.config import from_tables
from fedsieve.finish import audit
from fedsieve.finish.audit import LEAST, plan
from fedsieve.local.executor import Executor

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Scenario(
    "small",
    Data(name="digits", train_limit=200, clients=4),
    Model(name="mlp", hidden=(16,)),
    Local(epochs=2, batch=16),
    rounds=6,
    stops=(2,),
    shadows=1,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_runs_of_a_seed_differ_in_method_and_rounds_only_and_can_be_run(scenario):
    whole = list(cells(scenario))
    assert len({cell.place for cell in whole}) == len(whole)
    for seed in SEEDS:
        for cell in whole:
            config = cell.config(seed)
            assert from_tables(config.tables()) == config
            alike = replace(config, name=DENSE, algorithm=FedAvg(), engine=replace(config.engine, rounds=scenario.rounds))
            assert alike == Cell(scenario, DENSE, FedAvg(), scenario.rounds).config(seed)
    digits = replace(scenario, data=Data(name="digits", clients=4), model=SMALL.model)
    for cell in cells(digits):
        cell.config(0).check()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_member_is_compared_and_a_shadow_model_has_as_many_examples_as_the_run(scenario):
    try:
        _, data, _ = Cell(scenario, DENSE, FedAvg(), scenario.rounds).config(0).prepare()
    except DataError:
        pytest.skip("the files are not on this machine (FEDSIEVE_DATA)")
    chosen = plan(data, [{"round": 1, "examples": 500}], shadows=scenario.shadows)
    assert len(chosen.drawn[0]) == len(chosen.members) == len(chosen.half(0)[0]) == len(data.train) >= LEAST


def test_a_stopped_run_is_the_beginning_of_the_whole_one():
    short, long = (Cell(SMALL, DENSE, FedAvg(), rounds).config(1) for rounds in (2, 6))
    told = []
    for config in (short, long):
        rows = []
        config.run(None, watch=lambda row, rows=rows: rows.append(row["train_loss"]))
        told.append(rows)
    assert told[0] == told[1][:2]
    assert len(told[1]) == 6


def test_each_run_is_played_and_audited_once_and_told_as_audited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in (("SCENARIOS", (SMALL,)), ("SEEDS", (0, 1)), ("DENSITIES", (0.5,))):
        monkeypatch.setattr(privacy, name, value)
    monkeypatch.setattr(audit, "RESAMPLES", 20)
    assert privacy.main(["--folder", "kept"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 4
    place = tmp_path / "kept/small/fedsparsify-global-0.5"
    assert sorted(path.name for path in (place / "seed1").iterdir()) == [
        "audit.json",
        "config.toml",
        "records.csv",
        "summary.json",
    ]
    assert not any((tmp_path / "runs").rglob("*.json"))
    told = [json.loads((place / f"seed{seed}/audit.json").read_text()) for seed in (0, 1)]
    assert [each["seed"] for each in told] == [0, 1]
    assert [each["shadows"]["density"] for each in told] == pytest.approx([0.5, 0.5], abs=1e-3)
    written = (tmp_path / "kept/table.md").read_text()
    row = next(line for line in written.splitlines() if line.startswith("| fedsparsify-global-0.5 "))
    for attack in ("loss", "shadow"):
        for key in ("auc", "tpr_at_1_fpr", "advantage"):
            assert f"| {spread([each['attacks'][attack][key]['value'] for each in told], 3)} |" in row
    accuracies = [json.loads((place / f"seed{seed}/summary.json").read_text())["accuracy"] for seed in (0, 1)]
    assert f"| {100 * np.mean(accuracies):.1f} ± " in row
    drawing = (tmp_path / "kept/auc_density.svg").read_bytes()
    monkeypatch.setattr(Executor, "train", lambda *args, **settings: pytest.fail("it trained"))
    assert privacy.main(["--folder", "kept"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "kept/table.md").read_text() == written
    assert (tmp_path / "kept/auc_density.svg").read_bytes() == drawing


def test_dense_models_of_equal_training_accuracy_are_between_stops_and_nowhere_else():
    stops = [Found(1.0, train, 50.0, {"loss": {"auc": auc}}) for train, auc in ((90.0, 0.7), (60.0, 0.5), (70.0, 0.6))]
    assert [alike(at, stops, "loss") for at in (60, 65, 80, 90)] == pytest.approx([0.5, 0.55, 0.65, 0.7])
    assert [alike(at, stops, "loss") for at in (59.9, 90.1)] == [None, None]
    assert alike(60, [], "loss") is None
    sparse = Found(0.1, 80.0, 50.0, {"loss": {"auc": 0.62}})
    assert beyond(sparse, stops, "loss") == pytest.approx(-0.03)
    assert beyond(replace(sparse, train=95.0), stops, "loss") is None


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.5, 0.7], 3) == "0.600 ± 0.141"
    assert spread([0.5], 2) == "0.50"
    assert spread([0.5, None], 2) == spread([None], 2) == ""
