"""LotteryFL: each client prunes a network of its own and rewinds it to the start (Li et al. 2020, arXiv 2008.03371).

With d_k the density of client k's own mask, d_k' of the one before, P the maskable weights, H the binary entropy in bits:

    down  weights that the client's own mask keeps           32 d_k P bits
          to a client that never answered: start and model   32 P each; in round 1 they are the same and sent once
    up    its own mask within the one before, and weights    d_k' P H(d_k / d_k'), nothing if it stays; 32 d_k P

and 32 bits for every element that is not maskable wherever weights are sent. Start and masks stay at the client.

A client that is asked looks how the global model does under its own mask. If that is better than `threshold` it removes the
share `rate` of the smallest weights of each tensor and sets what is left, biases too, to where the federation started; then it
trains. The server averages each weight over the clients that sent it, and keeps the old value where none did.

`density` is a client's, reached exactly once it has pruned log(density) / log(1 - rate) times. The global model is dense: each
client is evaluated with the weights that its own mask keeps, as they are now.

Deviates: the threshold is for accuracy on the client's training examples; the published code decides by its test examples. The
published figure, each client's best accuracy ever on test examples, is not made. The last prune stops at `density`; the
published code goes below it. Normalisation is not pruned; there it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsieve.aggregate.mean import HeldMean
from fedsieve.algorithms.base import Job, check_density, measured, weight
from fedsieve.errors import DataError
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import Density, Threshold, settings
from fedsieve.sparsity.allocate import uniform
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot
from fedsieve.streams import Stream
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, mask, number, values

Content = tuple[int, Params, Masks, float]
"""who says that it sent this, its weights, its mask, its weight in the mean"""


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and what each client is known to hold."""

    params: Params
    start: Params
    masks: Mapping[int, Masks]
    """own mask of each client that ever answered"""
    held: Tensor
    """round in which each client sent that, 0 for never; int32 of shape (clients,)"""
    round: int


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps."""

    start: Params
    masks: Mapping[int, Masks]
    """own masks by round: of its last reply, and of the last one that the server knew of; they differ if a reply was lost"""


@settings
class LotteryFL:
    """A network of its own for each client, pruned step by step and rewound to the start."""

    density: Density = 0.1
    """density of the maskable weights at which a client stops to prune, in (0, 1]"""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share of the weights left in each tensor that a client prunes at once, in (0, 1)"""
    threshold: Threshold = 0.2
    """accuracy on its own training examples above which a client prunes, in [0, 1]"""
    weighting: Literal["examples", "uniform"] = "uniform"
    """weight of a client in the mean: its number of training examples, or the same for all, as published"""

    @property
    def promises(self) -> Literal["exactly", "at most", "nothing"]:
        """What the global model's density says of `density`: nothing, it is dense; a client's own is sparse."""
        return "nothing"

    def init(self, job: Job) -> State:
        """Start dense."""
        check_density(job.layout, self.density)
        return State(job.start, job.start, {}, torch.zeros(job.clients, dtype=torch.int32), 0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send each client the weights that its own mask keeps, and a new one all of them and the start."""
        new = {"base": number(0), "start": dense(state.start)}
        if not torch.equal(state.params.flat, state.start.flat):
            new["weights"] = dense(state.params)
        first = Message("train", state.round + 1, state.params.layout, new)
        return {client: self._own("train", state, client) or first for client in cohort}

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine]:
        """Prune and rewind if the model is good enough, then train."""
        base = int(request.number("base"))
        if base:
            start, before = _known(mine, base, client)
            params = request.values("weights", before)
        else:
            start, before = request.dense("start"), Masks.full(client.layout)
            params = request.dense("weights") if "weights" in request.sections else start
        own = before
        if before.count > self._least(before) and client.evaluate_training(params, before).accuracy > self.threshold:
            own = self._pruned(params, before, client.stream("prune"))
            params = start.under(own)
        trained = client.train(params, masks=own if own.density < 1 else None)
        reply = request.reply(
            client=number(client.id),
            mask=mask(own, within=before),
            weights=values(trained.params, own),
            examples=number(trained.examples),
            loss=number(trained.loss),
        )
        return reply, Mine(start, {base: before, request.round: own} if base else {request.round: own})

    def read(self, state: State, reply: Message) -> Content:
        """Decode a client's mask within its last one, its weights, and its weight in the mean."""
        client = reply.number("client")
        if client not in range(len(state.held)):
            raise WireError(Reason.RANGE, 0, f"the reply says it is of client {client}; there are {len(state.held)}")
        client = int(client)
        own = reply.mask("mask", within=state.masks.get(client, Masks.full(state.params.layout)))
        return client, reply.values("weights", own), own, weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, Content]]) -> State:
        """Average each weight over those who hold it. Who speaks for another client is not heard."""
        mean, masks, held = HeldMean(state.params.layout), dict(state.masks), state.held.clone()
        for client, (claimed, params, own, share) in replies:
            if claimed != client:
                continue
            mean.add(params, own, share)
            masks[client], held[client] = own, state.round + 1
        if not mean.weight:
            return replace(state, round=state.round + 1)
        return State(mean.value(state.params), state.start, masks, held, state.round + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model, which no client uses as a whole."""
        return state.params, Masks.full(state.params.layout)

    def evaluation(self, state: State, clients: Sequence[int], epochs: int) -> Mapping[int, Message]:
        """Ask clients how the global model does under their own masks; those that have none use all of it."""
        new = Message(
            "eval",
            state.round,
            state.params.layout,
            {"base": number(0), "epochs": number(epochs), "weights": dense(state.params)},
        )
        return {client: self._own("eval", state, client, epochs) or new for client in clients}

    def client_evaluate(self, request: Message, client: Client, mine: Mine | None) -> Message:
        """Evaluate under the client's own mask."""
        base, epochs = int(request.number("base")), int(request.number("epochs"))
        masks = _known(mine, base, client)[1] if base else None
        params = request.dense("weights") if masks is None else request.values("weights", masks)
        return request.reply(counts=measured(client, params, masks, epochs))

    def _own(self, kind: str, state: State, client: int, epochs: int = 0) -> Message | None:
        """Return a request with the weights that a client's own mask keeps; None for a client that never answered."""
        masks = state.masks.get(client)
        if masks is None:
            return None
        sections = {"base": number(int(state.held[client])), "weights": values(state.params, masks)}
        if kind == "eval":
            sections["epochs"] = number(epochs)
        return Message(kind, state.round + (kind == "train"), state.params.layout, sections)

    def _least(self, masks: Masks) -> int:
        """Weights that a client keeps in the end."""
        return round(self.density * masks.layout.maskable)

    def _pruned(self, params: Params, masks: Masks, ties: Stream) -> Masks:
        """Remove the smallest weights of each tensor, none beyond its share of `density`."""
        least = uniform(masks.layout, self._least(masks))
        keep = {name: max(count, floor((1 - self.rate) * int(masks[name].sum()) + 1e-9)) for name, count in least.items()}
        return select_by_slot(magnitude(params), keep, within=masks, ties=ties)


def _known(mine: Mine | None, base: int, client: Client) -> tuple[Params, Masks]:
    """Return start and own mask of a client."""
    if mine is None or base not in mine.masks:
        raise DataError(f"client {client.id} does not hold its mask of round {base}, which the server builds on.")
    return mine.start, mine.masks[base]
