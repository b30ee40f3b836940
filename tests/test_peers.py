"""The bench against other simulators, without them: the job file, processes and their memory, figures, missing environments."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from fedsieve import Engine, FedAvg, FedsieveError, Local, Model, UsageError, build, fit
from fedsieve.bench.peers import __main__ as peers
from fedsieve.bench.peers import environments, job
from fedsieve.bench.peers.tree import Tree, memory
from fedsieve.bench.rounds import BATCH, EVERY, LR, Task

ROUNDS = EVERY + 5


@pytest.fixture
def task():
    return Task("tiny", Model(name="mlp", hidden=(200, 200)), 6, 2, 5, 1.0)


@pytest.fixture
def path(task, digits, tmp_path):
    job.write(task, digits, ROUNDS, tmp_path / "tiny.npz")
    return tmp_path / "tiny.npz"


def test_the_job_file_holds_what_fedsieve_itself_would_use(path, digits, task):
    seen = []
    with np.load(path) as file:
        parts = np.split(file["order"], np.cumsum(file["sizes"])[:-1])
        for mine, theirs in zip(parts, digits.parts, strict=True):
            batch = next(digits.train.epoch(theirs, len(theirs)))
            assert np.array_equal(file["x_train"][mine], batch[0].numpy())
            assert np.array_equal(file["y_train"][mine], batch[1].numpy())
        assert np.array_equal(file["y_test"], digits.test.y.numpy())
        cohorts = file["cohorts"]
        assert json.loads(str(file["settings"])) | {"processes": 0} == {
            "model": "mlp",
            "clients": 6,
            "cohort": 2,
            "rounds": ROUNDS,
            "lr": LR,
            "batch": BATCH,
            "every": EVERY,
            "processes": 0,
            "mean": list(digits.train.mean),
            "std": list(digits.train.std),
        }
        assert np.array_equal(file["bytes_train"], digits.train.x.numpy())
        assert np.array_equal(file["bytes_test"], digits.test.x.numpy())

    class Watched(FedAvg):
        def broadcast(self, state, cohort):
            seen.append(list(cohort))
            return super().broadcast(state, cohort)

    fit(Watched(), model=build(task.model, digits.shape, 10), data=digits, engine=Engine(rounds=3, cohort=2))
    assert seen == cohorts[:3].tolist()


def test_fedsieves_driver_plays_the_job_as_fedsieve_does(path, digits, task, tmp_path):
    scratch = tmp_path / "run"
    scratch.mkdir()
    row = peers.run(peers.Peer(peers.OURS), Path(sys.executable), path, scratch, 120)
    engine = Engine(rounds=ROUNDS, cohort=2, eval_every=EVERY, eval_clients=0)
    spec = build(task.model, digits.shape, 10)
    expected = fit(FedAvg(), model=spec, data=digits, local=Local(lr=LR, batch=BATCH), engine=engine)
    assert row["accuracies"] == {str(each["round"]): each["accuracy"] for each in expected.rows if each["accuracy"] is not None}
    assert row["accuracy"] == expected.accuracy
    assert len(row["seconds"]) == ROUNDS
    assert row["rounds_per_second"] == pytest.approx(1 / np.mean(row["seconds"][EVERY:]))
    assert 0 < row["startup_seconds"] < row["seconds"][0]
    assert row["peak_bytes"] > 50e6
    assert row["setting"] == f"{min(2, os.cpu_count())} workers, fp32"


def test_a_driver_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(FedsieveError, match=r"exit code 1: .*nowhere\.npz"):
        peers.run(peers.Peer(peers.OURS), Path(sys.executable), tmp_path / "nowhere.npz", tmp_path, 120)


def test_a_driver_that_takes_too_long_is_ended(path, tmp_path):
    with Tree() as tree:
        with pytest.raises(FedsieveError, match=r"exit code none after 0 s"):
            peers.run(peers.Peer(peers.OURS), Path(sys.executable), path, tmp_path, 0.3)
        assert tree.processes() == []


HOLD = "import time; held = bytes(range(256)) * (400 * 1024); print('here', flush=True); time.sleep(60)"


def started(tree, code):
    """Start Python with some code; return it when it has printed a line, and that line."""
    process = tree.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process.stdout:
        return process, process.stdout.readline()


def test_memory_is_that_of_all_processes_and_pages_they_share_count_once(monkeypatch):
    monkeypatch.setattr("fedsieve.bench.peers.tree.INTERVAL", 0.05)
    forked = HOLD.replace("print", "os.fork() and print").replace("import time", "import os, time")
    for code, count in ((HOLD, 1), (forked, 2)):
        with Tree() as tree:
            process, _ = started(tree, code)
            time.sleep(1)
            assert len(tree.processes()) == count
        assert 104e6 < tree.peak < 150e6
        assert process.wait() in (-signal.SIGTERM, 0)


def test_processes_whose_parent_has_ended_are_found_and_ended():
    inner = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    daemon = f"import subprocess, sys; print(subprocess.Popen({inner}, start_new_session=True).pid)"
    with Tree() as tree:
        process, line = started(tree, daemon)
        process.wait(10)
        orphan = int(line)
        assert tree.processes() == [orphan]
        assert memory(orphan) > 1e6
    assert memory(orphan) == 0
    assert not Path(f"/proc/{orphan}").exists()


def test_processes_that_refuse_to_end_are_killed(monkeypatch):
    monkeypatch.setattr("fedsieve.bench.peers.tree.PATIENCE", 0.3)
    with Tree() as tree:
        process, _ = started(tree, f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {HOLD}")
    assert not Path(f"/proc/{process.pid}").exists()


def test_the_rate_counts_whole_periods_after_the_first_rounds_and_start_up_all_before():
    ends = [10.0, 11, 12, 13, 15, 16, 17, 18, 19, 21]
    record = {"ends": ends, "accuracy": {"5": 0.4, "10": 0.6}, "version": "1", "torch": "2", "setting": "s"}
    row = peers.figures(record, began=3.0)
    assert row["rounds_per_second"] == pytest.approx(5 / 6)
    assert row["startup_seconds"] == pytest.approx(7 - 6 / 5)
    assert row["accuracy"] == 0.6
    assert row["seconds"] == [7, 1, 1, 1, 2, 1, 1, 1, 1, 2]


def rows_of(peer, *speeds, job="J1"):
    return [
        {"job": job, "peer": peer, "rounds_per_second": s, "startup_seconds": 1, "peak_bytes": 2, "accuracy": 0.5}
        for s in speeds
    ]


def test_the_ratio_is_of_medians_and_against_the_fastest_peer():
    rows = [*rows_of("fedsieve", 4, 6, 50), *rows_of("pfl", 3, 2, 100), *rows_of("fluke", 2, 2, 2)]
    rows += [*rows_of("fedsieve", 5, job="J2"), {"job": "J2", "peer": "pfl", "error": "x"}, *rows_of("fluke", 4, job="J2")]
    rows += [*rows_of("fedsieve", 5, job="J3"), {"job": "J3", "peer": "pfl", "error": "x"}]
    middle = peers.medians(rows)
    assert peers.best(middle) == {"J1": "pfl", "J2": "fluke"}
    assert peers.ratios(middle) == {"J1": 2.0, "J2": 1.25}
    lines = peers.table(rows).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:5]] == ["J1", "pfl", "3.000", "2.00"]
    assert [cell.strip() for cell in lines[-1].split("|")[1:4]] == ["J3", "pfl", "failed"]


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A folder of lists in place of the peers' own."""
    lists = tmp_path / "lists"
    lists.mkdir()
    monkeypatch.setattr(environments, "DRIVERS", lists)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return lists


def test_an_environment_is_used_again_if_its_list_is_the_same_and_one_that_cannot_be_built_says_why(pinned, tmp_path):
    (pinned / "pfl.txt").write_text("torch==2.13.0\n")
    place = tmp_path / "envs" / "pfl"
    place.mkdir(parents=True)
    (place / "built-from.txt").write_text("torch==2.13.0\n")
    assert environments.prepare("pfl", tmp_path / "envs") == place / "bin" / "python"
    (pinned / "pfl.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    with pytest.raises(UsageError, match=r"envs/pfl cannot be built from pfl\.txt: ERROR: .*torch"):
        environments.prepare("pfl", tmp_path / "envs")
    assert not (place / "built-from.txt").exists()


@pytest.mark.parametrize("name", ["flower", "pfl", "fluke"])
def test_the_lists_pin_every_package(name):
    lines = (environments.DRIVERS / f"{name}.txt").read_text().splitlines()
    names = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert names["torch"] == "2.13.0"
    assert {"flower": "flwr", "pfl": "pfl", "fluke": "fluke-fl"}[name] in names


def test_a_missing_environment_is_a_row_with_the_reason_and_the_rest_goes_on(task, digits, tmp_path, monkeypatch, capsys):
    def missing(name, folder):
        raise UsageError(f"{name} cannot be had")

    monkeypatch.setattr(peers, "prepare", missing)
    monkeypatch.setattr(peers, "load", lambda settings: None)
    monkeypatch.setattr(peers, "federate", lambda *_: digits)
    options = Namespace(folder=tmp_path, rounds=5, repetitions=2, limit=120)
    rows = peers.measure([task], [peers.Peer("pfl")], options)
    assert [(row["peer"], row["repetition"], row.get("error")) for row in rows] == [
        ("fedsieve", 1, None),
        ("pfl", 1, "pfl cannot be had"),
        ("fedsieve", 2, None),
    ]
    assert "tiny 1  pfl            failed: pfl cannot be had" in capsys.readouterr().out


def test_an_interrupted_bench_leaves_no_process(tmp_path):
    """A run in a process of its own is stopped while fedsieve's driver and its workers are at it."""
    code = (
        "import sys\nfrom fedsieve.bench.peers import __main__ as peers\nfrom fedsieve import Data, Streams, federate, load\n"
        "settings = Data(name='digits', clients=12)\ndata = federate(load(settings), settings, Streams(0))\n"
        "peers.load, peers.federate = (lambda _: None), (lambda *_: data)\n"
        "def prepare(name, folder): raise peers.UsageError('not asked for')\npeers.prepare = prepare\n"
        "sys.exit(peers.main(['--jobs', 'J2', '--peers', 'pfl', '--rounds', '5000']))"
    )
    with Tree() as tree:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(tree.processes()) < 4 and time.monotonic() < deadline:  # the bench, the driver, two workers
            time.sleep(0.1)
        assert len(tree.processes()) >= 4
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert tree.processes() == []


@pytest.mark.parametrize("words", [["--rounds", "7"], ["--repetitions", "0"], ["--jobs", "J9"], ["--peers", "nobody"]])
def test_options_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        peers.main(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
