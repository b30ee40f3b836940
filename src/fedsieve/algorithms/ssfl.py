"""SSFL: one mask from the saliencies of many clients, then FedAvg under it (Ohib et al. 2024, arXiv 2405.09037).

With d the density, P the maskable weights, H the binary entropy in bits, and 32 bits more for every element that is not
maskable (Q of them) wherever weights are sent:

    set-up, once     down  to each client of the first cohort: the model    32 P bits
                     up    saliencies |g w| on a few of its batches         32 P, or 16 P with wire = fp16 (no Q)
    training         down  weights kept; the mask, once to each client      32 d P; P H(d)
                     up    weights kept                                     32 d P

The server averages the saliencies and keeps the highest of the whole network.

Deviates: saliencies are averaged by examples, as weights are; the published code averages saliencies alike (weighting = uniform
does so with both). The first cohort is asked; the published code asks all clients. A tensor keeps at least one weight (floor =
0: none, as published), so that none is cut off; that does not protect accuracy, for a layer of one weight passes next to
nothing. Exactly as many are kept as asked; the published code keeps ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.algorithms.base import Job, check_density, weight
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import CountOrZero, Density, settings
from fedsieve.sparsity.scores import sensitivity
from fedsieve.sparsity.select import at_floor, guarded
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, number, values, vector
from fedsieve.wire.versions import Known, Versions


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and who holds its mask."""

    params: Params
    versions: Versions | None
    """None: no client has sent its saliencies yet"""
    round: int
    clients: int
    streams: Streams
    events: tuple[str, ...] = ()
    """tensors that the guard may have kept from being cut off, in the round in which the mask was chosen"""


@settings
class Ssfl:
    """Prune before training by the mean saliency of the first cohort, then train under that mask."""

    density: Density = 0.05
    """density of the maskable weights from the start, in (0, 1]"""
    batches: CountOrZero = 1
    """batches that a client takes its gradient on, >= 0 (0: all its examples)"""
    wire: Literal["fp32", "fp16"] = "fp32"
    """number format of the saliencies on the wire; fp16 relative to a client's largest"""
    floor: CountOrZero = 1
    """weights that each tensor keeps at least, >= 0, so that none is cut off"""
    training: bool = False
    """take gradients as training computes, normalised by the batch and with dropout, not as evaluation does"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the means: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Start dense."""
        layout = job.layout
        check_density(layout, self.density, self.floor)
        return State(job.start, None, 0, job.clients, job.streams)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the model to be scored; later the kept weights, and the mask to those who lack it."""
        round = state.round + 1
        if state.versions is None:
            return dict.fromkeys(cohort, Message("setup", round, state.params.layout, {"weights": dense(state.params)}))
        return state.versions.messages("train", round, cohort, {"weights": values(state.params, state.versions.masks)})

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known | None]:
        """Score the weights on the client's own examples, or train under the mask that was sent."""
        if request.kind == "setup":
            start = request.dense("weights")
            gradient = client.gradients(start, batches=self.batches or None, training=self.training, purpose="scores")
            scores, half = sensitivity(start, gradient), self.wire == "fp16"
            peak = (float(scores.max()) if half else 0.0) or 1.0
            sent = vector((scores / peak).to(torch.float16 if half else torch.float32))
            return request.reply(scores=sent, peak=number(peak), examples=number(client.examples)), mine
        masks, known = Known.told(request, mine)
        trained = client.train(request.values("weights", masks), masks=masks)
        reply = request.reply(
            weights=values(trained.params, masks), examples=number(trained.examples), loss=number(trained.loss)
        )
        return reply, known

    def read(self, state: State, reply: Message) -> tuple[Params, float]:
        """Decode a client's saliencies or weights, and its weight in the mean."""
        share = weight(reply, self.weighting)
        if state.versions is not None:
            return reply.values("weights", state.versions.masks), share
        layout, sent, peak = state.params.layout, reply.vector("scores").float(), reply.number("peak")
        if len(sent) != layout.maskable:
            raise WireError(Reason.COUNT, 0, f"{len(sent)} saliencies of {layout.maskable} weights")
        if peak <= 0 or bool((sent < 0).any()):
            raise WireError(Reason.RANGE, 0, f"a saliency is negative, or the largest, {peak}, is not positive")
        scores = Params.zeros(layout)
        scores.maskable.copy_(sent * peak)
        if not bool(torch.isfinite(scores.flat).all()):
            raise WireError(Reason.NONFINITE, 0, f"saliencies relative to {peak} are not finite")
        return scores, share

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, float]]]) -> State:
        """Average the saliencies and choose the mask, which does not end the round; or average the weights."""
        mean, answered, round_ = WeightedMean(state.params.layout), [], state.round + 1
        for client, (params, share) in replies:
            mean.add(params, share)
            answered.append(client)
        if not mean.weight:
            return replace(state, round=round_)
        if state.versions is None:
            masks = self._choose(mean.value(), state.streams.at(round=round_))
            versions, events = Versions.start(masks, state.clients), at_floor(masks, self.floor)
            return replace(state, params=state.params.under(masks), versions=versions, events=events)
        events = () if state.versions.held.any() else state.events  # somebody trained under the mask before
        return replace(state, params=mean.value(), versions=state.versions.answered(answered), round=round_, events=events)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its mask."""
        return state.params, state.versions.masks if state.versions else Masks.full(state.params.layout)

    def _choose(self, scores: Params, streams: Streams) -> Masks:
        """Keep the weights with the highest mean saliency."""
        full = Masks.full(scores.layout)
        keep = round(self.density * scores.layout.maskable)
        return guarded(scores.maskable, keep, within=full, ties=streams("ties"), floor=self.floor)[0]
