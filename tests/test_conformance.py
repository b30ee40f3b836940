"""What every algorithm promises. Algorithms are found by listing the folder, their variants by their Literal settings."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import tomli_w
import torch

from conftest import same
from fedsieve import Engine, Local, Message, Model, Streams, build, fit, pack, unpack
from fedsieve.algorithms.base import Job, find, names
from fedsieve.config import Config
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.handle import Device, Plan, handle
from fedsieve.engine.transports import Sequential
from fedsieve.local.executor import Executor

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = Local(epochs=1, batch=16, lr=0.1, momentum=0.5)
ROUNDS = 5


def variants():
    """Every algorithm with its defaults, and once for every other choice that it offers."""
    for name in names():
        cls = find(name)
        known = {field.name for field in fields(cls)}
        wanted = {"density": 0.2} if "density" in known else {}
        wanted |= {"every": 2} if {"every", "stop"} <= known else {}  # masks that move do so within the rounds of a test
        yield pytest.param(name, cls(**wanted), id=name)
        hints = get_type_hints(cls, include_extras=False)
        for field in fields(cls):
            choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
            for choice in choices:
                if choice != getattr(cls(), field.name):
                    extra = {"variant": "local"} if field.name in ("vote",) else {}
                    yield pytest.param(name, cls(**wanted, **extra, **{field.name: choice}), id=f"{name}-{field.name}-{choice}")


every = pytest.mark.parametrize(("name", "algorithm"), list(variants()))


def engine(**settings):
    return Engine(**{"rounds": ROUNDS, "cohort": 4, "seed": 3, "dropout": 0.2, "eval_clients": 3} | settings)


def comparable(result):
    """Everything of a result that must repeat."""
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "peak_memory_mb")} for row in result.rows]
    return json.dumps(rows, sort_keys=True), result.params.flat.numpy().tobytes(), result.masks.kept.numpy().tobytes()


NORMALISED, PLAIN = Model(name="conftest:normalised"), Model(name="mlp", hidden=(16,))


def network(algorithm):
    """The settings of a network that a method takes: one with BatchNorm if it needs that, else a small perceptron."""
    return NORMALISED if getattr(algorithm, "needs_statistics", False) else PLAIN


@pytest.fixture
def small(request, digits):
    """A network for the method of the test."""
    algorithm = request.getfixturevalue("algorithm") if "algorithm" in request.fixturenames else None
    return build(network(algorithm), digits.shape, digits.classes)


def start(small):
    return small.initial("glorot", Streams(3))


def untrained(algorithm, digits, small):
    """Loss before round 1 of a method that learns masks over weights of its own: 40 examples a client teach little."""
    if not getattr(algorithm, "own_start", False):
        return 0.0
    params, masks = algorithm.finalize(algorithm.init(Job(small, start(small), ROUNDS, 6, Streams(3), 4)))
    everything = np.arange(len(digits.test.y))
    return Executor(small, LOCAL, ROUNDS).evaluate(params, digits.test, everything, masks).mean_loss


@every
def test_settings_are_frozen_and_described(name, algorithm):
    for field in fields(algorithm):
        with pytest.raises(AttributeError):
            setattr(algorithm, field.name, None)
        assert type(algorithm).__pydantic_fields__[field.name].description, field.name


@every
def test_steps_are_pure(name, algorithm, digits, small):
    """A step given the same arguments returns the same, and leaves its arguments as they were."""
    job = Job(small, start(small), ROUNDS, 6, Streams(3))
    module = type(algorithm).__module__
    state, mine = algorithm.init(job), {}
    device = Device(Plan(algorithm, small, digits, LOCAL, ROUNDS, 3))
    for _ in range(3):
        before = freeze(state)
        messages = [algorithm.broadcast(state, [0, 2, 5]) for _ in range(2)]
        packed = [{client: pack(message) for client, message in each.items()} for each in messages]
        assert packed[0] == packed[1]
        asked = list(packed[0])
        if all(message.kind == "train" for message in messages[0].values()):
            assert asked == [0, 2, 5]
        else:  # before training a method may ask some of the cohort only
            assert asked
            assert asked == sorted({0, 2, 5}.intersection(asked))
        replies = {}
        for client, payload in packed[0].items():
            own = mine.get(client)
            once, again = (handle(device, client, payload, own) for _ in range(2))
            assert once == again
            replies[client], mine[client] = once
            if mine[client] is None:
                del mine[client]
        contents = [(client, algorithm.read(state, unpack(reply, small.layout))) for client, reply in replies.items()]
        states = [algorithm.aggregate(state, iter(contents)) for _ in range(2)]
        assert freeze(states[0]) == freeze(states[1])
        assert freeze(state) == before
        finals = [algorithm.finalize(states[0]) for _ in range(2)]
        assert same(finals[0][0].flat, finals[1][0].flat)
        state = thaw(freeze(states[0]), small.layout, module)
        assert freeze(state) == freeze(states[0])


@every
def test_runs_repeat_and_learn_within_their_density(name, algorithm, digits, small):
    runs = [fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine(), start=start(small)) for _ in range(2)]
    assert comparable(runs[0]) == comparable(runs[1])
    other = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine(seed=4), start=start(small))
    assert comparable(other) != comparable(runs[0])
    result = runs[0]
    assert result.rows[-1]["loss"] < max(result.rows[0]["loss"], untrained(algorithm, digits, small))
    assert result.params.maskable[~result.masks.kept].abs().sum() == 0
    assert all(0 < row["density"] <= 1 for row in result.rows)
    # a vote keeps what a majority kept, which is near the scheduled density; every other rule keeps exactly so many, unless it
    # says of its settings that density is the most, or that it promises nothing
    exact = getattr(algorithm, "variant", "global") == "global"
    asked, slack = getattr(algorithm, "density", 1), 0.5 / small.layout.maskable if exact else 0.01
    promises = getattr(algorithm, "promises", "exactly")
    assert promises in ("exactly", "at most", "nothing")
    if promises == "exactly":
        assert result.density == pytest.approx(asked, abs=slack)
    elif promises == "at most":
        assert result.density <= asked + slack


@every
def test_worker_count_does_not_matter(name, algorithm, digits, small):
    settings = {"model": small, "data": digits, "local": LOCAL, "start": start(small)}
    alone = fit(algorithm, engine=engine(rounds=3), **settings)
    shared = fit(algorithm, engine=engine(rounds=3, workers=2), **settings)
    assert comparable(alone) == comparable(shared)


@every
def test_interrupted_and_resumed_is_never_interrupted(name, algorithm, digits, small, tmp_path):
    settings = {"model": small, "data": digits, "local": LOCAL, "start": start(small)}
    whole = fit(algorithm, engine=engine(), **settings)

    def stop_after_three(row):
        if row["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(algorithm, engine=engine(checkpoint_every=2), out=tmp_path / "run", watch=stop_after_three, **settings)
    resumed = fit(algorithm, engine=engine(checkpoint_every=2), out=tmp_path / "run", resume=True, **settings)
    assert comparable(resumed) == comparable(whole)
    rows = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))


@every
def test_bytes_in_the_record_are_the_bytes_that_were_carried(name, algorithm, digits, small, monkeypatch):
    carried = {"up": 0, "down": 0}
    exchange = Sequential.exchange

    def tapped(self, requests):
        for client, reply in exchange(self, requests):
            carried["down"] += len(requests[client])
            carried["up"] += len(reply)
            yield client, reply

    monkeypatch.setattr(Sequential, "exchange", tapped)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine(dropout=0.0), start=start(small))
    for direction in ("up", "down"):
        assert sum(split[direction] for row in result.rows for split in row["phases"].values()) == carried[direction]
        headline = sum(split[direction] for row in result.rows for phase, split in row["phases"].items() if phase != "eval")
        assert result.summary[f"bytes_{direction}"] == headline


def test_a_client_that_drops_out_still_cost_its_download(digits, small):
    from fedsieve import FedAvg

    result = fit(
        FedAvg(), model=small, data=digits, local=LOCAL, engine=engine(dropout=0.6, eval_clients=0), start=start(small)
    )
    dense = 4 * small.layout.size
    for row in result.rows:
        assert row["bytes_down"] // dense == 4
        assert row["bytes_up"] // dense == 4 - len(row["lost"])
    assert any(row["lost"] for row in result.rows)


ELSEWHERE = """
import sys, numpy as np, torch
from pathlib import Path
from fedsieve import Federation, build
from fedsieve.config import from_file
from fedsieve.data.batches import Examples
from fedsieve.engine.handle import Device, Plan, handle
torch.set_num_threads(1)
mean, std = eval(sys.argv[1])
sys.path.append(sys.argv[2])
nobody = np.arange(0)
for line in sys.stdin:
    here = Path(line.strip())
    config, own = from_file(here / "config.toml"), np.load(here / "own.npz")
    x = torch.from_numpy(own["x"]).contiguous(memory_format=torch.channels_last)
    data = Examples(x, torch.from_numpy(own["y"]), mean, std)
    parts = tuple(np.arange(len(own["y"])) if client == 2 else nobody for client in range(6))
    federation = Federation("own", 10, data, data, parts, (nobody,) * 6, False)
    spec = build(config.model, (1, 8, 8), 10)
    device = Device(Plan(config.algorithm, spec, federation, config.local, config.engine.rounds, config.engine.seed))
    reply, kept = handle(device, 2, (here / "payload").read_bytes(), (here / "mine").read_bytes() or None)
    same = reply == (here / "reply").read_bytes() and (kept or b"") == (here / "kept").read_bytes()
    print("same" if same else "differs", flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere(digits, tmp_path_factory):
    """A process of its own that plays client 2 as a folder says; return whether reply and kept state are those in there."""
    words = [sys.executable, "-c", ELSEWHERE, repr((digits.train.mean, digits.train.std)), str(Path(__file__).parent)]
    errors = (tmp_path_factory.mktemp("elsewhere") / "errors").open("w+")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process:

        def play(folder):
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
            errors.seek(0)
            assert answer == "same", answer or errors.read()[-2000:]

        yield play
    errors.close()


@every
def test_a_client_needs_nothing_but_config_bytes_own_data_and_own_state(name, algorithm, digits, small, tmp_path, elsewhere):
    """Play client 2 in another process that is given only these: the reply is the same, bit for bit."""
    job = Job(small, start(small), ROUNDS, 6, Streams(3))
    device = Device(Plan(algorithm, small, digits, LOCAL, ROUNDS, 3))
    state, mine = algorithm.init(job), None
    for _ in range(3):
        payload = pack(algorithm.broadcast(state, [2])[2])
        reply, kept = handle(device, 2, payload, mine)
        asked, mine = mine, kept
        state = algorithm.aggregate(state, [(2, algorithm.read(state, unpack(reply, small.layout)))])
    config = Config(name, algorithm, model=network(algorithm), local=LOCAL, engine=engine(cohort=0))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config.tables()))
    (tmp_path / "payload").write_bytes(payload)
    (tmp_path / "reply").write_bytes(reply)
    (tmp_path / "kept").write_bytes(kept or b"")
    (tmp_path / "mine").write_bytes(asked or b"")
    own = digits.parts[2]
    np.savez(tmp_path / "own.npz", x=digits.train.x[own].contiguous().numpy(), y=digits.train.y[own].numpy())
    elsewhere(tmp_path)


@every
def test_replies_that_are_not_valid_are_lost_and_end_no_run(name, algorithm, digits, small, monkeypatch):
    exchange = Sequential.exchange

    def hostile(self, requests):
        for client, reply in exchange(self, requests):
            message = unpack(reply, small.layout)
            bad = {0: b"", 1: reply[:-9], 2: pack(Message("train", 1, small.layout, {})), 3: bytes(len(reply))}
            yield client, bad.get(client, reply) if message.kind == "train" else reply

    monkeypatch.setattr(Sequential, "exchange", hostile)
    result = fit(algorithm, model=small, data=digits, local=LOCAL, engine=engine(cohort=0, dropout=0.0), start=start(small))
    for row in result.rows:
        assert set(row["lost"]) == {"0", "1", "2", "3"}
        assert row["examples"] == sum(len(digits.parts[client]) for client in (4, 5))
    assert torch.isfinite(result.params.flat).all()


@every
def test_a_round_without_replies_changes_nothing(name, algorithm, digits, small):
    state = algorithm.init(Job(small, start(small), ROUNDS, 6, Streams(3)))
    before, masks = algorithm.finalize(state)
    # a method starts dense, or has pruned what it is to prune
    kept = round(getattr(algorithm, "density", 1) * small.layout.maskable)
    assert masks.count in (small.layout.maskable, kept)
    if not getattr(algorithm, "own_start", False):  # weights that the method draws itself
        assert same(before.flat, start(small).under(masks).flat)
    for _ in range(2):
        state = algorithm.aggregate(state, iter(()))
        after, still = algorithm.finalize(state)
        assert same(after.flat, before.flat)
        assert same(still.kept, masks.kept)
    assert state.round == 2
