"""What clients keep on disk: a crash at any moment and a resume give the states of the checkpoint, and files stay small."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import same
from fedsieve import Data, DataError, Engine, FedAvg, FedSparsify, Local, Model, Streams, build, federate, fit
from fedsieve import load as load_data
from fedsieve.engine.states import CACHE, ClientStates

CLIENTS = 7

rounds = st.fixed_dictionaries(
    {
        "puts": st.dictionaries(st.integers(0, CLIENTS - 1), st.sampled_from([b"", b"small", bytes(70_000), bytes(200_000)])),
        "then": st.sampled_from(["go on", "save", "crash", "crash in the middle", "crash after commit", "interrupt"]),
    }
)


def crashed(path, into):
    """Open what a process killed at this moment would leave: the files as the system sees them, the journal too."""
    into.mkdir()
    for each in path.parent.glob(f"{path.name}*"):
        shutil.copy(each, into)
    return ClientStates(into / path.name)


def contents(states):
    return {client: state for client in range(CLIENTS) if (state := states.get(client)) is not None}


def numbered(puts, number):
    return {client: number.to_bytes(4, "little") + state for client, state in puts.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(rounds, max_size=12))
def test_a_crash_at_any_moment_goes_back_to_the_checkpoint(tmp_path_factory, plays):
    """The checkpoint is a round, a number of clients and, here, what they should hold; all else is in the file."""
    folder = tmp_path_factory.mktemp("states")
    path = folder / "0" / "clients.sqlite"
    states, saved, round, held, number = ClientStates(path), (0, (0, 0), {}), 0, {}, 0
    for place, (puts, then) in enumerate((play["puts"], play["then"]) for play in plays):
        states.round, before = round + 1, dict(held)
        puts = numbered(puts, place)
        for client, state in puts.items():
            states.put(client, state)
            held[client] = state
            if then == "crash in the middle":
                break
        if then == "interrupt":  # the round is given up, and the one before it is saved
            held = before
            saved = (round, states.commit(round), dict(held))
            states.saved(round)
        elif then != "crash in the middle":
            round += 1
            states.prune(round)
        if then == "save":
            saved = (round, states.commit(round), dict(held))
            states.saved(round)
        if then == "crash after commit":
            states.commit(round)
        assert contents(states) == held
        if then.startswith("crash"):
            number += 1
            left = crashed(path, folder / str(number))
            states.close()
            states, path = left, folder / str(number) / path.name
            states.restore(*saved[:2])
            round, held = saved[0], dict(saved[2])
            assert contents(states) == held
    states.close()
    assert {each.name for each in path.parent.glob("*")} <= {path.name, f"{path.name}-journal"}


def test_the_file_holds_a_few_versions_of_a_client_at_most_and_memory_none(tmp_path):
    states = ClientStates(tmp_path / "clients.sqlite")
    state, clients = bytes(100_000), 40
    for round in range(1, 31):
        states.round = round
        for client in range(clients):
            states.put(client, state)
        if round % 5 == 0:
            assert states.commit(round) == (clients, clients * round)
            states.saved(round)
        states.prune(round)
    states.close()
    assert (tmp_path / "clients.sqlite").stat().st_size < 4 * clients * 1.4 * len(state)
    assert not (tmp_path / "clients.sqlite-journal").exists()


def unnamed():
    """Files that this process has open and that are in no folder."""
    places = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            places.append(str(link.readlink()))
    return [place for place in places if place.endswith("(deleted)") and "etilqs" in place]


def test_a_run_without_a_folder_spills_to_a_file_without_a_name():
    before = unnamed()
    states = ClientStates()
    assert not states
    size = CACHE // 8
    for client in range(16):
        states.put(client, bytes([client]) * size)
    assert states
    assert len(unnamed()) > len(before)
    assert all(states.get(client) == bytes([client]) * size for client in range(16))
    assert states.get(16) is None
    states.close()
    assert unnamed() == before


def test_nothing_is_written_for_a_method_whose_clients_keep_nothing(small, digits, tmp_path):
    fit(FedAvg(), model=small, data=digits, engine=Engine(rounds=2), out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["latest.safetensors"]


def interrupted(small, digits, folder):
    """Stop a run after three rounds, and return how to go on with it."""

    def stop(row):
        if row["round"] == 3:
            raise KeyboardInterrupt

    settings = {
        "model": small,
        "data": digits,
        "engine": Engine(rounds=5, cohort=4),
        "start": small.initial("glorot", Streams(0)),
    }
    with pytest.raises(KeyboardInterrupt):
        fit(FedSparsify(density=0.3), out=folder, watch=stop, **settings)
    return lambda: fit(FedSparsify(density=0.3), out=folder, resume=True, **settings)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-70_000]), "cannot be used"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be used"),
        (lambda path: path.write_bytes(b""), "holds states of 0 clients up to round 3"),
    ],
)
def test_states_that_are_not_those_of_the_checkpoint_are_refused(small, digits, tmp_path, damage, said):
    resume = interrupted(small, digits, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint" / "clients.sqlite")
    with pytest.raises(DataError, match=said) as refused:
        resume()
    assert str(refused.value).count("\n") < 8


def test_states_of_another_moment_are_refused_and_left_as_they_are(small, digits, tmp_path):
    resume, checkpoint = interrupted(small, digits, tmp_path / "run"), tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint, tmp_path / "earlier")
    resume()
    shutil.copy(tmp_path / "earlier" / "latest.safetensors", checkpoint)
    before = (checkpoint / "clients.sqlite").read_bytes()
    with pytest.raises(DataError, match="not of one moment"):
        resume()
    assert (checkpoint / "clients.sqlite").read_bytes() == before
    shutil.copy(tmp_path / "earlier" / "clients.sqlite", checkpoint)
    resume()


def test_a_checkpoint_of_another_format_is_refused(small, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsieve.engine.folder.FORMAT", 1)
    resume = interrupted(small, digits, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(DataError, match="its format is 1, this version of fedsieve reads 3"):
        resume()


def test_a_checkpoint_does_not_grow_with_the_clients_seen(small, digits, tmp_path):
    sizes = []

    def watch(row):
        sizes.append((tmp_path / "run" / "checkpoint" / "latest.safetensors").stat().st_size)

    engine = Engine(rounds=8, cohort=1, checkpoint_every=1, eval_clients=0)
    fit(FedSparsify(density=0.9), model=small, data=digits, engine=engine, out=tmp_path / "run", watch=watch)
    assert max(sizes) - min(sizes) < 8 * 2000, "the rows of the record alone"


@pytest.fixture(scope="module")
def crowd():
    """100,000 clients of 20 digits each."""
    settings = Data(name="digits", clients=100_000, partition="sample", examples=20)
    return federate(load_data(settings), settings, Streams(0))


def test_a_hundred_thousand_clients_run_and_go_on(crowd, tmp_path):
    spec = build(Model(hidden=(8,)), crowd.shape, crowd.classes)
    engine = Engine(rounds=4, cohort=8, checkpoint_every=2, eval_clients=8)
    settings = {
        "model": spec,
        "data": crowd,
        "local": Local(batch=16),
        "engine": engine,
        "start": spec.initial("glorot", Streams(0)),
    }
    whole = fit(FedSparsify(density=0.5), **settings)

    def stop(row):
        if row["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(FedSparsify(density=0.5), out=tmp_path / "run", watch=stop, **settings)
    resumed = fit(FedSparsify(density=0.5), out=tmp_path / "run", resume=True, **settings)
    assert same(resumed.params.flat, whole.params.flat)
    assert (tmp_path / "run" / "partition.json").stat().st_size < 5e6
    assert (tmp_path / "run" / "checkpoint" / "latest.safetensors").stat().st_size < 4 * 100_000 + 100_000
    assert all(row["client_accuracy"]["mean"] > 0 for row in resumed.rows)


def test_a_signal_between_two_transactions_loses_nothing(tmp_path):
    states = ClientStates(tmp_path / "clients.sqlite")
    states.round = 1
    states.put(3, b"one")
    states._connection.execute("COMMIT")  # where the signal comes
    states.put(4, b"two")
    assert states.commit(1) == (2, 2)
    assert states.commit(1) == (2, 2)
    assert (states.get(3), states.get(4)) == (b"one", b"two")
    states.close()
