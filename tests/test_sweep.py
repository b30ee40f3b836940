"""Sweeps: the grid, what is refused before run 1, going on, the table, the choice."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedsieve import UsageError, cli, sweep
from fedsieve.report import tally
from fedsieve.report.records import Run
from fedsieve.sweep import grid

EXAMPLE = Path(__file__).parent.parent / "examples" / "sweep.toml"
BASE = """
[data]
train_limit = 120
test_limit = 60
clients = 3
[model]
hidden = [8]
[engine]
rounds = 3
"""
SMALL = f"""{BASE}
[sweep]
"algorithm.name" = ["fedavg", "fedprox"]
"fedprox.mu" = [0.1]
"engine.seed" = [0, 1]
"""
NAMES = ["fedavg-seed0", "fedavg-seed1", "fedprox-seed0", "fedprox-seed1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder; what a command changes in the process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call(capsys):
    """Run a command in this process; return its exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def written(text, name="mine.toml"):
    Path(name).write_text(text)
    return Path(name)


def points_of(text):
    return grid(written(text))


def refused(text):
    with pytest.raises(UsageError) as error:
        points_of(text)
    assert len(str(error.value).splitlines()) <= 8
    return str(error.value)


def tree(path, *but):
    return {each: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file() and each.name not in but}


def comparable(path):
    """What a run came to, without what differs between two equal runs."""
    rows = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["peak_memory_mb"]
    return (path / "model.safetensors").read_bytes(), rows


# --- the grid


def test_the_grid_is_the_product_and_a_key_of_a_method_is_for_that_alone():
    points = points_of(f"""{BASE}
[local]
momentum = 0.5
lr = 9
[sweep]
"algorithm.name" = ["fedavg", "fedprox"]
"local.lr" = [0.1, 0.2]
"fedprox.mu" = [0.5, 1]
"engine.seed" = [3, 4]
""")
    assert [point.name for point in points] == [
        "fedavg-lr0.1-seed3", "fedavg-lr0.1-seed4", "fedavg-lr0.2-seed3", "fedavg-lr0.2-seed4",
        "fedprox-lr0.1-mu0.5-seed3", "fedprox-lr0.1-mu0.5-seed4", "fedprox-lr0.1-mu1-seed3", "fedprox-lr0.1-mu1-seed4",
        "fedprox-lr0.2-mu0.5-seed3", "fedprox-lr0.2-mu0.5-seed4", "fedprox-lr0.2-mu1-seed3", "fedprox-lr0.2-mu1-seed4",
    ]  # fmt: skip
    configs = [point.config for point in points]
    assert [(c.name, c.local.lr, getattr(c.algorithm, "mu", None), c.engine.seed) for c in configs][::5] == [
        ("fedavg", 0.1, None, 3),
        ("fedprox", 0.1, 0.5, 4),
        ("fedprox", 0.2, 1.0, 3),
    ]
    assert {(c.local.momentum, c.data.clients, c.model.hidden) for c in configs} == {(0.5, 3, (8,))}
    assert points[4].title == "fedprox, lr 0.1, mu 0.5"


def test_one_method_may_stand_in_its_own_table_and_tables_may_be_nested():
    points = points_of(f"""{BASE}
[algorithm]
name = "fedavg"
weighting = "uniform"
[sweep]
algorithm.server.lr = [0.5, 1.0]
local.lr = [0.1, 0.2]
model.hidden = [[8], [8, 4]]
data.name = ["digits"]
""")
    assert [point.name for point in points][:3] == [
        "fedavg-server.lr0.5-local.lr0.1-hidden8",
        "fedavg-server.lr0.5-local.lr0.1-hidden8-4",
        "fedavg-server.lr0.5-local.lr0.2-hidden8",
    ]
    assert [point.config.algorithm.server.lr for point in points] == [0.5] * 4 + [1.0] * 4
    assert {point.config.algorithm.weighting for point in points} == {"uniform"}
    assert points[1].config.model.hidden == (8, 4)


def test_names_are_told_apart_and_fit_a_folder():
    points = points_of(f'{BASE}\n[sweep]\n"algorithm.name" = ["fedavg"]\n"data.root" = ["a/b", "a b", "../a/b"]')
    assert [point.name for point in points] == ["fedavg-roota-b", "fedavg-roota-b-2", "fedavg-root..-a-b"]
    assert all("/" not in point.name and not point.name.startswith(".") for point in points)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"algorithm.name" = ["fedavg", "fedporx"]', "Did you mean 'fedprox'?"),
        ('"algorithm.name" = ["fedavg", "fedprox"]\n"algorithm.mu" = [1]', "algorithm.mu is no setting of fedavg."),
        ('"algorithm.name" = ["fedavg", "fedprox"]\n"algorithm.mu" = [1]', 'write "METHOD.mu"'),
        ('"algorithm.name" = ["fedprox"]\n"fedprox.muu" = [1]', "fedprox.muu is no setting. Did you mean 'fedprox.mu'?"),
        ('"algorithm.name" = ["fedprox"]\n"fedprx.mu" = [1]', "fedprx is no section, and no method of this sweep."),
        ('"algorithm.name" = ["fedavg"]\n"fedprox.mu" = [1]', "fedprox is no section, and no method of this sweep."),
        ('"algorithm.name" = ["fedprox"]\n"local.lrr" = [1]', "Did you mean 'local.lr'?"),
        ('"algorithm.name" = ["fedprox"]\n"fedprox.mu" = [1]\n"algorithm.mu" = [2]', "sets what fedprox.mu sets too"),
        ('"algorithm.name" = ["fedprox"]\n"fedprox.mu" = [0.1, -1]', "algorithm.mu = -1: it should be greater than or equal"),
        ('"algorithm.name" = ["fedprox"]\n"local.lr" = 0.1', "local.lr = 0.1: in [sweep] it should be a list"),
        ('"algorithm.name" = ["fedprox"]\n"local.lr" = []', "local.lr = none: in [sweep] it should be a list"),
        ('"algorithm.name" = [3]', "algorithm.name is no name"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_line(text, said):
    message = refused(f"{BASE}[sweep]\n{text}\n")
    assert said in message
    line = int(re.match(r"mine.toml, line (\d+): ", message)[1])
    assert BASE.count("\n") + 1 <= line <= BASE.count("\n") + 1 + len(text.splitlines())
    if "mu = -1" in said:
        assert line == BASE.count("\n") + 3


def test_a_file_without_a_sweep_is_refused_with_an_example():
    for text in (BASE, f"{BASE}[sweep]\n", f"sweep = 3\n{BASE}"):
        assert '"engine.seed" = [0, 1, 2]' in refused(text)
    assert "give that of a method in [algorithm]" in refused(f'{BASE}[sweep]\n"local.lr" = [0.1]')
    assert "algorithm = 3" in refused(f'algorithm = 3\n{BASE}[sweep]\n"algorithm.name" = ["fedavg"]')


# --- what is checked before run 1


@pytest.mark.parametrize(
    ("key", "values", "code", "said"),
    [
        ("engine.cohort", "[2, 4]", 2, "mine.toml, fedavg-cohort4: engine.cohort = 4 is more than the 3 clients"),
        ("data.clients", "[3, 5000]", 3, "mine.toml, fedavg-clients5000: "),
        ("model.name", '["mlp", "charlstm"]', 2, "mine.toml, fedavg-charlstm: "),
        ("data.name", '["digits", "npz:none.npz"]', 3, "none.npz"),
        ("engine.workers", "[0, 1]", 2, "has a run twice: fedavg-workers0 and fedavg-workers1"),
        ("local.lr", "[0.1, 1e-1]", 2, "has a run twice"),
    ],
)
def test_all_runs_are_checked_before_the_first(call, folder, key, values, code, said):
    path = written(f'{BASE}[sweep]\n"algorithm.name" = ["fedavg"]\n"{key}" = {values}\n')
    found, out, err = call("sweep", path, "--out", "here")
    assert (found, out) == (code, "")
    assert said in err
    assert [each.name for each in folder.iterdir()] == ["mine.toml"]


def test_what_a_method_demands_is_checked_too(call, folder):
    path = written(f'{BASE}[sweep]\n"algorithm.name" = ["fedavg", "fedsparsify"]\n"fedsparsify.first" = [1, 3]\n')
    code, out, err = call("sweep", path, "--out", "here")
    assert (code, out) == (2, "")
    assert "mine.toml, fedsparsify-first3: algorithm.first = 3 leaves no round" in err
    assert not Path("here").exists()


def test_a_folder_of_something_else_is_left_alone(call, folder):
    path = written(SMALL)
    assert call("run", "fedavg", "--data.train_limit", 60, "--engine.rounds", 1, "--out", "a")[0] == 0
    before = tree(Path("a"))
    code, _, err = call("sweep", path, "--out", "a")
    assert code == 2
    assert "is no folder of a sweep" in err
    assert "is no folder of a sweep" in call("sweep", path, "--out", path)[2]
    assert tree(Path("a")) == before
    Path("b").mkdir()
    (Path("b") / "sweep.json").write_text("{}")
    assert call("sweep", path, "--out", "b")[0] == 3


# --- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that was never interrupted."""
    path = tmp_path_factory.mktemp("whole")
    (path / "mine.toml").write_text(SMALL)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert cli.main(["sweep", str(path / "mine.toml"), "--out", str(path / "out")]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return path / "out"


def test_a_sweep_leaves_a_folder_a_point_and_the_tables(whole):
    assert {each.name for each in whole.iterdir()} == {*NAMES, *sweep.FILES}
    configs = {name: (whole / name / "config.toml").read_text() for name in NAMES}
    assert 'name = "fedprox"\nmu = 0.1' in configs["fedprox-seed1"]
    assert [re.search(r"seed = (\d)", text)[1] for text in configs.values()] == ["0", "1", "0", "1"]
    rows = list(csv.DictReader(io.StringIO((whole / "sweep.csv").read_text())))
    assert [(row["algorithm.name"], row["fedprox.mu"], row["runs"], row["diverged"]) for row in rows] == [
        ("fedavg", "", "2", "0"), ("fedprox", "0.1", "2", "0"),
    ]  # fmt: skip
    summaries = [json.loads((whole / name / "summary.json").read_text()) for name in NAMES[:2]]
    a, b = (summary["accuracy"] for summary in summaries)
    assert float(rows[0]["accuracy"]) == pytest.approx((a + b) / 2)
    # two values: standard error |a - b| / 2, t of one degree of freedom 12.706
    assert float(rows[0]["accuracy_high"]) == pytest.approx((a + b) / 2 + 12.7062047 * abs(a - b) / 2)
    assert float(rows[0]["bytes_up"]) == sum(summary["bytes_up"] for summary in summaries) / 2
    page = (whole / "sweep.md").read_text()
    assert all(f"| {name} | done |" in page for name in NAMES)
    assert "| fedprox.mu | 0.1 |" in page


def test_each_line_says_which_run_of_how_many(call):
    code, out, err = call("sweep", written(SMALL))
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "run 1/4  fedavg-seed0"
    assert re.match(r"run 1/4  round 1/3  acc +[\d.]+% density 1.000 up [\d.]+ MB", lines[1])
    assert lines[12] == "run 4/4  fedprox-seed1"
    assert max(map(len, lines[16:-1])) <= 80
    assert re.match(r"table: runs/sweep-mine-\d{8}-\d{6}/sweep.md", lines[-1])
    assert "\x1b" not in out


def test_what_is_complete_is_skipped_what_is_missing_is_run(call, whole):
    path = written(SMALL)
    assert call("sweep", path, "--out", "out")[0] == 0
    complete = tree(Path("out"))
    code, out, _ = call("sweep", path, "--out", "out")
    assert code == 0
    assert out.count("complete already") == 4
    assert " round " not in out
    assert tree(Path("out")) == complete
    more = written(SMALL.replace("[0, 1]", "[2, 1, 0]").replace("[0.1]", "[0.1, 0.5]").replace('"fedavg", ', ""), "more.toml")
    code, _, err = call("sweep", more, "--out", "out")
    assert code == 2
    assert "fedavg-seed0, fedavg-seed1" in err
    assert tree(Path("out")) == complete
    more = written(SMALL.replace("[0, 1]", "[2, 1, 0]").replace("[0.1]", "[0.1, 0.5]"), "more.toml")
    code, out, _ = call("sweep", more, "--out", "out")
    assert code == 0
    assert out.count("complete already") == 4
    runs = tree(Path("out"), *sweep.FILES)
    before = {each: content for each, content in complete.items() if each.name not in sweep.FILES}
    assert {each: runs[each] for each in before} == before
    names = {each.name for each in Path("out").iterdir() if each.is_dir()}
    assert names == {*NAMES, "fedavg-seed2", "fedprox-mu0.1-seed2", *(f"fedprox-mu0.5-seed{n}" for n in range(3))}
    for name in NAMES:
        assert comparable(Path("out") / name) == comparable(whole / name)


def test_a_changed_sweep_or_a_foreign_run_is_refused(call, whole):
    path = written(SMALL)
    assert call("sweep", path, "--out", "out")[0] == 0
    before = tree(Path("out"))
    for text in (SMALL.replace("rounds = 3", "rounds = 4"), SMALL.replace("[0.1]", "[0.2]")):
        code, out, err = call("sweep", written(text, "other.toml"), "--out", "out")
        assert (code, out) == (2, "")
        assert "Points may be added to a sweep" in err
    assert tree(Path("out")) == before
    assert call("sweep", written(SMALL.replace("rounds = 3", "rounds = 3\nworkers = 1"), "other.toml"), "--out", "out")[0] == 0
    config = Path("out/fedavg-seed0/config.toml")
    config.write_text(config.read_text().replace("batch = 32", "batch = 16"))
    assert "holds a run with other settings" in call("sweep", path, "--out", "out")[2]


def test_a_key_may_be_added_where_one_of_its_values_is_what_there_was():
    out, source = Path("out"), written(SMALL)
    sweep.write(out, sweep.opened(out, grid(source), source))
    for key, values in (("local.batch", "[64, 32]"), ("algorithm.server.name", '["adam", "sgd"]')):
        points = sweep.opened(out, points_of(f'{SMALL}"{key}" = {values}\n'), source)
        assert len(points) == 8
        assert set(NAMES) < {point.name for point in points}
        assert {point.config.local.batch for point in points if point.name in NAMES} == {32}
        assert {point.config.algorithm.server.name for point in points if point.name in NAMES} == {"sgd"}
    with pytest.raises(UsageError, match=r"fedavg-seed0, fedavg-seed1, fedprox-seed0, \.\.\."):
        sweep.opened(out, points_of(f'{SMALL}"local.batch" = [64, 16]\n'), source)


LONG = SMALL.replace("rounds = 3", "rounds = 60\ncheckpoint_every = 7")


def test_interrupted_in_the_middle_it_says_how_to_go_on_and_goes_on(call):
    """Ctrl-C in the second run of a process of its own; then the rest, compared with a sweep that was never interrupted."""
    path = written(LONG, "my sweep.toml")
    words = [sys.executable, "-u", "-m", "fedsieve.cli", "sweep", path, "--out", "out", "--pick", "train_loss"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("run 2/4  round 11/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "fedsieve sweep 'my sweep.toml' --out out --pick train_loss"
    assert Path("out/fedavg-seed0/summary.json").is_file()
    assert not Path("out/fedavg-seed1/summary.json").exists()
    assert not Path("out/sweep.csv").exists()
    code, out, _ = call("sweep", path, "--out", "out", "--pick", "train_loss")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "run 1/4  fedavg-seed0: complete already"
    assert lines[1] == "run 2/4  fedavg-seed1"
    assert int(re.match(r"run 2/4  round (\d+)/60", lines[2])[1]) > 11
    assert call("sweep", path, "--out", "again")[0] == 0
    for name in NAMES:
        assert comparable(Path("out") / name) == comparable(Path("again") / name)


def test_killed_at_any_moment_it_goes_on(call):
    path = written(LONG)
    words = [sys.executable, "-u", "-m", "fedsieve.cli", "sweep", path, "--out", "out"]
    for moment in ("run 1/4  fedavg", "run 1/4  round 9/", "run 3/4  fedprox"):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith(moment):
                break
        time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
    assert call("sweep", path, "--out", "out")[0] == 0
    assert call("sweep", path, "--out", "again")[0] == 0
    for name in NAMES:
        assert comparable(Path("out") / name) == comparable(Path("again") / name)


def test_a_run_that_diverges_ends_no_sweep(call):
    path = written(f'{BASE}[sweep]\n"algorithm.name" = ["fedavg"]\n"local.lr" = [1e30, 0.1]\n"engine.seed" = [0, 1]\n')
    code, out, err = call("sweep", path, "--out", "out", "--pick", "train_loss")
    assert code == 0
    assert err.count("diverged: client") == 2
    assert "fedavg, lr 1e+30" in out
    assert "0 (2 diverged)" in out
    assert "picked by least mean train_loss: fedavg, lr 0.1" in out
    assert (Path("out") / "sweep.md").read_text().count("| diverged |") == 2
    code, out, err = call("sweep", path, "--out", "out")
    assert (code, out.count("complete already"), err.count("diverged")) == (0, 2, 2)
    hopeless = written(path.read_text().replace(", 0.1]", "]"), "hopeless.toml")
    code, _, err = call("sweep", hopeless, "--out", "none")
    assert code == 4
    assert "every run of hopeless.toml diverged" in err


# --- the table


def run(accuracy, p10=0.5, up=1_000_000, loss=1.0, seconds=2.0, **row):
    """A run folder as it would be read."""
    rows = [
        {"round": 1, "accuracy": None, "train_loss": 9.0, "client_accuracy": None, "bytes_up": up, "bytes_down": 2 * up},
        {"round": 2, "accuracy": accuracy, "train_loss": loss, "client_accuracy": {"mean": accuracy, "p10": p10}} | row,
    ]
    rows[1] |= {"bytes_up": up, "bytes_down": 2 * up, "seconds": seconds, "density": 1.0}
    return Run(Path("x"), {}, rows, {"status": "done"}, None)


def tallied(title, *runs, diverged=0):
    return tally.Tally(title, {"algorithm.name": title}, runs, diverged)


def test_table_values_by_hand():
    """Accuracies 0.80, 0.90 and 0.85: mean 0.85, standard deviation 0.05, t 4.3027, so ± 4.3027 * 0.05 / sqrt(3) = 0.1242."""
    three = tallied("a", run(0.8, 0.3), run(0.9, 0.6, seconds=3.0), run(0.85, 0.6, seconds=4.0))
    one = tallied("b", run(0.7, up=250_000), diverged=1)
    rows = list(csv.DictReader(io.StringIO(tally.csv([three, one]))))
    assert {key: pytest.approx(float(value), abs=5e-5) for key, value in rows[0].items() if key != "algorithm.name"} == {
        "runs": 3, "diverged": 0, "accuracy": 0.85, "accuracy_low": 0.7258, "accuracy_high": 0.9742,
        "client_accuracy_p10": 0.5, "bytes_up": 2e6, "bytes_down": 4e6, "seconds": 3.0,
    }  # fmt: skip
    assert (rows[1]["accuracy"], rows[1]["accuracy_low"], rows[1]["runs"], rows[1]["diverged"]) == ("0.7", "", "1", "1")
    page = tally.table_markdown([three, one])
    assert "| a | 3 | 85.0 ± 12.4 | 50.0 | 2.00 | 4.00 | 3.00 |" in page
    assert "| b | 1 (1 diverged) | 70.0 ± n/a | 50.0 | 0.500 | 1.00 | 2.00 |" in page
    assert "| c | 0 (2 diverged) | – | – | – | – | – |" in tally.table_markdown([tallied("c", diverged=2)])


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (10, 2.22814), (30, 2.04227),
     (120, 1.97993)],
)  # fmt: skip
def test_quantiles_of_student_are_those_of_the_tables(freedom, expected):
    assert tally.quantile(freedom) == pytest.approx(expected, abs=1e-5)


def test_quantiles_of_student_at_other_levels():
    assert tally.quantile(3, 0.99) == pytest.approx(5.84091, abs=1e-5)
    assert tally.quantile(8, 0.5) == pytest.approx(0.70639, abs=1e-5)


# --- the choice


@pytest.mark.parametrize(
    "key", ["accuracy", "best_accuracy", "client_accuracy", "client_accuracy.p10", "tuned_accuracy.mean", "loss"]
)
def test_a_choice_by_test_examples_is_refused_before_anything_is_run(call, folder, key):
    path = written(SMALL)
    code, out, err = call("sweep", path, "--out", "out", "--pick", key)
    assert (code, out) == (2, "")
    assert "would choose by test examples" in err
    assert "--pick-by-test" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pick", "trainloss"], "Did you mean 'train_loss'?"),
        (["--pick", "client_accuracy", "--pick-by-test"], "there is no such key"),
        (["--pick-by-test"], "goes with --pick KEY"),
    ],
)
def test_a_choice_by_no_key_is_refused(call, folder, words, said):
    code, _, err = call("sweep", written(SMALL), "--out", "out", *words)
    assert code == 2
    assert said in err
    assert not Path("out").exists()


def test_a_choice_by_test_examples_is_marked(call, whole):
    path, out = whole.parent / "mine.toml", whole
    code, said, _ = call("sweep", path, "--out", out, "--pick", "accuracy", "--pick-by-test")
    assert code == 0
    assert "picked by largest mean accuracy: " in said
    assert "PICKED BY TEST EXAMPLES" in said
    assert "PICKED BY TEST EXAMPLES" in (out / "sweep.md").read_text()
    code, said, _ = call("sweep", path, "--out", out, "--pick", "train_loss")
    assert code == 0
    assert "of fedprox: fedprox" in said
    assert "PICKED BY TEST" not in said + (out / "sweep.md").read_text()


def test_a_choice_by_held_out_examples_needs_no_leave(call, folder):
    path = written(SMALL.replace("[data]\n", "[data]\nvalidation = 0.2\n"))
    code, said, _ = call("sweep", path, "--out", "out", "--pick", "accuracy")
    assert code == 0
    assert "picked by largest mean accuracy: " in said
    page = Path("out/sweep.md").read_text()
    assert "on held-out training examples" in page
    assert "PICKED BY TEST" not in said + page


def test_the_best_by_hand():
    a, b = tallied("a", run(0.9, loss=0.3), run(0.5, loss=0.5)), tallied("b", run(0.6, loss=0.1, p10=0.1), run(0.6, loss=0.6))
    c = tallied("c", run(0.99, loss=0.01), diverged=1)
    assert tally.best([a, b, c], "train_loss") == (b, pytest.approx(0.35))
    assert tally.best([a, b, c], "accuracy") == (a, pytest.approx(0.7))
    assert tally.best([b, a, c], "client_accuracy.p10") == (a, pytest.approx(0.5))
    assert tally.best([a, b, c], "bytes_up") == (a, 2e6)
    assert not tally.largest("client_accuracy.std")
    with pytest.raises(UsageError, match="no setting has it"):
        tally.best([a, b, c], "tuned_accuracy.mean")
    assert sweep.choice([replace(b, title="b, lr 1"), c], "train_loss", by_test=True).splitlines() == [
        "picked by least mean train_loss: b, lr 1 (0.35)",
        "of b: b, lr 1 (0.35)",
    ]


# --- the example and the page


def test_the_example_runs_and_its_page_says_what_it_does(call, monkeypatch):
    monkeypatch.setattr(sweep, "grid", lambda path: [shortened(point) for point in grid(path)])
    code, out, err = call("sweep", EXAMPLE, "--out", "out", "--pick", "train_loss")
    assert (code, err) == (0, "")
    assert out.count(": complete") == 0
    assert out.splitlines()[0] == "run 1/24  fedavg-lr0.02-seed0"
    assert len(list(csv.DictReader(io.StringIO(Path("out/sweep.csv").read_text())))) == 8
    page = (EXAMPLE.parent.parent / "docs" / "sweep.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    names = [point.name for point in points_of(block)]
    assert sorted(names) == sorted(point.name for point in grid(EXAMPLE))
    assert "fedprox-mu0.1-lr0.02-seed1" in names
    assert "FedProx has 12 runs, the others 6 each" in page
    assert [sum(name.startswith(method) for name in names) for method in ("fedavg", "fedprox", "scaffold")] == [6, 12, 6]
    columns = set(next(csv.reader(io.StringIO(Path("out/sweep.csv").read_text()))))
    documented = set(re.findall(r"`(\w+)`", page.split("## The table")[1].split("\n\n")[1]))
    assert {column for column in columns if "." not in column} == documented
    listed = set(re.findall(r"`([\w.]+)`", page.split("## Choosing")[1].split("`--pick-by-test`")[0])) - {"train_loss"}
    assert listed - {"client_accuracy.KEY", "tuned_accuracy.KEY"} <= {*tally.TRAINING, *tally.TEST}
    assert {key for key in (*tally.TRAINING, *tally.TEST) if "." not in key} <= listed | {"train_loss"}


def shortened(point):
    config = point.config
    limited = replace(config.data, train_limit=100, test_limit=50), replace(config.engine, rounds=1, eval_every=1)
    return replace(point, config=replace(config, data=limited[0], engine=limited[1], local=replace(config.local, epochs=1)))


def test_the_overview_loads_nothing_heavy_for_a_sweep():
    script = (
        "import sys; from fedsieve import commands, sweep; from fedsieve.report import tally;"
        "assert not {'torch', 'matplotlib', 'sklearn'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
