"""What the record says of masks, and what `fedsieve inspect` makes of it."""

import json
from dataclasses import dataclass

import pytest
import torch

from conftest import same
from fedsieve import Engine, FedAvg, FedSparsify, HideNSeek, Local, Masks, Model, Params, Snip, Ssfl, Streams, build, cli, fit
from fedsieve.algorithms.base import Job
from fedsieve.algorithms.fedavg import State as Dense
from fedsieve.engine.masking import Own, moved
from fedsieve.errors import UsageError
from fedsieve.models.compact import compact
from fedsieve.params import Kind, Layout, Slot
from fedsieve.report.inspect import as_json, inspect, layers_table, sentences, write_page
from fedsieve.report.records import read
from fedsieve.report.table import csv
from test_report import checked
from test_report import sample as written

LOCAL = Local(batch=16, lr=0.2)
KEYS = ("mask_overlap", "sign_flips", "client_overlap", "events")


def compared(rows):
    return [{key: row[key] for key in KEYS} for row in rows]


# ---- the record


@dataclass(frozen=True)
class Told:
    params: Params
    masks: Masks


class Telling:
    """A method as far as the record asks: `finalize` of a state that is the answer."""

    def finalize(self, state):
        return state.params, state.masks


def told(layout, numbers, kept):
    return Told(Params(layout, torch.tensor(numbers)), Masks(layout, torch.tensor(kept)))


def test_movements_are_those_worked_by_hand():
    layout = Layout.of([Slot("w", (5,), Kind.WEIGHT, True, 0)])
    before = told(layout, [1.0, -1.0, 2.0, 0.0, 0.0], [True, True, True, False, False])
    after = told(layout, [-1.0, -1.0, 0.0, -3.0, 0.0], [True, True, False, True, False])
    row = moved(Telling(), before, 2, after.params, after.masks)
    # the weight that came back had no sign before
    assert row == {"mask_overlap": 2 / 4, "sign_flips": 1 / 2, "events": []}
    nothing = {"mask_overlap": None, "sign_flips": None, "events": []}
    assert moved(Telling(), before, 1, after.params, after.masks) == nothing
    assert moved(Telling(), before, 2, after.params, Masks.full(layout)) == nothing
    other = Layout.of([Slot("w", (6,), Kind.WEIGHT, True, 0)])
    elsewhere = told(other, [1.0] * 6, [True] * 5 + [False])
    assert moved(Telling(), before, 2, elsewhere.params, elsewhere.masks) == nothing


def test_masks_of_clients_are_found_in_what_read_returns():
    layout = Layout.of([Slot("w", (4,), Kind.WEIGHT, True, 0)])
    one, two = (Masks(layout, torch.tensor(kept)) for kept in ([True, True, False, False], [True, False, True, False]))
    own = Own()
    assert not own.any
    own.add((1.0, one, 7))
    assert own.any
    assert own.overlap() is None
    own.add(two)
    own.add((3.0, "none here"))
    assert own.overlap() == 1 / 3
    own.add((Masks.full(Layout.of([Slot("v", (2,), Kind.WEIGHT, True, 0)])),))
    assert own.overlap() is None


def test_the_record_of_a_run_holds_what_its_models_say(digits, small, monkeypatch):
    models, clients, aggregate = [], [], FedSparsify.aggregate

    def watched(self, state, replies):
        replies = list(replies)
        clients.append([own for _, (_, own, _) in replies])
        found = aggregate(self, state, iter(replies))
        models.append(self.finalize(found))
        return found

    monkeypatch.setattr(FedSparsify, "aggregate", watched)
    algorithm, engine = FedSparsify(density=0.2, variant="local"), Engine(rounds=5, cohort=3, eval_clients=0)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine)
    assert [row["mask_overlap"] is None for row in result.rows] == [True, False, False, False, False]
    for number in range(1, 5):
        (before, kept), (after, masks), row = models[number - 1], models[number], result.rows[number]
        assert row["mask_overlap"] == masks.count / kept.count  # FedSparsify's masks only shrink
        flipped = ((before.maskable < 0) != (after.maskable < 0)) & masks.kept
        assert row["sign_flips"] == pytest.approx(int(flipped.sum()) / masks.count)
    for row, own in zip(result.rows, clients, strict=True):
        pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
        both = sum(int((a.kept & b.kept).sum()) for a, b in pairs)
        either = sum(int((a.kept | b.kept).sum()) for a, b in pairs)
        assert row["client_overlap"] == pytest.approx(both / either)
    assert result.rows[-1]["client_overlap"] < 1


def test_methods_without_masks_or_without_masks_of_clients_say_so(digits, small):
    engine = Engine(rounds=3, eval_clients=0)
    dense = fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=engine)
    assert compared(dense.rows) == [dict.fromkeys(KEYS[:3]) | {"events": []}] * 3
    shared = fit(FedSparsify(density=0.3), model=small, data=digits, local=LOCAL, engine=engine)
    assert all(row["client_overlap"] is None for row in shared.rows)
    assert shared.rows[-1]["mask_overlap"] < 1


class Stops(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_says_the_same_of_masks(digits, small, tmp_path, stop):
    algorithm = FedSparsify(density=0.1, variant="local")
    settings = {"model": small, "data": digits, "local": LOCAL, "engine": Engine(rounds=6, checkpoint_every=1)}
    whole = fit(algorithm, **settings)

    def watch(row):
        if row["round"] == stop:
            raise Stops

    with pytest.raises(Stops):
        fit(algorithm, **settings, out=tmp_path / "run", watch=watch)
    resumed = fit(algorithm, **settings, out=tmp_path / "run", resume=True)
    assert compared(resumed.rows) == compared(whole.rows)
    assert same(resumed.params.flat, whole.params.flat)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A state that has something to say of even rounds."""

    params: Params
    moments: object
    round: int

    @property
    def events(self):
        return (f"round {self.round} was even.",) if self.round % 2 == 0 else ()


class Speaking(FedAvg):
    def aggregate(self, state, replies):
        found = super().aggregate(Dense(state.params, state.moments, state.round), replies)
        return Spoken(found.params, found.moments, found.round)


def test_events_of_the_state_are_in_the_record_and_in_the_inspection(digits, small, tmp_path):
    engine = Engine(rounds=4, eval_clients=0)
    result = fit(Speaking(), model=small, data=digits, local=LOCAL, engine=engine, out=tmp_path / "run")
    assert [row["events"] for row in result.rows] == [[], ["round 2 was even."], [], ["round 4 was even."]]
    found = inspect(tmp_path / "run", lambda: small)
    assert found.events == [(2, "round 2 was even."), (4, "round 4 was even.")]
    assert "events: 2" in sentences(found)
    page, _ = checked(write_page(found, tmp_path / "page.html"))
    assert "Events (2)" in page.words
    assert "round 4 was even." in page.words
    assert "\n2,round" not in csv(read(tmp_path / "run"))
    assert csv(read(tmp_path / "run")).splitlines()[2].count("round 2 was even.") == 1


# ---- the command

SMALL = ["--data.train_limit", "200", "--data.test_limit", "60", "--data.clients", "3", "--model.hidden", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "run"
    words = ["run", "fedsparsify", "--algorithm.density", "0.05", "--algorithm.variant", "local", *SMALL]
    assert cli.main([*words, "--engine.rounds", "6", "--out", str(out)]) == 0
    return out


def test_the_layers_are_those_of_the_final_model(folder, capsys):
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not (folder / "inspect.html").exists()
    spec = build(Model(name="mlp", hidden=(12,)), (1, 8, 8), 10)
    from fedsieve.finish.compact import matching

    tensors = matching(folder, spec)
    params = Params(spec.layout, torch.cat([tensors[slot.name].flatten() for slot in spec.layout.slots]))
    kept = params.maskable != 0
    masks = Masks(spec.layout, kept)
    small = compact(spec, params, masks, training=False).spec
    assert [layer["name"] for layer in found["layers"]] == [slot.name for slot in spec.layout.masked_slots]
    for layer in found["layers"]:
        slot, left = spec.layout.named[layer["name"]], small.layout.named[layer["name"]]
        assert tuple(layer["shape"]) == slot.shape
        assert layer["weights"] == slot.numel
        assert layer["first"] == 1
        assert layer["first"] > layer["half"] > layer["last"] == pytest.approx(float(masks[slot.name].float().mean()))
        assert (layer["outputs"], layer["inputs"]) == tuple(
            {"before": before, "after": after} for before, after in zip(slot.shape, left.shape, strict=True)
        )
        assert layer["dense_flops"] == 2 * slot.numel
        assert layer["sparse_flops"] == 2 * int(masks[slot.name].sum())
    assert found["layers"][0]["outputs"]["after"] < 12  # so few weights leave dead neurons
    assert found["total"]["sparse_flops"] == spec.density_flops(masks)
    assert [each["mask_overlap"] for each in found["moved"]] == [row["mask_overlap"] for row in read(folder).rows]
    assert (found["status"], found["rounds"], found["notes"], found["events"]) == ("done", 6, [], [])


def test_the_command_shows_a_table_and_writes_a_page_that_needs_nothing_else(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    *lines, where = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert where == f"page: {tmp_path / 'page.html'}"
    assert "fc1" in out
    assert "masks' overlap from round to round: lowest" in out
    page, text = checked(tmp_path / "page.html")
    assert [said.partition(".")[0] for said in page.drawings] == [
        "Density of each layer over the rounds",
        "Units left in each layer",
        "Overlap of masks",
        "Sign flips",
    ]
    again = tmp_path / "again.html"
    write_page(inspect(folder, lambda: build(Model(name="mlp", hidden=(12,)), (1, 8, 8), 10)), again)
    assert again.read_text() == text


def test_a_run_that_has_not_ended_is_shown_without_dead_units(folder, tmp_path, capsys):
    for name in ("config.toml", "records.jsonl", "partition.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert cli.main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "The run has not ended" in said
    page, _ = checked(tmp_path / "inspect.html")
    assert "Dead units are not known" in page.words
    found = as_json(inspect(tmp_path, lambda: build(Model(name="mlp", hidden=(12,)), (1, 8, 8), 10)))
    assert found["status"] == "unfinished"
    assert all(layer["outputs"] is None and layer["sparse_flops"] > 0 for layer in found["layers"])


@pytest.mark.parametrize("rounds", [0, 1])
def test_few_rounds_are_no_obstacle(folder, tmp_path, rounds):
    (tmp_path / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)[:rounds]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    found = inspect(tmp_path, lambda: build(Model(name="mlp", hidden=(12,)), (1, 8, 8), 10))
    page, _ = checked(write_page(found, tmp_path / "page.html"))
    assert ("No round has been completed." in page.words) is (rounds == 0)
    assert "not measured" in "\n".join(sentences(found))


def test_a_run_from_python_is_shown_as_far_as_its_files_say(digits, small, tmp_path, capsys):
    fit(FedSparsify(density=0.2), model=small, data=digits, local=LOCAL, engine=Engine(rounds=3), out=tmp_path / "run")
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0
    assert "the run was started from Python" in capsys.readouterr().out
    found = inspect(tmp_path / "run", lambda: pytest.fail("a network is built of half a config"))
    assert [layer.shape for layer in found.layers] == [slot.shape for slot in small.layout.masked_slots]
    assert all(layer.outputs is None and layer.dense_flops is None and layer.last < 1 for layer in found.layers)
    checked(write_page(found, tmp_path / "page.html"))


def test_another_network_than_the_one_of_the_config_is_not_taken_for_it(folder):
    found = inspect(folder, lambda: build(Model(name="mlp", hidden=(13,)), (1, 8, 8), 10))
    assert "another network" in found.notes[0]
    assert found.layers[0].shape == (12, 64)

    def broken():
        raise UsageError("model 'x:y' cannot be loaded.\nmore")

    assert "model 'x:y' cannot be loaded." in inspect(folder, broken).notes[0]


def test_records_of_an_earlier_version_and_text_in_files_are_shown(tmp_path):
    evil = "<script>alert(1)</script>\x1b[31m"
    run = written(tmp_path / "a", rounds=5)
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for row in rows:
        row["densities"] = {evil: 0.5}
    rows[-1]["events"] = [evil]
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect(run, lambda: pytest.fail("built"))
    assert any("earlier version" in line for line in sentences(found))
    assert not any("\x1b" in line for line in sentences(found))
    page, _ = checked(write_page(found, tmp_path / "page.html"))
    assert "<script>alert(1)</script>" in page.words
    assert layers_table(found).row_count == 2


def test_dense_layers_count_with_all_their_weights(tmp_path, digits):
    words = ["run", "fedsparsify", *SMALL, "--model.dense", "fc2.weight", "--engine.rounds", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    spec = build(Model(name="mlp", hidden=(12,), dense=("fc2.weight",)), (1, 8, 8), 10)
    found = inspect(tmp_path / "run", lambda: spec)
    assert [(layer.name, layer.last == 1) for layer in found.layers] == [("fc1.weight", False), ("fc2.weight", True)]
    assert found.layers[1].sparse_flops == found.layers[1].dense_flops == 2 * 120
    checked(write_page(found, tmp_path / "page.html"))


def test_what_is_no_run_folder_is_refused(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_the_model_of_the_round_before_costs_nothing_while_nothing_is_pruned(small):
    class Costly(FedAvg):
        def finalize(self, state):
            pytest.fail("made for nothing")

    job = Job(small, small.initial("glorot", Streams(0)), 3, 6, Streams(0))
    state = Costly().init(job)
    assert moved(Costly(), state, 2, job.start, Masks.full(small.layout))["mask_overlap"] is None


def test_a_layer_that_is_cut_off_is_an_event_once():
    layout = Layout.of([Slot("v", (2,), Kind.WEIGHT, True, 0), Slot("w", (3,), Kind.WEIGHT, True, 1)])
    whole = told(layout, [1.0] * 5, [True] * 5)
    cut = told(layout, [0.0, 0.0, 1.0, 1.0, 1.0], [False, False, True, True, True])
    said = ["v keeps none of its 2 weights"]
    assert moved(Telling(), whole, 1, cut.params, cut.masks)["events"] == said
    assert moved(Telling(), whole, 2, cut.params, cut.masks)["events"] == said
    assert moved(Telling(), cut, 3, cut.params, cut.masks)["events"] == []


@pytest.mark.parametrize(
    "algorithm",
    [
        Snip(density=0.01, score="magnitude", floor=25),
        Ssfl(density=0.01, floor=25),
        HideNSeek(density=0.01, iterations=1, floor=25),
    ],
    ids=["snip", "ssfl", "hidenseek"],
)
def test_what_a_guard_held_is_an_event_of_the_round_in_which_the_mask_was_chosen(algorithm, digits):
    spec = build(Model(name="mlp", hidden=(64, 64)), digits.shape, digits.classes)
    start = spec.initial("kaiming", Streams(0))
    start["fc1.weight"].mul_(0.1)  # small weights go first
    result = fit(algorithm, model=spec, data=digits, local=LOCAL, engine=Engine(rounds=3, cohort=4), start=start)
    assert result.rows[0]["events"]
    assert all("as few as the guard allows" in event for event in result.rows[0]["events"])
    assert all(result.masks[slot.name].sum() >= 25 for slot in spec.layout.masked_slots)
    assert [row["events"] for row in result.rows[1:]] == [[], []]
