"""The command line as a user meets it: what it says, what it leaves behind, and how it ends."""

import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from fedsieve import cli
from fedsieve.algorithms.base import names
from fedsieve.catalogue import LISTS
from fedsieve.config import from_file, keys, sections
from fedsieve.engine.folder import fresh

SMALL = ["--data.train_limit", "120", "--data.test_limit", "60", "--data.clients", "3", "--model.hidden", "8"]
SMALL += ["--engine.rounds", "2"]
STATEFUL = ["fedsparsify", "--algorithm.variant", "local", "--algorithm.client_momentum", "kept", "--local.momentum", "0.9"]
LONG = ["--data.clients", "4", "--model.hidden", "8", "--engine.rounds", "40", "--engine.checkpoint_every", "3"]
DATA = Path(os.environ.get("FEDSIEVE_DATA", "/nowhere"))

OWN = '''
"""FedAvg with clipped updates."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsieve import Masks, Message, Params
from fedsieve.aggregate.mean import WeightedMean
from fedsieve.settings import Positive, settings
from fedsieve.wire.sections import dense, number


@dataclass(frozen=True)
class State:
    params: Params
    round: int


@settings
class Clipped:
    """Average updates of bounded length."""

    longest: Positive = 1.0
    """largest L2 norm of an update, > 0"""

    def init(self, job):
        return State(job.start, 0)

    def broadcast(self, state, cohort):
        weights = dense(state.params)
        return dict.fromkeys(cohort, Message("train", state.round + 1, state.params.layout, {"weights": weights}))

    def client_update(self, request, client, mine):
        start = request.dense("weights")
        trained = client.train(start)
        update = trained.params - start
        update = Params(update.layout, update.flat * min(1.0, self.longest / float(update.flat.norm())))
        return request.reply(update=dense(update), examples=number(trained.examples), loss=number(trained.loss)), None

    def read(self, state, reply):
        return reply.dense("update"), float(reply.number("examples"))

    def aggregate(self, state, replies):
        mean = WeightedMean(state.params.layout)
        for _, (update, share) in replies:
            mean.add(update, share)
        return State(state.params + mean.value(), state.round + 1)

    def finalize(self, state):
        return state.params, Masks.full(state.params.layout)


def blobs():
    """Two clouds of points."""
    import numpy as np

    from fedsieve import from_arrays

    labels = np.arange(200) % 2
    points = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32) + 3 * labels[:, None]
    return from_arrays(points[:150], labels[:150], points[150:], labels[150:], name="blobs")


def net(shape, classes):
    """A linear model."""
    return torch.nn.Linear(shape[0], classes)


def narrow(shape, classes):
    """A model that fits no data here."""
    return torch.nn.Linear(3, classes)
'''


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
    sys.modules.pop("mymethod", None)


@pytest.fixture
def call(capsys):
    """Run a command in this process; return its exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(call):
    """Run a command that must fail; return the message after checking its form."""

    def run(code, *words, lines=8):
        found, out, err = call(*words)
        assert (found, out) == (code, ""), err
        assert err.startswith("fedsieve: ")
        assert "Traceback" not in err
        assert len(err.splitlines()) <= lines
        return err

    return run


def start(*words, **options):
    """Start a command in a process of its own."""
    command = [sys.executable, "-u", "-m", "fedsieve.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def result(path):
    """What a run came to, without what differs between two equal runs."""
    rows = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["peak_memory_mb"]
    return sha256((path / "model.safetensors").read_bytes()).hexdigest(), rows


def tree(path):
    return {each: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


# --- overview, help, lists


def test_overview_needs_neither_torch_nor_numpy_nor_pydantic():
    script = (
        "import sys; from fedsieve.cli import main; assert main(['--help']) == 0;"
        "assert not {'torch', 'numpy', 'pydantic', 'tyro', 'rich'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "fedsieve run" in done.stdout
    assert not done.stderr


def test_overview_names_every_command_and_exit_code(call):
    code, out, _ = call()
    assert code == 0
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert all(f"{number} " in out for number in (0, 1, 2, 3, 4, 130, 143, 141))
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", names())
def test_help_of_a_method_shows_every_key_with_its_default(call, name):
    code, out, _ = call("run", name, "--help")
    assert code == 0
    assert out.index("fedsieve run fedsparsify --data digits") < out.index("--out")
    for key in keys(sections(name)):
        assert f"--{key} " in out
    assert out.count("(default:") >= len(keys(sections(name)))
    assert all(f"{section} options" in out for section in sections(name))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", ["sweep", "resume", "report", "compare", "inspect", "audit", "list", "export", "demo"])
def test_help_of_a_command_has_an_example(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"fedsieve {name}" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("what", LISTS)
def test_lists_parse_as_json_and_fit_the_terminal(call, what):
    code, out, err = call("list", what, "--json")
    found = json.loads(out)
    assert (code, err, found["version"]) == (0, "", 1)
    assert all(entry["name"] and entry["title"] for entry in found[what])
    code, out, _ = call("list", what)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for entry in found[what]:
        assert re.search(rf"^{re.escape(entry['name'])} ", out, re.MULTILINE)


# --- misspelt names and values out of range


@pytest.mark.parametrize("name", names())
def test_misspelt_option_is_answered_with_the_right_one(refused, folder, name):
    chance = random.Random(name)
    for key in keys(sections(name)):
        place = chance.randrange(key.rindex(".") + 1, len(key))
        for wrong in {key[:place] + key[place] + key[place:], key[:place] + "q" + key[place + 1 :]}:
            for words in ([f"--{wrong}", "1"], [f"--{wrong}=1"]):
                assert f"Did you mean '--{key}'?" in refused(2, "run", name, *words, lines=6), wrong
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rn fedavg", "'run'"),
        ("run fedavgg", "'fedavg'"),
        ("run fedavg --data digit", "'digits'"),
        ("run fedavg --model mpl", "'mlp'"),
        ("run fedavg --data.partition dirichlt", "'dirichlet'"),
        ("run fedavg --engin.rounds 3", "'--engine.rounds'"),
        ("run fedavg --engine.round 3", "'--engine.rounds'"),
        ("run fedavg --eng.rounds 3", "'--engine.rounds'"),
        ("run fedavg --seeed 3", "no option '--seeed'"),
        ("list modles", "'models'"),
        ("list models --jsn", "'--json'"),
        ("demo --round 3", "'--rounds'"),
        ("resume x --worker 3", "'--workers'"),
        ("run", "which algorithm?"),
        ("run fedavg stray", "'stray'"),
        ("run fedavg --engine.rounds", "needs a value"),
        ("run fedavg --engine.rounds 3 4", "'4'"),
        ("list", "which list"),
        ("report", "run folder"),
        ("compare", "which runs?"),
        ("run none.toml", "none.toml cannot be read"),
        ("run mymodule:Thing", "No module named 'mymodule'"),
        ("run :Thing", "cannot be loaded"),
        ("run fedavg --data mymodule:thing", "mymodule"),
        ("run fedavg --model mymodule:thing", "mymodule"),
    ],
)
def test_misspelt_name_is_answered_with_the_right_one(refused, folder, words, said):
    assert said in refused(2, *words.split(), lines=6)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, "fedsparsify --algorithm.density 1.5", "algorithm.density = 1.5: it should be less than or equal to 1."),
        (2, "fedavg --local.lr -1", "local.lr = -1: it should be greater than 0."),
        (2, "fedavg --algorithm.server.lr 0", "algorithm.server.lr = 0: "),
        (2, "fedavg --data.clients 0", ">= 1"),
        (2, "fedavg --engine.rounds 2.5", "engine.rounds = 2.5: "),
        (2, "fedavg --engine.cohort 11", "engine.cohort = 11"),
        (2, "fedavg --engine.workers 1 --local.device cuda", "engine.workers = 0"),
        (2, "fedavg --model cnn6 --data heart-disease", "takes images|there is no"),
        (2, "fedavg --model charlstm", "charlstm"),
        (2, "fedavg --model.dense fc", "fc1.bias"),
        (2, "fedsparsify --engine.rounds 1", "engine.rounds = 1"),
        (3, "fedavg --data.clients 5000", "data.clients"),
        (3, "fedavg --data mnist --data.root .", "mnist.npz"),
        (3, "fedavg --data npz:none.npz", "none.npz"),
        (3, "fedavg --data.partition natural", "natural"),
    ],
)
def test_setting_that_cannot_be_is_refused_before_a_folder_is_made(refused, folder, code, words, said):
    if "heart-disease" in words and not DATA.is_dir():
        code = 3
    assert re.search(said.replace("(", r"\("), refused(code, "run", *words.split()))
    assert not any(folder.iterdir())


def test_demo_is_refused_before_it_trains(refused, folder):
    assert "2 or more" in refused(2, "demo", "--rounds", "1")
    assert not any(folder.iterdir())


def test_damaged_data_file_is_refused(refused, folder):
    (folder / "mnist.npz").write_bytes(b"PK\x03\x04 not really")
    assert "mnist.npz" in refused(3, "run", "fedavg", "--data", "mnist", "--data.root", ".")
    assert [each.name for each in folder.iterdir()] == ["mnist.npz"]


def test_place_that_cannot_be_written_is_an_error_not_a_crash(refused, folder):
    (folder / "file").write_text("here")
    assert "file" in refused(2, "run", "fedavg", *SMALL, "--out", "file/run")
    assert (folder / "file").read_text() == "here"


def test_debug_shows_the_traceback_and_keeps_the_exit_code(call):
    code, out, err = call("run", "fedavgg", "--debug")
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert "Did you mean 'fedavg'?" in err.splitlines()[-1]


def test_loss_that_is_not_finite_ends_with_4_a_checkpoint_and_advice(call):
    code, _, err = call("run", "fedavg", *SMALL, "--local.lr", "1e30", "--engine.rounds", "9", "--out", "wild")
    assert code == 4
    assert "smaller local.lr" in err
    assert len(err.splitlines()) <= 8
    assert Path("wild/checkpoint/latest.safetensors").is_file()


# --- runs


def test_run_without_a_terminal_says_one_line_a_round_then_the_summary(call):
    code, out, err = call("run", "fedsparsify", *SMALL, "--seed", "3", "--data", "digits", "--model", "mlp", "--out", "here")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert [re.match(r"round (\d)/2  acc +\d", line)[1] for line in lines[:-12]] == ["1", "2"]
    assert all("density" in line and " up " in line and " down " in line for line in lines[:-12])
    said = {line.split("  ")[0].strip() for line in lines[-12:-2]}
    assert said >= {"method", "rounds", "accuracy %", "density", "MB up", "MB down", "seconds", "folder"}
    assert "seed 3" in out
    assert lines[-1] == "next: fedsieve export here"
    config = from_file(Path("here/config.toml"))
    assert (config.engine.seed, config.data.train_limit) == (3, 120)


def test_equal_runs_are_equal_and_never_share_a_folder(call, refused, folder):
    for _ in range(2):
        assert call("run", "fedavg", *SMALL)[0] == 0
    first, second = sorted((folder / "runs").iterdir())
    assert result(first) == result(second)
    before = tree(first)
    assert "never overwritten" in refused(2, "run", "fedavg", *SMALL, "--out", first)
    assert tree(first) == before
    assert call("run", first / "config.toml", "--out", "again")[0] == 0
    assert result(folder / "again") == result(first)
    assert (folder / "again" / "config.toml").read_text() == (first / "config.toml").read_text()


def test_folder_names_are_fresh(folder):
    first = fresh("x", folder)
    first.mkdir()
    assert fresh("x", folder) != first


def test_compare_report_export_and_resume_of_finished_runs(call, refused):
    assert call("run", "fedavg", *SMALL, "--out", "a")[0] == 0
    assert call("run", "a/config.toml", "--local.lr", "0.05", "--out", "b")[0] == 0
    code, out, _ = call("compare", "a", "b")
    assert code == 0
    assert out.splitlines()[0] == "local.lr: 0.1 | 0.05"
    assert max(map(len, out.splitlines())) <= 80
    assert Path("compare.html").is_file()
    assert call("compare", "a", "a")[1].splitlines()[0] == "the settings are equal"
    assert call("report", "a")[:2] == (0, "a/report.html\n")
    assert call("export", "a")[0] == 0
    assert Path("a/export/packed.safetensors").stat().st_size > 0
    assert "complete already" in call("resume", "a")[1]
    for command in ("compare", "report", "inspect", "audit", "export", "resume"):
        assert "nowhere" in refused(2, command, "nowhere")


@pytest.mark.parametrize("name", names())
def test_every_method_runs(call, name):
    moves = ["--algorithm.every", "1"]  # within two rounds
    own = {"feddst": moves, "fedtiny": [*moves, "--algorithm.selection", "loss"]}  # a perceptron has no BatchNorm to choose by
    assert call("run", name, *SMALL, *own.get(name, []), "--out", "run")[0] == 0
    assert result(Path("run"))[1][-1]["round"] == 2


SETS = {
    "digits": "mlp", "mnist": "lenet", "fashion-mnist": "cnn", "cifar10": "resnet8", "spoken-digits": "lenet",
    "shakespeare": "charlstm", "wisdm": "tabular", "heart-disease": "tabular",
}  # fmt: skip


@pytest.mark.parametrize("name", [entry["name"] for entry in LISTS["datasets"]()])
def test_every_data_set_runs(call, name):
    limits = ["--data.train_limit", "60", "--data.test_limit", "30", "--data.clients", "2", "--engine.rounds", "1"]
    code, _, err = call("run", "fedavg", "--data", name, "--model", SETS[name], *limits, "--out", "run")
    if code == 3 and "there is no" in err:
        pytest.skip(f"{name} is not on this machine")
    assert code == 0, err


@pytest.mark.parametrize("model", ["lenet", "cnn6", "resnet8", "tabular"])
def test_small_models_run(call, model):
    limits = ["--data.train_limit", "30", "--data.test_limit", "30", "--data.clients", "2", "--engine.rounds", "1"]
    code, _, err = call("run", "fedavg", "--model", model, *limits, "--out", "run")
    if model in ("lenet", "tabular"):  # 8x8 images are too small for the one and no features for the other
        assert code == 2
        assert model in err
    else:
        assert code == 0, err


def test_own_method_data_and_model_are_found_in_the_current_folder(call, refused, folder):
    (folder / "mymethod.py").write_text(OWN)
    code, out, _ = call("run", "mymethod:Clipped", "--help")
    assert code == 0
    assert "--algorithm.longest FLOAT" in out
    assert "largest L2 norm of an update, > 0" in out
    assert "'--algorithm.longest'" in refused(2, "run", "mymethod:Clipped", "--algorithm.longst", "1")
    assert "algorithm.longest = 0: " in refused(2, "run", "mymethod:Clipped", "--algorithm.longest", "0")
    words = ["--data", "mymethod:blobs", "--data.clients", "3", "--engine.rounds", "3", "--algorithm.longest", "0.5"]
    assert "does not run" in refused(2, "run", "mymethod:Clipped", *words, "--model", "mymethod:narrow")
    code, out, err = call("run", "mymethod:Clipped", *words, "--model", "mymethod:net", "--out", "own")
    assert (code, err) == (0, "")
    text = (folder / "own" / "config.toml").read_text()
    assert 'name = "mymethod:Clipped"\nlongest = 0.5' in text
    (folder / "own" / "summary.json").unlink()
    assert call("resume", "own", "--workers", "1")[0] == 0
    assert call("run", "own/config.toml", "--out", "again")[0] == 0
    assert result(folder / "again") == result(folder / "own")


# --- interrupted and resumed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A long run of a method whose clients keep a state, never interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert cli.main(["run", *STATEFUL, *LONG, "--out", str(path)]) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return result(path)


def wait_for_round(process, number):
    for line in process.stdout:
        if line.startswith(f"round {number}/"):
            return
    raise AssertionError(process.stderr.read())


def alive(group):
    """Processes of a group that are not yet reaped zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(path.parent.name)
    return found


def gone(group, seconds):
    deadline = time.monotonic() + seconds
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(group)


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2)]
)
def test_interrupted_run_says_how_to_go_on_and_goes_on_as_if_never_stopped(call, whole, number, workers):
    process = start("run", *STATEFUL, *LONG, "--engine.workers", workers, "--out", "run", start_new_session=True)
    wait_for_round(process, 5)
    began = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == "fedsieve resume run"
    assert len(err.splitlines()) <= 8
    assert gone(process.pid, 2)
    code, out, _ = call("resume", "run")
    assert code == 0
    assert result(Path("run")) == whole
    assert int(re.match(r"round (\d+)/", out)[1]) > 5
    total = sum(row["bytes_up"] for row in whole[1])
    assert f"up {total / 1e6:.2f} MB" in out.splitlines()[-13]


def test_clients_forget_what_they_did_in_a_round_that_was_dropped(call, whole, monkeypatch):
    from fedsieve.engine.transports import Sequential
    from fedsieve.errors import Interrupted

    exchange, calls = Sequential.exchange, iter(range(1000))

    def stop(self, requests):
        number = next(calls)  # two exchanges a round: training and evaluation
        for place, item in enumerate(exchange(self, requests)):
            if (number, place) == (6, 2):
                raise Interrupted(signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(Sequential, "exchange", stop)
        code, out, _ = call("run", *STATEFUL, *LONG, "--out", "run")
    assert (code, len(out.splitlines())) == (143, 3)
    assert call("resume", "run")[0] == 0
    assert result(Path("run")) == whole


@pytest.mark.parametrize(("workers", "after"), [(0, 1), (0, 8), (2, 5)])
def test_killed_run_resumes_as_if_never_stopped(call, whole, workers, after):
    process = start("run", *STATEFUL, *LONG, "--engine.workers", workers, "--out", "run", start_new_session=True)
    wait_for_round(process, after)
    time.sleep(random.Random(after).random() / 50)
    process.kill()
    process.communicate(timeout=60)
    assert gone(process.pid, 10)
    assert not Path("run/summary.json").exists()
    assert call("resume", "run")[0] == 0
    assert result(Path("run")) == whole


def test_run_killed_at_twenty_random_moments_ends_as_if_never_stopped(whole):
    """One run after another, each killed and resumed until it ends; a warm process forks the command to be killed."""
    script = """
import os, random, signal, sys, time
import torch
from fedsieve import cli, commands, fit

torch.set_num_threads(1)
moments, kills, runs = random.Random(0), 0, 0
while kills < 20 or os.path.exists(f"{runs}/config.toml"):
    pid = os.fork()
    if not pid:
        resume = ["resume", str(runs)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main(resume if os.path.exists(f"{runs}/config.toml") else ["run", *sys.argv[1:], "--out", str(runs)]))
    if kills < 20:
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    kills += os.WIFSIGNALED(status)
    if not status:
        runs += 1
    elif not os.WIFSIGNALED(status):
        sys.exit(f"run {runs} ended with {status} after {kills} kills")
print(kills, runs)
"""
    done = subprocess.run([sys.executable, "-c", script, *STATEFUL, *LONG], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    kills, runs = map(int, done.stdout.split())
    assert kills == 20
    assert 1 <= runs < 20
    for number in range(runs):
        assert result(Path(str(number))) == whole


def test_second_signal_stops_at_once():
    script = (
        "import os, signal, time\nfrom fedsieve import cli, commands\nfrom fedsieve.errors import Interrupted\n"
        "def stubborn(words):\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
        "    except Interrupted:\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(60)\n"
        "commands.run_command = stubborn\ncli.main(['run'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""


@pytest.fixture
def interrupted(call, monkeypatch):
    """A run that stopped after its first round."""
    from fedsieve import progress
    from fedsieve.errors import Interrupted

    show = progress.Watch.__call__

    def stop(self, row):
        show(self, row)
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Watch, "__call__", stop)
        code, _, err = call("run", "fedsparsify", *SMALL, "--out", "run here")
    assert code == 130
    assert err.splitlines()[-1] == "fedsieve resume 'run here'"
    return Path("run here")


def test_checkpoint_of_another_config_is_refused(call, refused, interrupted):
    config = interrupted / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("epochs = 1", "epochs = 2", 1))
    before = tree(interrupted)
    assert "belongs to another config" in refused(2, "resume", interrupted)
    config.write_text(text.replace("epochs = 1", "epochs = 0", 1))
    assert re.search(r"config.toml, line \d+: local.epochs = 0: ", refused(2, "resume", interrupted))
    config.write_text(text.replace("epochs = 1", "epochs = 2", 1))
    assert tree(interrupted) == before
    config.write_text(text)
    assert "engine.workers = -1" in refused(2, "resume", interrupted, "--workers", "-1")
    assert call("resume", interrupted, "--workers", "1")[0] == 0


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-4]])
def test_damaged_checkpoint_is_refused(refused, interrupted, damage):
    path = interrupted / "checkpoint" / "latest.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "cannot be read" in refused(3, "resume", interrupted)


# --- pipes and terminals


def terminal(*words, columns=80, **environment):
    """Run a command under a pseudo-terminal; return its exit code and all that it wrote."""
    process, terminal = pty.fork()
    if not process:
        os.environ.update(environment, TERM="xterm")
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "-m", "fedsieve.cli", *words])
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), written.decode()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("columns", [80, 46])
def test_live_line_on_a_terminal_has_all_six(columns):
    code, said = terminal("run", "fedsparsify", *SMALL, "--engine.rounds", "6", "--out", "run", columns=columns, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[(3[0-7]|9[0-7]|38)", said)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n")
    assert max(map(len, plain.splitlines())) <= columns
    live = " ".join(plain.split())
    assert re.search(r"round 6/6 ━+ [\d:-]+ acc +[\d.]+% density 0\.\d+ up [\d.]+ MB down [\d.]+ MB", live)
    assert live.endswith("next: fedsieve export run")


def test_reader_that_leaves_ends_the_command_quietly():
    process = start("run", "fedavg", *SMALL, "--engine.rounds", "2000", "--out", "run")
    wait_for_round(process, 1)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()
    shutil.rmtree("run")
