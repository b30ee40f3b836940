"""FedDST: each client moves its own mask, the server merges them (Bibikar et al. 2022, arXiv 2112.09824).

With d the density, P the maskable weights, Q all other numbers, a the weights that a client exchanges, H the binary entropy; in
bits a client:

    down  32 d P + 32 Q; masks that changed P H(2a/P), masks for whoever lacks more P H(d)
    up    32 d P + 32 Q; in rounds that move masks also how the client's differs, P H(2a/P)

The mask starts at random. Every `every` rounds clients drop the smallest weights of each tensor and grow as many of the
steepest pruned ones, each by its own gradient. The server averages each weight over those that keep it, and keeps the largest:
the number of weights of a tensor stays.

Deviates: clients move their masks before they train, not within, so that what grows is trained by whoever grew it for the whole
round: at 0 it would be the first to go when the server prunes. Gradients are collected in O(a) memory (`client.top_gradients`).
`alpha` is RigL's, for ours is no source for theirs. Masks keep still in the last round, whatever `stop` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedsieve.aggregate.mean import HeldMean
from fedsieve.algorithms.base import Job, check_density, check_moves, weight
from fedsieve.local.executor import Client
from fedsieve.local.memory import training_memory
from fedsieve.params import Masks, Params
from fedsieve.settings import Count, CountOrZero, Density, Threshold, settings
from fedsieve.sparsity.allocate import Rule, allocate
from fedsieve.sparsity.regrow import exchanges, lowered
from fedsieve.sparsity.schedule import moving
from fedsieve.sparsity.scores import magnitude, random
from fedsieve.sparsity.select import select_by_slot
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import integers, mask, number, values
from fedsieve.wire.versions import Known, Versions


@dataclass(frozen=True, slots=True)
class State:
    """The global model and its masks after `round` rounds."""

    params: Params
    versions: Versions
    round: int
    rounds: int
    streams: Streams
    momentum: bool
    client_memory: int | None = None


@settings
class FedDST:
    """Train a sparse model whose mask each client moves by its own gradient."""

    density: Density = 0.2
    """density of the maskable weights, in (0, 1]"""
    layers: Literal["erk", "er", "uniform", "balanced"] = "erk"
    """densities of the tensors, see fedsieve.sparsity.allocate"""
    every: Count = 10
    """rounds between two moves of the masks, >= 1 (10 to 20 as published)"""
    stop: CountOrZero = 0
    """round in which the share has fallen to 0, >= 0 (0: the last one)"""
    alpha: Threshold = 0.3
    """share a(t) = alpha / 2 * (1 + cos(pi t / stop)) of a tensor's kept weights that are exchanged, in [0, 1] (RigL: 0.3)"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Draw the first mask."""
        layout, keep = job.layout, round(self.density * job.layout.maskable)
        check_density(layout, self.density)
        if self.alpha:
            check_moves(job, self.every, min(self.stop or job.rounds, job.rounds) - 1, "algorithm.alpha = 0")
        rule: Rule = self.layers
        draws, ties = job.streams("mask"), job.streams("mask/ties")
        counts = allocate(layout, keep, rule, floor=1)
        masks = select_by_slot(random(layout, draws), counts, within=Masks.full(layout), ties=ties)
        versions = Versions.start(masks, job.clients)
        return State(job.start.under(masks), versions, 0, job.rounds, job.streams, job.local.momentum > 0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the model, the masks as far as a client lacks them, and how much it is to exchange."""
        layout = state.params.layout
        common = {"weights": values(state.params, state.versions.masks)}
        if swaps := self._swaps(state):
            common["swaps"] = integers([swaps.get(slot.name, 0) for slot in layout.masked_slots])
        told = state.versions.sections(cohort)
        made = {id(each): Message("train", state.round + 1, layout, {**each, **common}) for each in told.values()}
        return {client: made[id(told[client])] for client in cohort}

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known]:
        """Move the mask if asked, and train under it."""
        masks, known = Known.told(request, mine)
        params, sections = request.values("weights", masks), {}
        own = masks
        if "swaps" in request.sections:
            moves = zip(client.layout.masked_slots, request.integers("swaps").tolist(), strict=True)
            own = _moved(params, masks, {slot.name: count for slot, count in moves if count}, client)
            sections["moved"] = mask(Masks(masks.layout, masks.kept ^ own.kept))
        trained = client.train(params.under(own), masks=own)
        sections["weights"] = values(trained.params, own)
        return request.reply(**sections, examples=number(trained.examples), loss=number(trained.loss)), known

    def read(self, state: State, reply: Message) -> tuple[Params, Masks | None, float]:
        """Decode a client's weights and, if it moved them, its masks, which keep as many of each tensor as the server's."""
        masks, own = state.versions.masks, None
        if self._swaps(state):
            own = Masks(masks.layout, masks.kept ^ reply.mask("moved").kept)
            if own.counts() != masks.counts():
                raise WireError(Reason.COUNT, 0, f"masks of {own.counts()} weights, not {masks.counts()}")
        return reply.values("weights", own or masks), own, weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, Masks | None, float]]]) -> State:
        """Average each weight over those that keep it; of those that anybody keeps, keep the largest."""
        masks, round = state.versions.masks, state.round + 1
        mean, answered = HeldMean(masks.layout), []
        for client, (params, own, share) in replies:
            mean.add(params, own or masks, share)
            answered.append(client)
        memory = training_memory(masks, momentum=state.momentum, top=self._swaps(state))
        if not answered:
            return replace(state, round=round, client_memory=memory)
        params, ties = mean.value(state.params), state.streams.at(round=round)("prune")
        kept = select_by_slot(magnitude(params), masks.counts(), within=mean.holders, ties=ties)
        versions = state.versions.answered(answered).changed(kept)
        return replace(state, params=params.under(kept), versions=versions, round=round, client_memory=memory)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its masks."""
        return state.params, state.versions.masks

    def _swaps(self, state: State) -> dict[str, int]:
        """How many weights of each tensor clients exchange in the coming round; empty: none."""
        share = moving(state.round + 1, every=self.every, stop=self.stop, rounds=state.rounds, share=self.alpha)
        return exchanges(state.versions.masks, share)


def _moved(params: Params, masks: Masks, swaps: Mapping[str, int], client: Client) -> Masks:
    """Drop the smallest weights and grow as many of the steepest that were pruned before."""
    left = lowered(masks, magnitude(params), swaps, client.stream("drop"))
    places, _ = client.top_gradients(params, masks, swaps, purpose="grow")
    return Masks(masks.layout, left.kept.index_fill(0, places, True))
