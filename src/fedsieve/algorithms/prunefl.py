"""PruneFL: masks by importance for the time that a weight costs (Jiang et al. 2019, arXiv 1909.12326).

With d the density, P the maskable weights, Q all other numbers, c of them in masks that changed, H the binary entropy; in bits:

    set-up  down  32 (P + Q)     up  P H(d)        one client of the cohort, until one has answered
    round   down  32 d P + 32 Q; masks that changed P H(c/P), masks for whoever lacks more P H(d)
            up    32 d P + 32 Q; if masks are to move 32 P, squared gradients of all weights

First one client prunes: in `initial` passes it trains, and narrows the mask down by the rule below. Then every `every` rounds
clients send their squared gradients, and the server protects the largest 1 - r of the kept weights of each tensor, r halving
every `half_life` rounds; of all others it takes those first whose importance g^2 for their time t is largest, while

    g^2 / t  >  (sum of g^2 so far) / (constant + sum of t so far)

The time of a weight is what its tensor costs, its FLOPs over its number of weights.

Deviates: density is an outcome in the paper; here it is met (budget = target), or not exceeded (cap), unless budget = paper.
Squared gradients are those of the batches of one pass at the model that was trained, not of all steps since the last time.
Times are FLOPs, not measured. Weights start as the job says; what the first client trained is not kept, only its mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.algorithms.base import Job, check_density, check_moves, weight
from fedsieve.local.executor import Client
from fedsieve.local.memory import training_memory
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks, Params
from fedsieve.settings import Count, CountOrZero, Density, NonNegative, Positive, Share, settings
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select, select_by_slot
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, mask, number, values, vector
from fedsieve.wire.versions import Known, Versions

Reply = tuple[Params | None, Masks | Tensor | None, float]
"""weights; masks of the first client, or squared gradients; weight in the mean"""


@dataclass(frozen=True, slots=True)
class State:
    """The global model and its masks after `round` rounds."""

    params: Params
    versions: Versions
    pruned: int
    """round in which one client pruned, 0 before"""
    times: Tensor
    """of a weight, float64 (maskable,), together 1"""
    round: int
    rounds: int
    streams: Streams
    momentum: bool
    client_memory: int | None = None


@settings
class PruneFL:
    """Prune at one client, then reconfigure the mask by importance and cost while training."""

    density: Density = 0.2
    """density of the maskable weights, in (0, 1]; see budget"""
    budget: Literal["target", "cap", "paper"] = "target"
    """density is met exactly (target); or it is the most, while importance pays for the time (cap); or that alone decides
    (paper)"""
    initial: Count = 5
    """passes over the first client's examples before round 1, each followed by a pruning, >= 1"""
    every: CountOrZero = 0
    """rounds between two reconfigurations, >= 0 (0: 50 as published, or half of the rounds where these are fewer than 100)"""
    stop: CountOrZero = 0
    """last round in which masks are reconfigured, >= 0 (0: the last but one; there is none in the last)"""
    free: Share = 0.3
    """share of a tensor's kept weights, the smallest, that a reconfiguration may drop at first, in [0, 1)"""
    half_life: Positive = 2000.0
    """rounds in which that share halves, > 0 (2,000: the published 10,000 steps at 5 a round)"""
    constant: NonNegative = 0.0
    """time of a round that no weight causes, as a multiple of the dense network's, >= 0 (budgets cap and paper)"""
    batches: CountOrZero = 0
    """batches whose squared gradients a client sends at a reconfiguration, >= 0 (0: all of its examples)"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in means of weights and squared gradients: its number of training examples, or the same for all"""

    @property
    def promises(self) -> Literal["exactly", "at most", "nothing"]:
        """How the density is kept."""
        kept: dict[str, Literal["exactly", "at most", "nothing"]] = {"target": "exactly", "cap": "at most", "paper": "nothing"}
        return kept[self.budget]

    def init(self, job: Job) -> State:
        """Start dense: the first client prunes."""
        check_density(job.layout, self.density)
        if self.free or self.budget == "paper":
            last = min(self.stop or job.rounds, job.rounds - 1)
            check_moves(job, self._every(job.rounds), last, "algorithm.free = 0 with budget = target or cap")
        versions = Versions.start(Masks.full(job.layout), job.clients)
        times, momentum = _times(job.spec), job.local.momentum > 0
        return State(job.start, versions, 0, times, 0, job.rounds, job.streams, momentum)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Have one client prune; then send the model and the masks as far as a client lacks them."""
        layout, round = state.params.layout, state.round + 1
        if not state.pruned:
            first = cohort[int(state.streams.at(round=round)("first").choice(len(cohort), 1)[0])]
            return {first: Message("setup", round, layout, {"weights": dense(state.params)})}
        common = {"weights": values(state.params, state.versions.masks), "score": number(int(self._moves(state)))}
        told = state.versions.sections(cohort)
        made = {id(each): Message("train", round, layout, {**each, **common}) for each in told.values()}
        return {client: made[id(told[client])] for client in cohort}

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known | None]:
        """Prune; or train, and square gradients."""
        if request.kind == "setup":
            return request.reply(mask=mask(self._prune(request.dense("weights"), client))), mine
        masks, known = Known.told(request, mine)
        trained = client.train(request.values("weights", masks), masks=masks)
        sections = {"weights": values(trained.params, masks)}
        if request.number("score"):
            sections["importance"] = vector(self._importance(trained.params, masks, client, "importance"))
        return request.reply(**sections, examples=number(trained.examples), loss=number(trained.loss)), known

    def read(self, state: State, reply: Message) -> Reply:
        """Decode the first client's masks; or weights, and squared gradients."""
        masks = state.versions.masks
        if not state.pruned:
            found, most = reply.mask("mask"), self._most(masks.layout.maskable)
            if not 0 < found.count <= most or (self.budget == "target" and found.count < most):
                raise WireError(Reason.COUNT, 0, f"masks of {found.count} weights, not {most}")
            return None, found, 1.0
        params, importance = reply.values("weights", masks), None
        if self._moves(state):
            importance = reply.vector("importance")
            if len(importance) != masks.layout.maskable or (importance < 0).any():
                raise WireError(
                    Reason.RANGE, 0, f"{len(importance)} squared gradients, not {masks.layout.maskable} of 0 or more"
                )
        return params, importance, weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, Reply]]) -> State:
        """Take over the first client's masks; or average the model and reconfigure its masks."""
        layout, round, masks = state.params.layout, state.round + 1, state.versions.masks
        mean, importance, answered, first = WeightedMean(layout), torch.zeros(layout.maskable).double(), [], None
        for client, (params, scores, share) in replies:
            answered.append(client)
            if params is None:
                first = scores
                continue
            mean.add(params, share)
            if isinstance(scores, Tensor):
                importance.add_(scores, alpha=share)
        if isinstance(first, Masks):
            versions = Versions.start(first, len(state.versions.held))
            return replace(state, params=state.params.under(first), versions=versions, pruned=round)
        if not answered:
            return replace(state, round=round)
        params, versions = mean.value(), state.versions.answered(answered)
        held = Masks.full(layout) if state.pruned == round else masks  # the first client trained the dense network
        gathers = self._moves(state) or state.pruned == round
        memory = training_memory(held, momentum=state.momentum, dense=layout.maskable * gathers)
        if self._moves(state):
            free, ties = self.free * 0.5 ** (round / self.half_life), state.streams.at(round=round)("reconfigure")
            masks = self.reconfigure(params, masks, importance, state.times, free, self._most(layout.maskable), ties)
            versions = versions.changed(masks)
        return replace(state, params=params.under(masks), versions=versions, round=round, client_memory=memory)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its masks."""
        return state.params, state.versions.masks

    def reconfigure(
        self, params: Params, masks: Masks, importance: Tensor, times: Tensor, free: float, most: int, ties: Stream
    ) -> Masks:
        """Return masks of at most `most` weights: the largest kept ones of each tensor, then by importance for the time."""
        scale = (1 - free) * min(1.0, most / max(1, masks.count))
        wanted = {name: min(count, max(1, int(scale * count))) for name, count in masks.counts().items()}
        protected = select_by_slot(magnitude(params), wanted, within=masks, ties=ties)
        if protected.count >= most:
            return select(magnitude(params), most, within=protected, ties=ties)
        others = Masks(masks.layout, ~protected.kept)
        score, count = importance.double() / times, most - protected.count
        if self.budget != "target":
            count = min(count, paying(importance, times, protected, self.constant))
        return Masks(masks.layout, protected.kept | select(score, count, within=others, ties=ties).kept)

    def _prune(self, params: Params, client: Client) -> Masks:
        masks, times = Masks.full(client.layout), _times(client.spec)
        for step in range(1, self.initial + 1):
            params = client.train(params, masks=masks, epochs=1, purpose=f"initial/{step}").params
            importance = self._importance(params, masks, client, f"initial/{step}/importance")
            share, ties = step / self.initial, client.stream(f"initial/{step}/ties")
            most = self._most(client.layout.maskable, share)
            masks = self.reconfigure(params, masks, importance.double(), times, self.free, most, ties)
            params = params.under(masks)
        return masks

    def _importance(self, params: Params, masks: Masks, client: Client, purpose: str) -> Tensor:
        return client.gradients(params, masks, batches=self.batches or None, power=2, purpose=purpose).maskable

    def _most(self, maskable: int, share: float = 1.0) -> int:
        """Weights that may be kept; with a share below 1, part of the way down from all."""
        return maskable if self.budget == "paper" else round(self.density**share * maskable)

    def _every(self, rounds: int) -> int:
        return self.every or max(1, min(50, rounds // 2))

    def _moves(self, state: State) -> bool:
        """Whether the coming round reconfigures."""
        t = state.round + 1
        return state.pruned > 0 and t % self._every(state.rounds) == 0 and t < state.rounds and t <= (self.stop or state.rounds)


def paying(importance: Tensor, times: Tensor, protected: Masks, constant: float) -> int:
    """Return how many weights pay beside the protected ones, taken by importance for the time, largest first.

    Each raises the ratio of all importance to all time, so the first one that does not is the last to look at.
    """
    gain, time, kept = importance.double().numpy(), times.numpy(), protected.kept.numpy()
    offered = np.flatnonzero(~kept)
    order = offered[np.argsort(-gain[offered] / time[offered], kind="stable")]
    gains = gain[kept].sum() + np.concatenate([[0.0], np.cumsum(gain[order])])[:-1]
    spent = constant + time[kept].sum() + np.concatenate([[0.0], np.cumsum(time[order])])[:-1]
    pays = gain[order] / time[order] > np.divide(gains, spent, out=np.zeros(len(order)), where=spent > 0)
    return int(len(order) if pays.all() else pays.argmin())


def _times(spec: ModelSpec) -> Tensor:
    """Return the time of each weight: FLOPs of its tensor over its number of weights, 2 at least; all together 1."""
    slots = spec.layout.masked_slots
    each = [torch.full((slot.numel,), max(2.0, spec.flops[slot.name] / slot.numel), dtype=torch.float64) for slot in slots]
    times = torch.cat(each)
    return times / times.sum()
