"""Prune once, late, and tune; or remove weights by a fixed random order: two baselines of the FedSparsify study.

The study is Stripelis et al. 2022, arXiv 2204.12430. OneShot is the default: dense FedAvg up to ten rounds before the last,
then the server prunes by magnitude, and the rest is tuned. Random is score = random, schedule = cubic: one permutation of the
weights, drawn before round 1, says in which order they go. With score = magnitude the cubic schedule makes it FedSparsify.

With d the density of the global mask, P the maskable weights, H the binary entropy in bits:

    down  weights kept; how the mask changed since the last one a client holds, or all of it    32 d P; at most P H(d)
    up    weights kept                                                                         32 d P

and in each direction 32 bits for every element that is not maskable.

Deviates: a tensor keeps at least one weight (floor = 0: none, as published), so that none is cut off; that does not protect
accuracy, for a layer of one weight passes next to nothing. Biases and normalisation are not ranked (model.maskable = "all":
every trained tensor). Clients start each round without momentum. Where nobody answers in the round of the prune it falls in the
next one that has an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.algorithms.base import Job, check_density, weight
from fedsieve.errors import UsageError
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import CountOrZero, Density, settings
from fedsieve.sparsity.schedule import one_shot, polynomial
from fedsieve.sparsity.scores import magnitude, random
from fedsieve.sparsity.select import at_floor, guarded
from fedsieve.streams import Streams
from fedsieve.wire.message import Message
from fedsieve.wire.sections import number, values
from fedsieve.wire.versions import Known, Versions


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and who holds its mask."""

    params: Params
    versions: Versions
    round: int
    rounds: int
    streams: Streams
    events: tuple[str, ...] = ()
    """tensors that the guard may have kept from being cut off, in a round that prunes"""


@settings
class OneShot:
    """Train densely, prune once near the end, and tune."""

    density: Density = 0.05
    """density of the maskable weights at the end, in (0, 1]"""
    schedule: Literal["oneshot", "cubic"] = "oneshot"
    """prune once after round `at`, or after each round from the second on, by FedSparsify's cubic schedule"""
    at: CountOrZero = 0
    """schedule oneshot: round after which the server prunes, >= 0 (0: ten rounds before the last, or the first)"""
    score: Literal["magnitude", "random"] = "magnitude"
    """what a weight is kept for: its magnitude after the merge, or its place in a random order that is fixed before round 1"""
    floor: CountOrZero = 1
    """weights that each tensor keeps at least, >= 0, so that none is cut off"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Start dense."""
        if self.at > job.rounds:
            raise UsageError(f"algorithm.at = {self.at} is after the last round: engine.rounds = {job.rounds}.")
        if self.schedule == "cubic" and (job.rounds < 2 or self.at):
            raise UsageError(
                f"algorithm.schedule = cubic prunes from round 2 on: engine.rounds = {job.rounds} must be 2 or more, and "
                f"algorithm.at = {self.at} must be 0."
            )
        check_density(job.layout, self.density, self.floor)
        versions = Versions.start(Masks.full(job.layout), job.clients)
        return State(job.start, versions, round=0, rounds=job.rounds, streams=job.streams)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the kept weights, and the mask as far as a client lacks it."""
        weights = values(state.params, state.versions.masks)
        return state.versions.messages("train", state.round + 1, cohort, {"weights": weights})

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known]:
        """Train under the mask."""
        masks, known = Known.told(request, mine)
        trained = client.train(request.values("weights", masks), masks=masks if masks.density < 1 else None)
        reply = request.reply(
            weights=values(trained.params, masks), examples=number(trained.examples), loss=number(trained.loss)
        )
        return reply, known

    def read(self, state: State, reply: Message) -> tuple[Params, float]:
        """Decode a client's weights and its weight in the mean."""
        return reply.values("weights", state.versions.masks), weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, float]]]) -> State:
        """Average, then prune to what the schedule says."""
        mean, answered, round = WeightedMean(state.params.layout), [], state.round + 1
        for client, (params, share) in replies:
            mean.add(params, share)
            answered.append(client)
        if not mean.weight:
            return replace(state, round=round, events=())
        params = mean.value()
        masks = self._prune(params, state)
        versions = state.versions.answered(answered).changed(masks)
        events = at_floor(masks, self.floor) if versions.version > state.versions.version else ()
        return replace(state, params=params.under(masks), versions=versions, round=round, events=events)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its mask."""
        return state.params, state.versions.masks

    def _keep(self, state: State) -> int:
        """Number of weights to keep after the round under way."""
        rounds, t = state.rounds, state.round + 1
        if self.schedule == "cubic":
            density = polynomial(t, first=1, last=rounds, start=1.0, end=self.density)
        else:
            density = one_shot(t, at=self.at or max(1, rounds - 10), end=self.density)
        return round(density * state.params.layout.maskable)

    def _prune(self, params: Params, state: State) -> Masks:
        """Keep the highest scores; the random ones are the same in every round."""
        masks, keep = state.versions.masks, self._keep(state)
        if keep >= masks.count:
            return masks
        scores = magnitude(params) if self.score == "magnitude" else random(params.layout, state.streams("order"))
        ties = state.streams.at(round=state.round + 1)("ties")
        return guarded(scores, keep, within=masks, ties=ties, floor=self.floor)[0]
