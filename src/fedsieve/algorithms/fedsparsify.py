"""FedSparsify: purge, merge, tune (Stripelis et al. 2022, arXiv 2204.12430).

With d the density of the global mask, d' that of the one a client last held, s the density scheduled for the round, P the
maskable weights and H the binary entropy in bits:

    down  weights kept, and how the mask shrank since the client's last round    32 d P + d' P H(d / d')
    up    variant global: weights kept                                           32 d P
          variant local:  weights the client keeps, and its sparser mask         32 s P + d P H(s / d)

and in each direction 32 bits for every element of a tensor that is not maskable. A client that missed rounds pays for what
it lacks; one that never took part gets the whole mask, P H(d).

Global: the server purges after each merge. Local: each client purges after training, the server keeps a weight by vote.

Deviates: biases and normalisation are not ranked; the published code ranks every trained tensor (model.maskable = "all"). A
vote needs a majority; the published code keeps a weight with half of the votes (vote = "repo"). Clients start each round
without momentum; the published code lets it survive (client_momentum = "kept"). Ties are drawn; the published code keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsieve.aggregate.mean import Votes, WeightedMean
from fedsieve.algorithms.base import Job, check_density, check_voters, weight
from fedsieve.errors import DataError, UsageError
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import Count, CountOrZero, Density, Positive, settings
from fedsieve.sparsity.allocate import uniform
from fedsieve.sparsity.schedule import polynomial
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select, select_by_slot
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message
from fedsieve.wire.sections import mask, number, values


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and what each client holds of its mask."""

    params: Params
    removed: Tensor
    """round in which each maskable weight was removed, 0 while it is kept; int32 of shape (layout.maskable,)"""
    held: Tensor
    """round whose mask each client holds, 0 for none; int32 of shape (clients,)"""
    round: int
    rounds: int
    streams: Streams

    @property
    def masks(self) -> Masks:
        """The global mask."""
        return Masks(self.params.layout, self.removed == 0)

    def masks_of(self, round: int) -> Masks:
        """The mask that was broadcast in a round."""
        return Masks(self.params.layout, (self.removed == 0) | (self.removed >= round))


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps: masks by round, and the velocity of its SGD if that survives.

    The masks are those of its last round and of the last round that the server knows of: they differ when a reply was lost.
    """

    masks: Mapping[int, Masks]
    momentum: Tensor | None


@settings
class FedSparsify:
    """Prune by magnitude while training, round by round, on a cubic schedule."""

    variant: Literal["global", "local"] = "global"
    """who purges: the server after each merge (global), or each client, with a majority vote at the server (local)"""
    density: Density = 0.05
    """density of the maskable weights after the last round, in (0, 1]"""
    first: Count = 1
    """round without purge, >= 1: the schedule starts here, the first purge falls in the next round"""
    every: Count = 1
    """rounds between purges, >= 1"""
    power: Positive = 3.0
    """exponent of the schedule, > 0 (3: cubic); larger prunes earlier"""
    ranking: Literal["global", "layer"] = "global"
    """rank magnitudes over the whole network, or in each tensor separately"""
    vote: Literal["majority", "repo"] = "majority"
    """variant local keeps a weight with floor(n/2)+1 of n votes (majority), or floor(n/2), as the published code does (repo)"""
    tune_epochs: CountOrZero = 0
    """variant local: epochs of training under the client's own mask after its purge, >= 0"""
    client_momentum: Literal["fresh", "kept"] = "fresh"
    """velocity of a client's SGD at the start of its round: zero, or kept from its last round, as the published code does"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Start dense."""
        if job.rounds <= self.first:
            raise UsageError(
                f"algorithm.first = {self.first} leaves no round to purge in: engine.rounds = {job.rounds} must be larger."
            )
        check_density(job.layout, self.density)
        if job.rounds % self.every:
            last = job.rounds // self.every * self.every
            said = f"purges after round {last} last, short of algorithm.density" if last else "would purge after no round"
            raise UsageError(
                f"algorithm.every = {self.every} {said}, if engine.rounds = {job.rounds}.\n"
                f"Set engine.rounds to a multiple of algorithm.every, such as {last + self.every}."
            )
        if self.variant == "local":
            check_voters(job, 2, "algorithm.variant = local keeps weights by a vote, which", "algorithm.variant = global")
        removed = torch.zeros(job.layout.maskable, dtype=torch.int32)
        held = torch.zeros(job.clients, dtype=torch.int32)
        return State(job.start, removed, held, round=0, rounds=job.rounds, streams=job.streams)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the kept weights, and the mask against the one that each client holds."""
        masks, bases = state.masks, state.held[torch.tensor(cohort)].tolist()
        weights = values(state.params, masks)
        messages = {
            base: Message(
                "train",
                state.round + 1,
                state.params.layout,
                {
                    "base": number(base),
                    "mask": mask(masks, within=state.masks_of(base) if base else None),
                    "weights": weights,
                },
            )
            for base in set(bases)
        }
        return {client: messages[base] for client, base in zip(cohort, bases, strict=True)}

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine]:
        """Train under the mask; variant local then purges and sends its own mask too."""
        base = int(request.number("base"))
        held = mine.masks if mine else {}
        if base and base not in held:
            raise DataError(f"client {client.id} does not hold the mask of round {base}, which the server builds on.")
        masks = request.mask("mask", within=held.get(base))
        momentum = mine.momentum if mine else None
        trained = client.train(request.values("weights", masks), masks=masks, momentum=momentum)
        if self.variant == "global":
            reply = request.reply(
                weights=values(trained.params, masks), examples=number(trained.examples), loss=number(trained.loss)
            )
        else:
            purged = self._purge(trained.params, masks, self._keep(masks, request.round, client.rounds), client.stream("purge"))
            params = trained.params
            if self.tune_epochs:
                params = client.train(params, masks=purged, epochs=self.tune_epochs, purpose="tune").params
            reply = request.reply(
                mask=mask(purged, within=masks),
                weights=values(params, purged),
                examples=number(trained.examples),
                loss=number(trained.loss),
            )
        kept = trained.momentum if self.client_momentum == "kept" else None
        return reply, Mine({base: held[base], request.round: masks} if base else {request.round: masks}, kept)

    def read(self, state: State, reply: Message) -> tuple[Params, Masks | None, float]:
        """Decode a client's weights, its own mask if it has one, and its weight."""
        own = None if self.variant == "global" else reply.mask("mask", within=state.masks)
        return reply.values("weights", state.masks if own is None else own), own, weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, Masks | None, float]]]) -> State:
        """Merge, then purge (variant global) or count the votes (variant local)."""
        masks, round = state.masks, state.round + 1
        mean, votes, held = WeightedMean(state.params.layout), Votes(state.params.layout), state.held.clone()
        for client, (params, own, share) in replies:
            mean.add(params, share)  # zeros of those who purged are averaged in, as published
            if own is not None:
                votes.add(own)
            held[client] = round
        params = state.params
        if mean.weight:
            params = mean.value()
            if self.variant == "global":
                masks = self._purge(
                    params, masks, self._keep(masks, round, state.rounds), state.streams.at(round=round)("purge")
                )
            else:
                masks = votes.at_least(votes.voters // 2 + (self.vote == "majority"))
        removed = torch.where((state.removed == 0) & ~masks.kept, round, state.removed)
        return State(params.under(masks), removed, held, round, state.rounds, state.streams)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its mask."""
        return state.params, state.masks

    def _keep(self, masks: Masks, round_: int, rounds: int) -> int:
        """Number of weights that the schedule keeps after a round."""
        density = polynomial(
            round_, first=self.first, last=rounds, start=1.0, end=self.density, power=self.power, every=self.every
        )
        return round(density * masks.layout.maskable)

    def _purge(self, params: Params, masks: Masks, keep: int, ties: Stream) -> Masks:
        if self.ranking == "global":
            return select(magnitude(params), keep, within=masks, ties=ties)
        return select_by_slot(magnitude(params), uniform(masks.layout, keep), within=masks, ties=ties)
