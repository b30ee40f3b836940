"""ProgFed: train a growing beginning of the network (Wang et al. 2022, ICML, arXiv 2110.05323).

With M the numbers of the stage's network, its local head and BatchNorm's statistics included:

    down  the stage's network                      32 M bits a client
    up    its update                               32 M bits, and the number of examples
          with bits = b and keep = p               b p bits or less for each trained number, 64 for each tensor of such, 32
                                                   for each statistic

Stage, positions of what is sent, and names travel nowhere: the round, the settings and a stream of the client say them.

A stage's network is the job's up to some block, with global average pooling and a linear layer behind; the last is the whole
network. When it grows, the old local head is thrown away and the new one starts afresh, as do server optimiser and clients'
velocity. U-Nets grow from both ends and keep their output path. See `fedsieve.models.stages`.

Deviates: stage s + 1 begins after s T_s whole rounds; in the published code the first stage has one round less. Rounds of
warm-up are part of engine.rounds: T = engine.rounds - (S - 1) warmup. Clients start each round without momentum; in the
published code it survives until the network grows (client_momentum = "kept"). No batch is skipped for its loss. BatchNorm's
statistics are averaged, and never compressed; the published code sends none. Three stages of ResNet-18 are published as
boundaries = ["stage1", "stage3"], ours with stages = 3 are ["stage2", "stage3"]. Compression: no random rotation; every client
sends as many elements of each tensor; only the update is compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.aggregate.optim import Moments, ServerOptim, step
from fedsieve.algorithms.base import Job, measured, weight
from fedsieve.local.executor import Client
from fedsieve.models.growth import Growth, Schedule, growth
from fedsieve.models.spec import ModelSpec
from fedsieve.models.stages import Stage, cut, described, stage_spec, stages
from fedsieve.params import Kind, Layout, Masks, Params
from fedsieve.settings import Bits, Count, CountOrZero, Density, settings
from fedsieve.streams import Streams
from fedsieve.wire.lossy import Lossy
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import number, vector


@dataclass(frozen=True, slots=True)
class State:
    """The network after `round` rounds, of the stage of that round."""

    params: Params
    """of the whole network: what stages so far have trained, and the start of what is to come"""
    head: Tensor
    """weights and biases of the local head; empty in the last stage"""
    moments: Moments
    stages: tuple[Stage, ...]
    growth: Growth
    streams: Streams
    round: int

    def stage(self, round: int) -> Stage:
        """The stage of a round."""
        return self.stages[self.growth.stage(round) - 1]

    @property
    def network(self) -> Params:
        """Parameters of the stage's network."""
        return self.stage(self.round).join(self.params, self.head)


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps: the velocity of its SGD, and the stage that it belongs to."""

    stage: int
    momentum: Tensor


@settings
class ProgFed:
    """Train a growing beginning of the network, each stage with a light head of its own."""

    stages: CountOrZero = 0
    """number of stages, >= 0 (0: one a block of the network); with fewer than there are blocks the first blocks are one"""
    boundaries: tuple[str, ...] = ()
    """parts of the network that end its stages but the last, for example conv1 or stage1.0; empty: the model's blocks"""
    schedule: Schedule = "half"
    """rounds of each stage but the last: T / (2 S) (half) or T / S (equal) in whole rounds, at least 1; or as in `grow_at`.
    S: stages; T: engine.rounds without those of warm-up"""
    grow_at: tuple[Count, ...] = ()
    """schedule list: the rounds, each >= 2, in which stages 2 to S begin, ascending"""
    warmup: CountOrZero = 0
    """rounds at the beginning of stages 2 to S, >= 0, in which only the new block and head are trained, at the first round's
    learning rate; other rounds are counted without them in the schedule of the learning rate"""
    bits: Bits = 32
    """bits of each number of an update; below 32 rounded at random to levels between a tensor's least and largest, unbiased"""
    keep: Density = 1.0
    """share of each tensor's update that is sent, at random positions that both ends draw, scaled to be unbiased, in (0, 1]"""
    weighting: Literal["uniform", "examples"] = "uniform"
    """weight of a client in the mean: the same for all, as published, or its number of training examples"""
    client_momentum: Literal["fresh", "kept"] = "fresh"
    """velocity of a client's SGD at the start of its round: zero, or kept from its last one in the same stage, as published"""
    server: ServerOptim = ServerOptim()
    """how the mean update is applied"""

    def init(self, job: Job) -> State:
        """Start with the first stage."""
        ends = self._ends(job.spec)
        made, plan = stages(job.spec, ends), self._growth(job.rounds, ends)
        moments = Moments.start(self.server, made[0].layout(job.layout).trainable)
        return State(job.start, made[0].fresh_head(job.streams), moments, made, plan, job.streams, round=0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the stage's network to all."""
        params, _ = self._next(state)
        message = Message("train", state.round + 1, state.params.layout, {"weights": vector(params.flat)})
        return dict.fromkeys(cohort, message)

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine | None]:
        """Train the stage's network, or its newest part, and send the difference."""
        ends, round = self._ends(client.spec), request.round
        plan = self._growth(client.rounds, ends)
        stage = plan.stage(round)
        spec = stage_spec(client.spec, ends, stage)
        start, moves = _network(request, spec.layout), None
        lr = client.rate(*plan.main(round)) if self.warmup else None
        if plan.warming(round):
            before, after = (described(client.spec, ends, each) for each in (stage - 1, stage))
            lr, moves = client.rate(1, client.rounds), after.fresh(before, client.layout)
        momentum = mine.momentum if mine is not None and mine.stage == stage else None
        own = None if spec is client.spec else spec
        trained = client.train(start, momentum=momentum, moves=moves, lr=lr, spec=own)
        update, lossy = trained.params - start, self._lossy(spec.layout)
        if lossy is None:
            sections = {"update": vector(update.flat)}
        else:
            streams = client.stream
            sections = {**lossy.sections(update.trainable, streams("positions"), streams("levels"))}
            sections["statistics"] = vector(update.statistics)
        kept = trained.momentum if self.client_momentum == "kept" else None
        reply = request.reply(**sections, examples=number(trained.examples), loss=number(trained.loss))
        return reply, None if kept is None else Mine(stage, kept)

    def read(self, state: State, reply: Message) -> tuple[Tensor, Tensor, float]:
        """Decode an update, of as many trained numbers as are sent; that of the statistics; and their weight."""
        layout, share = state.stage(state.round + 1).layout(state.params.layout), weight(reply, self.weighting)
        lossy, statistics = self._lossy(layout), layout.size - layout.trainable
        if lossy is None:
            flat = _floats(reply, "update", layout.size)
            return flat[: layout.trainable], flat[layout.trainable :], share
        return lossy.read(reply), _floats(reply, "statistics", statistics), share

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Tensor, Tensor, float]]]) -> State:
        """Apply the mean of the updates. The network grows when it is time, whoever answers."""
        round, (params, moments) = state.round + 1, self._next(state)
        mean, lossy = WeightedMean(params.layout), self._lossy(params.layout)
        for client, (trained, statistics, share) in replies:
            if lossy is not None:
                trained = lossy.spread(trained, state.streams.at(round=round, client=client)("positions"))
            mean.add(Params(params.layout, torch.cat([trained, statistics])), share)
        if mean.weight:
            params, moments = step(self.server, params, mean.value(), moments)
        whole, head = state.stage(round).split(params, state.params)
        return replace(state, params=whole, head=head, moments=moments, round=round)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the stage's network, nothing pruned."""
        params = state.network
        return params, Masks.full(params.layout)

    def network(self, state: State, spec: ModelSpec) -> ModelSpec:
        """Return the network that `finalize` returns parameters of."""
        return stage_spec(spec, self._ends(spec), state.growth.stage(state.round))

    def evaluation(self, state: State, clients: Sequence[int], epochs: int) -> Mapping[int, Message]:
        """Ask clients how the stage's network does on their test examples."""
        sections = {"epochs": number(epochs), "weights": vector(state.network.flat)}
        return dict.fromkeys(clients, Message("eval", state.round, state.params.layout, sections))

    def client_evaluate(self, request: Message, client: Client, mine: Mine | None) -> Message:
        """Say how it does."""
        ends = self._ends(client.spec)
        spec = stage_spec(client.spec, ends, self._growth(client.rounds, ends).stage(request.round))
        found = measured(client, _network(request, spec.layout), None, int(request.number("epochs")), spec)
        return request.reply(counts=found)

    def _growth(self, rounds: int, ends: tuple[str, ...]) -> Growth:
        return growth(rounds, len(ends) + 1, self.schedule, self.warmup, tuple(self.grow_at))

    def _ends(self, spec: ModelSpec) -> tuple[str, ...]:
        return cut(spec, tuple(self.boundaries), self.stages)

    def _next(self, state: State) -> tuple[Params, Moments]:
        """The stage's network and the server's moments at the beginning of the next round, in which the network may grow."""
        stage = state.stage(state.round + 1)
        if stage == state.stage(state.round):
            return state.network, state.moments
        params = stage.join(state.params, stage.fresh_head(state.streams))
        return params, Moments.start(self.server, params.layout.trainable)

    def _lossy(self, layout: Layout) -> Lossy | None:
        """How the trained part of an update is sent; None: as it is."""
        if self.bits == 32 and self.keep == 1:
            return None
        return Lossy(tuple(slot.numel for slot in layout.slots if slot.kind is not Kind.BUFFER), self.bits, self.keep)


def _floats(message: Message, name: str, size: int) -> Tensor:
    flat = message.vector(name)
    if len(flat) != size or flat.dtype != torch.float32:
        raise WireError(Reason.COUNT, 0, f"{name}: {len(flat)} numbers of {flat.dtype}, not {size} of float32")
    return flat


def _network(request: Message, layout: Layout) -> Params:
    return Params(layout, _floats(request, "weights", layout.size))
