"""Membership inference: measures against closed forms, attacks on models that do and do not remember, refusals, the command."""

import json
import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from fedsieve import (
    Data,
    Engine,
    FedAvg,
    FedSparsify,
    Local,
    Model,
    Streams,
    UsageError,
    build,
    cli,
    federate,
    fit,
    load,
)
from fedsieve.algorithms.base import Job
from fedsieve.engine.round import draw, took_part
from fedsieve.finish import audit as audits
from fedsieve.finish.audit import Attack, Signals, audit, one_client, plan, shadow_model, signals
from fedsieve.finish.roc import Ranked, described
from fedsieve.local.executor import Executor
from fedsieve.models.spec import ModelSpec
from fedsieve.report.audit import audit_table, write_page
from fedsieve.report.records import read
from test_docs import leaves, section, table
from test_report import checked

pytestmark = pytest.mark.usefixtures("one_thread")

NORMAL = NormalDist()
LOCAL = Local(batch=16, lr=0.1)

# ---- measures


def test_measures_of_normal_scores_are_the_closed_forms():
    """Scores at the quantiles of N(1, 1) and N(0, 1): the binormal curve without chance."""
    quantiles = np.array([NORMAL.inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    found = Ranked.of(quantiles + 1, quantiles).curve().measures(threshold=0.5)
    assert found["auc"] == pytest.approx(NORMAL.cdf(1 / 2**0.5), abs=1e-4)
    assert found["tpr_at_1_fpr"] == pytest.approx(1 - NORMAL.cdf(NORMAL.inv_cdf(0.99) - 1), abs=1e-3)
    assert found["advantage"] == pytest.approx(2 * NORMAL.cdf(0.5) - 1, abs=1e-3)
    assert found["balanced_accuracy"] == pytest.approx(NORMAL.cdf(0.5), abs=1e-3)
    assert Ranked.of(quantiles + 1, quantiles).curve().balanced(1.5) == pytest.approx(
        (1 - NORMAL.cdf(0.5) + NORMAL.cdf(1.5)) / 2, abs=1e-3
    )


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_curves_are_those_of_scikit_learn_ties_and_weights_included(decimals):
    draws = np.random.default_rng(decimals)
    members, others = np.round(draws.normal(0.4, 1, 150), decimals), np.round(draws.normal(0, 1, 90), decimals)
    weights = draws.random(90)
    truth, scores = np.repeat([1, 0], [150, 90]), np.concatenate([members, others])
    ranked = Ranked.of(members, others)
    assert ranked.curve().auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    weighed = np.concatenate([np.ones(150), weights])
    assert ranked.curve(negative=weights).auc == pytest.approx(roc_auc_score(truth, scores, sample_weight=weighed), abs=1e-12)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(ranked.curve().false, false)
    assert np.allclose(ranked.curve().true, true)
    assert ranked.curve().advantage == pytest.approx((true - false).max())
    at = ranked.curve().true_at(np.array([0.0, 0.01, 0.1, 1.0]))
    assert np.allclose(at, [true[false <= rate].max() for rate in (0.0, 0.01, 0.1, 1.0)])


def test_measures_worked_by_hand():
    curve = Ranked.of(np.array([3.0, 2.0, 2.0]), np.array([2.0, 1.0])).curve()
    assert curve.false.tolist() == [0, 0, 0.5, 1]
    assert curve.true.tolist() == pytest.approx([0, 1 / 3, 1, 1])
    assert curve.auc == pytest.approx((1 / 3 * 2 + 2 / 3 * 1.5) / 2)
    assert curve.advantage == pytest.approx(0.5)
    assert [curve.balanced(at) for at in (4, 3, 2, 1, 0)] == pytest.approx([0.5, 2 / 3, 0.75, 0.5, 0.5])


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    """60 samples of scores whose AUC is known; and the width is that of the AUC's own spread."""
    truth, hits, widths, values = NORMAL.cdf(1 / 2**0.5), 0, [], []
    for seed in range(60):
        draws = np.random.default_rng(seed)
        ranked = Ranked.of(draws.normal(1, 1, 120), draws.normal(0, 1, 120))
        found = described(ranked, 0.5, 200, Streams(seed)("test"))["auc"]
        hits += found["low"] <= truth <= found["high"]
        widths.append(found["high"] - found["low"])
        values.append(found["value"])
    assert 50 <= hits <= 60
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.25)


def test_a_client_of_easy_classes_is_no_leak():
    """Scores depend on the class only; the client holds mostly the class that scores high."""
    draws = np.random.default_rng(0)
    labels, others = np.repeat([0, 1], [190, 10]), np.repeat([0, 1, 2], [500, 500, 500])
    score = lambda which: 3.0 * (which == 0) + draws.normal(0, 1, len(which))  # noqa: E731
    first, second = score(labels), score(others)
    assert Ranked.of(first, second).curve().auc > 0.8
    assert one_client(first, labels, second, others, 0.0)["auc"] == pytest.approx(0.5, abs=0.05)
    weights = np.where(others == 0, 190 / 500, np.where(others == 1, 10 / 500, 0))
    expected = roc_auc_score(
        np.repeat([1, 0], [200, 1500]), np.concatenate([first, second]), sample_weight=np.concatenate([np.ones(200), weights])
    )
    assert one_client(first, labels, second, others, 0.0)["auc"] == pytest.approx(expected, abs=1e-12)
    assert one_client(first[:20], labels[:20], second, others, 0.0) is None
    assert one_client(first, labels + 7, second, others, 0.0) is None  # of classes that no non-member has


# ---- what a model shows


def test_signals_are_loss_log_odds_and_entropy(digits, small):
    params = small.initial("glorot", Streams(1))
    found = signals(small, params, digits.test, np.arange(30))
    x, y = next(digits.test.epoch(np.arange(30), 30))
    with torch.no_grad():
        shares = torch.func.functional_call(small.module, dict(params), (x,)).double().softmax(-1).numpy()
    true = shares[np.arange(30), y.numpy()]
    assert np.allclose(found.loss, -np.log(true))
    assert np.allclose(found.odds, np.log(true / (1 - true)))
    assert np.allclose(found.entropy, -(shares * np.log(shares)).sum(1))
    assert found.correct.tolist() == (shares.argmax(1) == y.numpy()).tolist()
    assert found.label.tolist() == y.tolist()
    metrics = Executor(small, LOCAL, 1).evaluate(params, digits.test, np.arange(30))
    assert found.loss.sum() == pytest.approx(metrics.loss, rel=1e-5)
    assert found.correct.sum() == metrics.correct


def test_signals_of_sequences_are_means_over_their_symbols():
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor([[1, 2, -100], [0, 4, 3]])
    shown = audits._shown(scores, y)
    each = [audits._shown(scores[i, : (2, 3)[i]], y[i, : (2, 3)[i]]) for i in (0, 1)]
    for whole, parts in zip(shown, zip(*each, strict=True), strict=True):
        assert whole.tolist() == pytest.approx([float(part.mean()) for part in parts])


# ---- attacks


@pytest.fixture(scope="module")
def everybody():
    settings = Data(name="digits", clients=4, train_limit=200)
    return federate(load(settings), settings, Streams(0))


@pytest.fixture(scope="module")
def wide(everybody):
    return build(Model(name="mlp", hidden=(64,)), everybody.shape, everybody.classes)


def attacked(data, spec, params, rows=(), **choice):
    return audit(plan(data, rows, **choice), spec, params, data, LOCAL)


ROWS = [{"round": r, "examples": 200, "densities": None, "lost": {}} for r in range(1, 31)]


def test_a_model_that_remembers_its_examples_is_found_out_and_an_untrained_one_is_not(everybody, wide):
    """Labels drawn by chance can only be learnt by heart, so members differ from all others. Both attacks see it."""
    random = Streams(5)("labels").numpy().integers(0, 10, len(everybody.train))
    noisy = replace(everybody, train=replace(everybody.train, y=torch.from_numpy(random)))
    also = Streams(6)("labels").numpy().integers(0, 10, len(everybody.test))
    noisy = replace(noisy, test=replace(noisy.test, y=torch.from_numpy(also)))
    local = Local(batch=8, lr=0.2)
    order, executor = np.concatenate(noisy.parts), Executor(wide, local, 200)
    start = wide.initial("glorot", Streams(0))
    params = executor.train(start, noisy.train, order, Streams(0).at(round=1), epochs=150).params
    rows = [{"round": 1, "examples": 200 * 150, "densities": None, "lost": {}}]
    found = audit(plan(noisy, rows, shadows=2), wide, params, noisy, local)
    assert found["accuracy"]["members"] > 0.95
    assert found["attacks"]["loss"]["auc"]["low"] > 0.9
    assert found["attacks"]["loss"]["tpr_at_1_fpr"]["value"] > 0.3
    assert found["attacks"]["shadow"]["auc"]["low"] > 0.85
    assert found["attacks"]["shadow"]["balanced_accuracy"]["value"] > 0.8
    assert found["attacks"]["loss"]["clients"]["count"] == 4
    assert found["attacks"]["loss"]["clients"]["auc"]["p5"] > 0.85
    assert found["shadows"]["accuracy"]["members"] > 0.95 > 0.3 > found["shadows"]["accuracy"]["nonmembers"]
    blind = audit(plan(everybody, ROWS, shadows=0), wide, start, everybody, LOCAL)["attacks"]["loss"]
    for key, guess in (("auc", 0.5), ("balanced_accuracy", 0.5)):
        assert blind[key]["low"] <= guess <= blind[key]["high"], key


def test_the_auc_by_loss_is_scikit_learns(everybody, wide):
    params = (
        Executor(wide, LOCAL, 5)
        .train(
            wide.initial("glorot", Streams(0)),
            everybody.train,
            np.concatenate(everybody.parts),
            Streams(0).at(round=1),
            epochs=20,
        )
        .params
    )
    chosen = plan(everybody, [], shadows=0)
    found = audit(chosen, wide, params, everybody, LOCAL)["attacks"]["loss"]
    x, y = (torch.cat(each) for each in zip(*everybody.train.epoch(chosen.drawn[0], 64), strict=True))
    u, v = (torch.cat(each) for each in zip(*everybody.test.epoch(chosen.drawn[1], 64), strict=True))
    with torch.no_grad():
        scores = torch.func.functional_call(wide.module, dict(params), (torch.cat([x, u]),)).double()
    losses = torch.nn.functional.cross_entropy(scores, torch.cat([y, v]), reduction="none").numpy()
    truth = np.repeat([1, 0], [len(y), len(v)])
    assert found["auc"]["value"] == pytest.approx(roc_auc_score(truth, -losses), abs=1e-9)
    mean = signals(wide, params, everybody.train, chosen.members).loss.mean()
    taken = losses <= mean
    assert found["balanced_accuracy"]["value"] == pytest.approx((taken[truth == 1].mean() + 1 - taken[truth == 0].mean()) / 2)


def test_regressions_are_of_one_class_each_where_there_are_enough_examples():
    draws = np.random.default_rng(0)

    def shown(shift, labels):
        features = draws.normal(0, 1, (3, len(labels))) + shift * np.where(labels == 1, -1, 1)
        return Signals(*features, np.ones(len(labels)), labels)

    labels = np.repeat([0, 1, 2], [40, 40, 4])
    inside, outside = [shown(0.7, labels) for _ in range(2)], [shown(-0.7, labels) for _ in range(2)]
    attack = Attack.learned(inside, outside)
    assert set(attack.own) == {0, 1}  # class 2 has 8 of each kind
    fresh = shown(0.7, labels), shown(-0.7, labels)
    auc = {label: _auc(attack, *fresh, label) for label in (0, 1)}
    assert min(auc.values()) > 0.9  # membership looks the other way round in class 1, which one regression cannot learn
    shared = replace(attack, own={})
    assert min(_auc(shared, *fresh, label) for label in (0, 1)) < 0.6
    features = np.concatenate([group.features[group.label == 0] for group in (*inside, *outside)])
    direct = LogisticRegression(max_iter=1000).fit((features - attack.centre) / attack.spread, np.repeat([1, 0], [80, 80]))
    where = fresh[0].label == 0
    expected = direct.decision_function((fresh[0].features[where] - attack.centre) / attack.spread)
    assert np.allclose(attack.scores(fresh[0])[where], expected)


def _auc(attack, inside, outside, label):
    first, second = (attack.scores(group)[group.label == label] for group in (inside, outside))
    return Ranked.of(first, second).curve().auc


def test_shadow_models_are_as_dense_as_the_run_and_see_only_their_half(everybody, wide):
    densities = [{"fc1.weight": 1 - 0.09 * r, "fc2.weight": 1 - 0.05 * r} for r in range(1, 11)]
    rows = [{"round": r, "examples": 200, "densities": densities[r - 1], "lost": {}} for r in range(1, 11)]
    chosen = plan(everybody, rows, shadows=2)
    assert [round for round, _ in chosen.updates] == list(range(1, 11))
    own, rest = chosen.half(0)
    assert not set(own) & set(rest)
    assert not (set(own) | set(rest)) & set(chosen.others)
    assert sorted([*own, *rest]) == chosen.pool.tolist()
    assert set(own) != set(chosen.half(1)[0])
    seen = []

    class Watched(Executor):
        def train(self, params, examples, order, streams, **settings):
            seen.append((order, streams.round, settings["masks"]))
            return super().train(params, examples, order, streams, **settings)

    params = shadow_model(chosen, 0, Watched(wide, LOCAL, 10), everybody.test, own, "glorot")
    assert len(seen) == 10
    assert all(order is own for order, _, _ in seen)
    assert [round for _, round, _ in seen] == list(range(1, 11))
    assert seen[0][2] is None
    for (_, _, masks), wanted in zip(seen[1:], densities, strict=False):
        assert masks.densities() == pytest.approx(wanted, abs=1e-3)
    for name, wanted in densities[-1].items():
        assert float((params[name] != 0).float().mean()) == pytest.approx(wanted, abs=1e-3)


def test_updates_are_as_many_as_the_visits_of_an_example_and_spread_over_the_rounds(everybody):
    rows = [{"round": r, "examples": 100, "densities": {"w": 1 / r}, "lost": {}} for r in range(1, 21)]
    assert [round for round, _ in plan(everybody, rows).updates] == list(range(2, 21, 2))  # half of the 200 in each round
    twice = [row | {"examples": 400} for row in rows[:3]]
    assert [round for round, _ in plan(everybody, twice).updates] == [1, 1, 2, 2, 3, 3]
    assert len(plan(everybody, [rows[0] | {"examples": 0}]).updates) == 1


def test_an_audit_repeats_with_its_seed_on_any_number_of_threads(everybody, wide):
    params, threads = wide.initial("glorot", Streams(0)), torch.get_num_threads()
    first = attacked(everybody, wide, params, ROWS[:2], shadows=1, seed=3)
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = attacked(everybody, wide, params, ROWS[:2], shadows=1, seed=3)
        assert torch.get_num_threads() == (2 if threads == 1 else 1)
    finally:
        torch.set_num_threads(threads)
    assert json.dumps(first) == json.dumps(again)
    other = attacked(everybody, wide, params, ROWS[:2], shadows=1, seed=4)
    assert other["attacks"]["loss"]["auc"] != first["attacks"]["loss"]["auc"]


def test_members_are_those_of_clients_that_took_part(everybody, wide):
    engine = Engine(rounds=3, cohort=1, seed=2)
    job = Job(wide, wide.initial("glorot", Streams(0)), 3, 4, Streams(2), 1)
    rows = [{"round": r, "lost": {}} for r in (1, 2, 3)]
    drawn = [draw(job, engine, r)[0] for r in (1, 2, 3)]
    assert took_part(job, engine, rows) == sorted(set(drawn))
    rows[0]["lost"] = {str(drawn[0]): "dropped out"}
    assert took_part(job, engine, rows) == sorted(set(drawn[1:]))
    chosen = plan(everybody, [], shadows=0, clients=[1, 3])
    assert chosen.members.tolist() == sorted([*everybody.parts[1], *everybody.parts[3]])
    assert set(chosen.drawn[0]) <= set(chosen.members)
    assert set(chosen.drawn[1]) < set(chosen.others)
    assert [len(each) for each in chosen.drawn] == [100, 100]


# ---- refusals


def refused(data, **choice):
    with pytest.raises(UsageError) as caught:
        plan(data, ROWS, **choice)
    assert len(str(caught.value).splitlines()) <= 8
    return str(caught.value)


def test_too_few_examples_are_refused_with_what_is_needed(everybody):
    few = replace(everybody, test=replace(everybody.test, x=everybody.test.x[:199], y=everybody.test.y[:199]))
    said = refused(few)
    assert "199 test examples; an audit needs 200" in said
    assert "--shadows 0" in said
    assert len(plan(few, ROWS, shadows=0).others) == 199
    least = replace(few, test=replace(few.test, x=few.test.x[:99], y=few.test.y[:99]))
    assert "99 test examples; an audit needs 100" in refused(least, shadows=0)
    assert len(plan(replace(few, test=everybody.test), ROWS).pool) == 180
    assert "client 2 holds 50 training examples: an audit needs 100" in refused(everybody, client=2)
    assert "hold 50 training examples" in refused(everybody, clients=[0])
    assert "client 9 took part in no round" in refused(everybody, client=9)
    many = replace(everybody, classes=40)
    assert "an audit needs 500: 100 as non-members and 400" in refused(many)


def test_a_loss_of_its_own_is_refused(everybody, wide):
    own = replace(wide, loss=lambda outputs, targets: outputs.sum())
    with pytest.raises(UsageError, match="loss of its own"):
        attacked(everybody, own, own.initial("glorot", Streams(0)), shadows=0)


# ---- the command

SMALL = ["--data", "digits", "--data.train_limit", "300", "--data.clients", "3", "--model.hidden", "16", "--engine.rounds", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "run"
    assert cli.main(["run", "fedsparsify", "--algorithm.density", "0.1", *SMALL, "--out", str(out)]) == 0
    return out


def test_the_command_writes_what_is_documented_and_shows_it(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert cli.main(["audit", str(folder), "--shadows", "2"]) == 0
    out = capsys.readouterr().out
    *lines, where = out.splitlines()
    assert where == f"page: {folder / 'audit.html'}"
    assert max(map(len, lines)) <= 80
    assert "by shadow models" in out
    told = json.loads((folder / "audit.json").read_text())
    assert told["shadows"]["density"] == pytest.approx(read(folder).rows[-1]["density"])
    assert (told["shadows"]["updates"], told["shadows"]["examples"]) == (4, 90)
    page, _ = checked(folder / "audit.html")
    assert [said.partition(".")[0] for said in page.drawings] == ["ROC of the attacks", "Losses"]
    assert cli.main(["audit", str(folder), "--shadows", "2", "--json", "--out", str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    assert (json.loads(captured.out), captured.err) == (told, "")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["audit.html", "audit.json"]
    for name in ("audit.json", "audit.html"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()


def test_every_key_is_documented_and_every_documented_key_is_there(folder, capsys):
    assert cli.main(["audit", str(folder), "--shadows", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    measure = "(auc|tpr_at_1_fpr|balanced_accuracy|advantage)"
    found = {re.sub(r"^attacks\.(loss|shadow)", "attacks.ATTACK", key) for key in leaves(told)}
    found = {re.sub(rf"\.{measure}\.", ".MEASURE.", key) for key in found}
    found = {re.sub(r"\.p(25|50|75|95)$", ".p5", key) for key in found}
    documented = {key for row in table(section("records.md", "audit.json")) for key in re.findall(r"`([^`]+)`", row[0])}
    assert found == documented


def test_one_client_is_audited_alone_and_without_shadow_models_if_asked(folder, capsys, tmp_path):
    words = ["audit", str(folder), "--json", "--client", "1", "--shadows", "0", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["client"] == 1
    assert told["examples"] == {"each": 100, "members": 100, "nonmembers": 360}
    assert list(told["attacks"]) == ["loss"]
    page, _ = checked(tmp_path / "audit.html")
    assert "of client 1" in page.words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--client", "7"], "took part in no round"),
        (["--shadows", "-1"], "should be 0 or more"),
        (["--seed", "-3"], "should be in [0, 2**63)"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(folder, capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.setattr(Executor, "train", lambda *args, **settings: pytest.fail("it trained"))
    assert cli.main(["audit", str(folder), *words, "--out", str(tmp_path / "new")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_runs_that_cannot_be_audited_are_refused(folder, digits, small, tmp_path, capsys, monkeypatch):
    fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=Engine(rounds=1), out=tmp_path / "python")
    few = ["run", "fedavg", "--data.test_limit", "150", "--engine.rounds", "1", "--model.hidden", "8"]
    assert cli.main([*few, "--out", str(tmp_path / "few")]) == 0
    assert cli.main(["run", "fedavg", *SMALL, "--data.clients", "6", "--out", str(tmp_path / "small")]) == 0
    for name in ("unfinished", "moved"):
        (tmp_path / name).mkdir()
        for path in folder.iterdir():
            if path.is_file() and (name == "moved" or path.name not in ("model.safetensors", "summary.json")):
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    partition = json.loads((tmp_path / "moved" / "partition.json").read_text())
    (tmp_path / "moved" / "partition.json").write_text(json.dumps(partition | {"hash": "0" * 32}))
    monkeypatch.setattr(Executor, "train", lambda *args, **settings: pytest.fail("it trained"))
    capsys.readouterr()
    for name, code, said, *words in (
        ("small", 2, "client 1 holds 50 training examples: an audit needs 100", "--client", "1"),
        ("python", 2, "was started from Python"),
        ("few", 2, "150 test examples; an audit needs 200"),
        ("unfinished", 2, "has not ended"),
        ("moved", 3, "not shared out as"),
        ("nowhere", 2, "not a run folder"),
    ):
        assert cli.main(["audit", str(tmp_path / name), *words]) == code
        message = capsys.readouterr().err
        assert said in message, name
        assert len(message.splitlines()) <= 8


def test_a_run_from_python_is_audited_from_python(everybody, wide, tmp_path):
    result = fit(
        FedSparsify(density=0.3), model=wide, data=everybody, local=LOCAL, engine=Engine(rounds=5), out=tmp_path / "run"
    )
    ticks = []
    chosen = plan(everybody, result.rows, shadows=2)
    found = audit(chosen, wide, result.params, everybody, LOCAL, tick=lambda: ticks.append(1))
    assert len(ticks) == chosen.ticks == 10
    assert found["shadows"]["density"] == pytest.approx(0.3, abs=1e-3)
    checked(write_page(found, read(tmp_path / "run"), tmp_path / "page.html"))
    assert audit_table(found).row_count == 9


def test_sequences_are_audited_with_one_regression_for_all(tmp_path):
    tokens = torch.randint(0, 6, (700, 5), generator=torch.Generator().manual_seed(0))

    class Next(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = torch.nn.Embedding(6, 8), torch.nn.Linear(8, 6)

        def forward(self, x):
            return self.out(self.table(x))

    from fedsieve.data.batches import Examples, Federation

    train, test = (
        Examples(part[:, :-1].contiguous(), part[:, 1:].contiguous(), (), ()) for part in (tokens[:300], tokens[300:])
    )
    data = Federation("tokens", 6, train, test, [np.arange(150), np.arange(150, 300)], [np.arange(0)] * 2, False)
    spec = ModelSpec.of(Next(), train.x[:1])
    found = attacked(data, spec, spec.initial("glorot", Streams(0)), ROWS[:3], shadows=2)
    assert found["attacks"]["shadow"]["auc"]["low"] < 0.5 < found["attacks"]["shadow"]["auc"]["high"]
    assert found["attacks"]["loss"]["clients"]["count"] == 2


def test_the_figures_of_the_page_are_those_of_the_file(folder, tmp_path):
    assert cli.main(["audit", str(folder), "--shadows", "0", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "audit.json").read_text())
    page, _ = checked(tmp_path / "audit.html")
    auc = told["attacks"]["loss"]["auc"]
    assert f"{auc['value']:.3f} ({auc['low']:.3f}-{auc['high']:.3f})" in page.words
    assert "100 drawn of 300" not in page.words
    assert "300 drawn of 300" in page.words
    assert told["attacks"]["loss"]["roc"]["fpr"][-1] == told["attacks"]["loss"]["roc"]["tpr"][-1] == 1
