"""The engine: transports, frozen states, run folders, cohorts."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from conftest import same
from fedsieve import (
    Data,
    DataError,
    Diverged,
    Engine,
    FedAvg,
    FedsieveError,
    FedSparsify,
    Local,
    Masks,
    Model,
    Streams,
    UsageError,
    build,
    federate,
    fit,
)
from fedsieve import load as load_data
from fedsieve.algorithms.base import Job
from fedsieve.engine.arena import SharedTensor
from fedsieve.engine.folder import RunFolder, fresh
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.handle import Plan
from fedsieve.engine.round import Exchange, draw, drops_out
from fedsieve.engine.transports import Sequential, Workers
from fedsieve.finish.export import export, load, pack
from fedsieve.wire.ledger import Ledger

LOCAL = Local(batch=16)


@dataclass(frozen=True)
class Kept:
    """A state of a method, for the tests of freezing."""

    content: object


# ---- frozen states


PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)


def nested(inner):
    return st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(0, 99), inner) | inner.map(Kept)


@settings(max_examples=40, deadline=None)
@given(st.recursive(PLAIN | st.binary(max_size=9), nested, max_leaves=8))
def test_a_frozen_state_thaws_to_itself(content):
    frozen = freeze(Kept(content))
    assert thaw(frozen, None, __name__) == Kept(content)
    assert freeze(thaw(frozen, None, __name__)) == frozen


def test_tensors_params_and_masks_survive_freezing(small):
    params = small.initial("glorot", Streams(1))
    masks = Masks(small.layout, torch.arange(small.layout.maskable) % 3 == 0)
    state = Kept((params, {"m": masks, 4: torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)}, Streams(7, 2, 3)))
    found = thaw(freeze(state), small.layout, __name__).content
    assert same(found[0].flat, params.flat)
    assert found[1]["m"].kept.equal(masks.kept)
    assert found[1][4].equal(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16))
    assert found[2] == Streams(7, 2, 3)


def test_a_frozen_state_can_only_name_classes_of_its_method(small):
    frozen = freeze(Kept(3))
    with pytest.raises(KeyError):
        thaw(frozen, small.layout, "fedsieve.algorithms.fedavg")
    with pytest.raises(TypeError, match="cannot hold a"):
        freeze(Kept(object()))


# ---- transports


def plan(small, digits, algorithm=None):
    return Plan(algorithm or FedAvg(), small, digits, LOCAL, 3, 0)


def exchange(transport, small, clients, algorithm=None):
    algorithm = algorithm or FedAvg()
    job = Job(small, small.initial("glorot", Streams(0)), 3, 6, Streams(0))
    sender = Exchange(job, Engine(), transport, Ledger())
    requests = sender.send(algorithm.broadcast(algorithm.init(job), clients))
    return list(transport.exchange(requests))


def test_shared_tensors_keep_type_shape_and_strides():
    for source in (
        torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.zeros(0, 3),
        torch.arange(3),
    ):
        shared = SharedTensor(source).tensor()
        assert shared.equal(source)
        assert shared.stride() == source.stride()
        assert shared.dtype == source.dtype


def test_replies_come_in_order_and_alike_from_any_number_of_workers(small, digits):
    clients = [5, 0, 3, 1, 4, 2]
    alone = Sequential(plan(small, digits))
    expected = exchange(alone, small, clients)
    masks = Masks(small.layout, torch.arange(small.layout.maskable) % 5 == 0)
    params = small.initial("glorot", Streams(0)).under(masks)
    found = alone.evaluate(params, masks)
    alone.close()
    assert [client for client, _ in expected] == sorted(clients)
    workers = Workers(plan(small, digits), 3)
    try:
        for _ in range(2):
            assert exchange(workers, small, clients) == expected
            assert workers.evaluate(params, masks) == found
        assert workers.flops == 2 * alone.flops
        assert workers.peak_memory() > 0
    finally:
        workers.close()


def test_examples_are_in_memory_once_for_server_and_workers(small, digits):
    """The server's own move there; they are as they were, and outlive the workers."""
    x = digits.train.x.clone()
    own = replace(digits, train=replace(digits.train, x=x))
    for _ in range(2):
        before = x.data_ptr()
        workers = Workers(plan(small, own), 1)
        assert own.train.x is x
        assert x.data_ptr() != before
        replies = exchange(workers, small, [0, 1])
        workers.close()
        assert same(x, digits.train.x)
        assert x.stride() == digits.train.x.stride()
    alone = Sequential(plan(small, digits))
    assert replies == exchange(alone, small, [0, 1])
    alone.close()


def test_a_worker_that_dies_ends_the_run_with_a_reason(small, digits):
    workers = Workers(plan(small, digits), 1)
    try:
        workers._processes[0].kill()
        workers._processes[0].join()
        with pytest.raises(FedsieveError, match="ended unexpectedly"):
            exchange(workers, small, [0])
    finally:
        workers.close()


SERVER = """
import time
from multiprocessing import forkserver
from fedsieve import Data, FedAvg, Local, Model, Streams, build, federate, load, warm_up
from fedsieve.engine.handle import Plan
from fedsieve.engine.transports import Workers
warm_up()
if __name__ == "__main__":
    settings = Data(name="digits", clients=2, train_limit=40)
    data = federate(load(settings), settings, Streams(0))
    for _ in range(2):
        workers = Workers(Plan(FedAvg(), build(Model(hidden=(4,)), data.shape, 10), data, Local(), 1, 0), 1)
        print(workers._processes[0].pid, flush=True)
    print(forkserver._forkserver._forkserver_pid, flush=True)
    time.sleep(60)
"""


def test_workers_and_what_they_are_forked_from_end_with_the_server(tmp_path):
    """However it ends: here it is killed."""
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    server = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    started = [int(server.stdout.readline()) for _ in range(3)]
    server.send_signal(signal.SIGKILL)
    server.wait()
    server.stdout.close()
    for _ in range(100):
        if not any(map(alive, started)):
            return
        time.sleep(0.05)
    pytest.fail(f"some of {started} live on")


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


# ---- cohorts


def test_cohorts_are_drawn_without_replacement_and_evenly(small):
    job = Job(small, None, 400, 20, Streams(0))
    cohorts = [draw(job, Engine(cohort=5), round) for round in range(1, 401)]
    assert all(len(set(cohort)) == 5 and cohort == sorted(cohort) for cohort in cohorts)
    counts = np.bincount(np.concatenate(cohorts), minlength=20)
    assert counts.min() > 60
    assert counts.max() < 140
    assert draw(job, Engine(), 1) == list(range(20))
    dropped = sum(drops_out(job, Engine(dropout=0.3), round, client) for round in range(100) for client in range(20))
    assert 500 < dropped < 700


# ---- runs


def test_a_run_folder_holds_what_it_promises(small, digits, tmp_path):
    result = fit(FedSparsify(density=0.3), model=small, data=digits, local=LOCAL, engine=Engine(rounds=3), out=tmp_path / "run")
    names = {"config.toml", "partition.json", "records.jsonl", "summary.json", "model.safetensors", "checkpoint"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"] == result.accuracy
    assert summary["density"] == result.density == pytest.approx(0.3, abs=1e-3)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert all(stored[name].equal(result.params[name]) for name in result.params)
    with pytest.raises(UsageError, match="never overwritten"):
        fit(FedAvg(), model=small, data=digits, engine=Engine(rounds=1), out=tmp_path / "run")
    with pytest.raises(UsageError, match="another config"):
        fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=Engine(rounds=3), out=tmp_path / "run", resume=True)


def test_another_data_set_cannot_go_on_with_a_checkpoint(small, digits, tmp_path):
    fit(FedAvg(), model=small, data=digits, engine=Engine(rounds=2), out=tmp_path / "run")
    x = digits.train.x.clone()
    x[0, 0, 0, 0] += 1
    other = replace(digits, train=replace(digits.train, x=x))
    with pytest.raises(UsageError, match="another config, model or data"):
        fit(FedAvg(), model=small, data=other, engine=Engine(rounds=2), out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(100), lambda b: b[:8] + b"x" + b[9:]]
)
def test_a_damaged_checkpoint_is_a_data_error(small, digits, tmp_path, damage):
    fit(FedAvg(), model=small, data=digits, engine=Engine(rounds=2), out=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "latest.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="cannot be read"):
        fit(FedAvg(), model=small, data=digits, engine=Engine(rounds=2), out=tmp_path / "run", resume=True)


def test_only_run_folders_are_resumed(small, digits, tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        fit(FedAvg(), model=small, data=digits, out=tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_loss_that_is_not_finite_stops_the_run_or_drops_the_client(small, digits, tmp_path):
    wild = Local(lr=1e30, batch=4)
    with pytest.raises(Diverged, match=r"local\.lr"):
        fit(FedAvg(), model=small, data=digits, local=wild, engine=Engine(rounds=2), out=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "latest.safetensors").is_file()
    result = fit(FedAvg(), model=small, data=digits, local=wild, engine=Engine(rounds=2, nonfinite="drop"))
    assert len(result.rows[0]["lost"]) == 6
    assert torch.isfinite(result.params.flat).all()


@pytest.mark.parametrize("engine", [Engine(cohort=7), Engine(workers=1)])
def test_settings_that_do_not_fit_are_refused_before_round_1(small, digits, engine, tmp_path):
    local = Local(device="cuda") if engine.workers else LOCAL
    with pytest.raises(UsageError):
        fit(FedAvg(), model=small, data=digits, local=local, engine=engine, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def flattened(*norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), *norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 10))


def to_one_pixel(norm):
    return nn.Sequential(nn.Conv2d(1, 6, 8), norm, nn.ReLU(), nn.Flatten(), nn.Linear(6, 10))


ONE = {
    "flat": (flattened(nn.BatchNorm1d(6)), False),
    "one pixel": (to_one_pixel(nn.BatchNorm2d(6)), False),
    "pixels": (nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 10)), True),
    "group": (to_one_pixel(nn.GroupNorm(1, 6)), True),
    "none": (flattened(), True),
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize(("batch", "size"), [(16, 33), (16, 1), (1, 5)])
def test_a_step_on_one_example_is_refused_before_round_1_where_batch_normalisation_cannot_take_it(name, batch, size, digits):
    module, works = ONE[name]
    data = replace(digits, parts=[np.arange(32), np.arange(size), np.arange(size)] if batch > 1 else [np.arange(size)] * 2)
    settings = {"model": module, "data": data, "local": Local(batch=batch), "engine": Engine(rounds=1, eval_clients=0)}
    before = torch.get_rng_state()
    if works:
        fit(FedAvg(), **settings)
    else:
        said = (
            f"local.batch = {batch} leaves client {int(batch > 1)}, which has {size} training examples, .* model 'Sequential'"
        )
        with pytest.raises(UsageError, match=said):
            fit(FedAvg(), **settings)
        fit(FedAvg(), **settings | {"local": Local(batch=32), "data": replace(data, parts=[np.arange(32)] * 2)})
    assert torch.get_rng_state().equal(before)
    assert all(buffer.eq(buffer.flatten()[0]).all() for buffer in module.buffers())  # running means and variances as they were


def test_fresh_folders_do_not_exist(tmp_path):
    seen = set()
    for _ in range(3):
        path = fresh("a", tmp_path)
        path.mkdir()
        seen.add(path)
    assert len(seen) == 3


def test_learning_on_real_digits_reaches_what_it_should(digits, small):
    """Two methods in a few seconds: dense above 80 %, at a fifth of the weights above 75 %, with less traffic."""
    engine = Engine(rounds=15, eval_clients=0)
    start = small.initial("glorot", Streams(0))
    dense, sparse = (
        fit(algorithm, model=small, data=digits, local=Local(batch=8, lr=0.1), engine=engine, start=start)
        for algorithm in (FedAvg(), FedSparsify(density=0.2))
    )
    assert dense.accuracy > 0.8
    assert sparse.accuracy > 0.75
    assert sparse.summary["bytes_up"] < 0.7 * dense.summary["bytes_up"]


# ---- export


def test_the_packed_export_is_the_model(small, digits, tmp_path):
    result = fit(FedSparsify(density=0.1), model=small, data=digits, engine=Engine(rounds=3), out=tmp_path / "run")
    packed, plain = export(tmp_path / "run", tmp_path / "out")
    for tensors in (load(packed), torch.load(plain, weights_only=True)):
        assert set(tensors) == set(result.params)
        assert all(same(tensors[name], result.params[name]) for name in result.params)
    assert packed.stat().st_size < 0.6 * plain.stat().st_size


def test_what_is_no_packed_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no model"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for content in (b"", pack({"w": torch.zeros(40)})[:-3]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DataError, match="no packed model"):
            load(tmp_path / "bad")


def test_run_folder_files_are_replaced_whole(tmp_path):
    folder = RunFolder.open(tmp_path / "run", "id", resume=False)
    folder.describe({"a": {"b": 1}}, {"clients": 1})
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_many_clients_with_large_states_do_not_block_the_pipes():
    """Requests with a state are larger than a pipe holds: the server may only send one to a worker that is waiting for it."""
    settings = Data(name="digits", clients=16, train_limit=160, test_limit=50)
    data = federate(load_data(settings), settings, Streams(0))
    spec = build(Model(name="mlp", hidden=(2048,)), data.shape, data.classes)
    algorithm, local = FedSparsify(density=0.5, client_momentum="kept"), Local(momentum=0.9, batch=4)
    runs = [
        fit(algorithm, model=spec, data=data, local=local, engine=Engine(rounds=3, workers=n, eval_clients=0)) for n in (0, 2)
    ]
    assert same(runs[0].params.flat, runs[1].params.flat)
