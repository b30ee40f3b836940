"""Rounds of several exchanges, clients with models of their own, networks that change, masks that clients lack."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import same
from fedsieve import Engine, FedAvg, Local, Masks, Message, Model, Params, Streams, WireError, build, fit, pack, unpack
from fedsieve.algorithms.base import Personal, evaluation, measured
from fedsieve.algorithms.fedavg import State
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.params import Kind, Layout, Slot
from fedsieve.wire.message import Reason
from fedsieve.wire.sections import number, vector
from fedsieve.wire.versions import Known, Versions

LOCAL = Local(batch=16, lr=0.1)


@dataclass(frozen=True, slots=True)
class PhasedState:
    inner: State
    asked: int
    """examples of the client that was asked, -1 before"""
    round: int


@dataclass(frozen=True, slots=True)
class Phased:
    """FedAvg that first asks one client for the number of its examples, in an exchange of its own."""

    never: bool = False
    """do not count rounds"""

    def init(self, job):
        return PhasedState(FedAvg().init(job), -1, 0)

    def broadcast(self, state, cohort):
        if state.asked < 0:
            return {cohort[0]: Message("setup", state.round + 1, state.inner.params.layout, {"please": number(1)})}
        return FedAvg().broadcast(state.inner, cohort)

    def client_update(self, request, client, mine):
        if request.kind == "setup":
            return request.reply(examples=number(client.examples)), None
        return FedAvg().client_update(request, client, mine)

    def read(self, state, reply):
        return reply.number("examples") if state.asked < 0 else FedAvg().read(state.inner, reply)

    def aggregate(self, state, replies):
        if self.never:
            return state
        if state.asked < 0:
            found = [examples for _, examples in replies]
            return replace(state, asked=found[0]) if found else replace(state, round=state.round + 1)
        return replace(state, inner=FedAvg().aggregate(state.inner, replies), round=state.round + 1)

    def finalize(self, state):
        return FedAvg().finalize(state.inner)


def test_a_round_takes_as_many_exchanges_as_its_state_says(digits, small):
    settings = {"model": small, "data": digits, "local": LOCAL, "engine": Engine(rounds=3, cohort=3, eval_clients=0)}
    phased, plain = fit(Phased(), **settings), fit(FedAvg(), **settings)
    assert same(phased.params.flat, plain.params.flat)
    assert [set(row["phases"]) for row in phased.rows] == [{"setup", "train"}, {"train"}, {"train"}]
    assert phased.rows[0]["phases"]["train"] == plain.rows[0]["phases"]["train"]
    assert 0 < phased.rows[0]["phases"]["setup"]["up"] < 200
    assert phased.rows[0]["examples"] == plain.rows[0]["examples"]


def test_a_method_that_never_ends_a_round_is_stopped(digits, small):
    with pytest.raises(RuntimeError, match="did not end round 1"):
        fit(Phased(never=True), model=small, data=digits, local=LOCAL, engine=Engine(rounds=1, eval_clients=0))


class Own(FedAvg):
    """FedAvg whose clients are evaluated with weights of their own: zero, but for odd clients."""

    def evaluation(self, state, clients, epochs):
        return dict.fromkeys(clients, evaluation(state.params, Masks.full(state.params.layout), state.round, epochs))

    def client_evaluate(self, request, client, mine):
        params = request.dense("weights") if client.id % 2 else Params.zeros(client.layout)
        return request.reply(counts=measured(client, params, None, int(request.number("epochs"))))


def test_clients_may_be_evaluated_with_models_of_their_own(digits, small):
    assert isinstance(Own(), Personal)
    assert not isinstance(FedAvg(), Personal)
    settings = {"model": small, "data": digits, "local": LOCAL, "engine": Engine(rounds=6)}
    own, usual = fit(Own(), **settings), fit(FedAvg(), **settings)
    assert same(own.params.flat, usual.params.flat)
    assert own.rows[-1]["client_accuracy"]["mean"] < usual.rows[-1]["client_accuracy"]["mean"]
    assert own.rows[-1]["tuned_accuracy"] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_clients_are_evaluated_again_after_training_if_asked(digits, small, workers):
    engine = Engine(rounds=3, eval_tune=3, workers=workers)
    result = fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=engine)
    before, after = result.rows[-1]["client_accuracy"], result.rows[-1]["tuned_accuracy"]
    assert after["mean"] > before["mean"]
    plain = fit(FedAvg(), model=small, data=digits, local=LOCAL, engine=replace(engine, eval_tune=0))
    assert same(plain.params.flat, result.params.flat)
    assert result.rows[-1]["bytes_down"] == plain.rows[-1]["bytes_down"]


WIDE = build(Model(name="mlp", hidden=(24,)), (1, 8, 8), 10)


class Growing(FedAvg):
    """FedAvg that says it ends with another network."""

    def finalize(self, state):
        return WIDE.initial("kaiming", Streams(0)), Masks.full(WIDE.layout)

    def network(self, state, spec):
        assert spec.layout.fingerprint == state.params.layout.fingerprint
        return WIDE


@pytest.mark.parametrize("workers", [0, 2])
def test_the_server_evaluates_the_network_that_the_method_names(digits, small, workers):
    assert pickle.loads(pickle.dumps(WIDE)).layout.fingerprint == WIDE.layout.fingerprint
    engine = Engine(rounds=1, eval_clients=0, workers=workers)
    result = fit(Growing(), model=small, data=digits, local=LOCAL, engine=engine)
    expected = fit(Growing(), model=WIDE, data=digits, local=LOCAL, engine=engine, start=WIDE.initial("kaiming", Streams(0)))
    assert result.accuracy == expected.accuracy


# ---- masks that change


def layout():
    return Layout.of([Slot("a", (30,), Kind.WEIGHT, True, 0), Slot("b", (50, 2), Kind.WEIGHT, True, 1)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3))), max_size=8), st.integers(0, 99)
)
def test_every_client_reads_the_current_masks_whatever_it_missed(events, seed):
    """Each event: masks change or not; some clients are asked; of these some answers are lost."""
    where, draws = layout(), np.random.default_rng(seed)
    versions = Versions.start(Masks(where, torch.from_numpy(draws.random(where.maskable) < 0.3)), 4)
    known = dict.fromkeys(range(4))
    for change, asked, lost in events:
        if change:
            versions = versions.changed(Masks(where, torch.from_numpy(draws.random(where.maskable) < 0.3)))
        sections = versions.sections(sorted(asked))
        for client in asked:
            request = unpack(pack(Message("train", 1, where, sections[client])), where)
            masks, known[client] = Known.told(request, known[client])
            assert same(masks.kept, versions.masks.kept)
            assert len(known[client].masks) <= 2
        versions = thaw(freeze(versions.answered(asked - lost)), where, Versions.__module__)


def test_who_holds_the_masks_is_sent_none_and_who_held_the_last_only_the_changes():
    where = layout()
    versions = Versions.start(Masks(where, torch.arange(130) % 3 == 0), 3)
    versions = versions.answered([0, 1])
    assert versions.changed(versions.masks) is versions
    moved = versions.masks.kept.clone()
    moved[:2] = torch.tensor([False, True])
    later = versions.changed(Masks(where, moved)).answered([0])
    sections = later.sections([0, 1, 2])
    assert set(sections[0]) == {"version", "base"}
    changes = unpack(pack(Message("train", 1, where, sections[1])), where).mask("mask")
    assert changes.kept.nonzero().flatten().tolist() == [0, 1]
    assert int(unpack(pack(Message("train", 1, where, sections[2])), where).number("base")) == 0


def test_changes_to_masks_that_are_not_here_are_refused():
    where = layout()
    versions = Versions.start(Masks.full(where), 1).answered([0])
    request = Message("train", 1, where, versions.sections([0])[0])
    with pytest.raises(WireError) as found:
        Known.told(request, None)
    assert found.value.reason is Reason.RANGE


class Boastful(FedAvg):
    """FedAvg whose first three clients answer evaluations with what is no count."""

    def evaluation(self, state, clients, epochs):
        return dict.fromkeys(clients, evaluation(state.params, Masks.full(state.params.layout), state.round, epochs))

    def client_evaluate(self, request, client, mine):
        answers = {0: [5.0, 1.0, 2.0], 1: [1.0] * 6, 2: []}
        told = answers.get(client.id)
        return request.reply(counts=measured(client, request.dense("weights"), None, 0) if told is None else vector(told))


def test_evaluations_that_are_not_valid_are_lost_and_end_no_run(digits, small):
    result = fit(Boastful(), model=small, data=digits, local=LOCAL, engine=Engine(rounds=2))
    assert [set(row["lost"]) for row in result.rows] == [{"0", "1", "2"}] * 2
    assert all(0 <= row["client_accuracy"]["mean"] <= 1 for row in result.rows)
