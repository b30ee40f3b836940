"""SCAFFOLD: correct the drift of clients by control variates (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

With P the parameters and T those of them that are trained:

    down  the global model and the server's control       32 P + 32 T bits a client
    up    the client's update and its control's change    32 P + 32 T bits, and its number of examples

A control variate estimates a mean gradient: c_i that of client i, kept by the client, and c that of all, kept by the server.
Each step of training moves along g - c_i + c. With x the global model, y the client's after K steps and N all clients:

    difference (option II)   c_i' = c_i - c + (x - y) / (K lr)       gradient (option I)   c_i' = gradient of client i at x
    server                   x += mean of y - x,   c += sum over the cohort of (c_i' - c_i) / N

For settings with few clients that come back: a control that is many rounds old corrects badly, and clients keep a state.

Deviates: with momentum (x - y) / lr is no sum of K gradients: option II as written would make controls too large, by up to
1 / (1 - momentum). We divide by the weight that the steps give to gradients (`gradient_weight`), K without momentum. If a reply
is lost, the client goes back to the control that the server knows of, so that c stays the mean of the c_i; it keeps both.
Option I takes the gradient over all of the client's examples, by batches, normalised as in training. The paper weights clients
alike; weighting = "examples" is our extension: c is then the mean by the numbers of examples that clients first reported, with
that of clients never seen taken as the mean of the others. The paper's server step is sgd with a learning rate (server.lr).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.aggregate.optim import Moments, ServerOptim, step
from fedsieve.algorithms.base import Job, weight
from fedsieve.errors import DataError
from fedsieve.local.executor import Client
from fedsieve.params import Layout, Masks, Params
from fedsieve.settings import settings
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, number, vector


@dataclass(frozen=True, slots=True)
class State:
    """The global model and the clients' controls, summed, after `round` rounds."""

    params: Params
    moments: Moments
    total: Tensor
    """sum over the clients of weight * control, float64 of shape (layout.trainable,)"""
    weights: Tensor
    """weight of each client's control, 0 for one that never answered; float64 of shape (clients,)"""
    held: Tensor
    """round of each client's control in the sum, 0 for none; int32 of shape (clients,)"""
    round: int

    @property
    def control(self) -> Tensor:
        """Mean of the clients' controls, zero for those that never answered; float32 of shape (layout.trainable,)."""
        known = self.weights[self.weights > 0]
        return (self.total / (known.mean() * len(self.weights))).float() if len(known) else self.total.float()


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps: controls by round, float32 of shape (layout.trainable,).

    They are that of its last round and that of the last round that the server knows of: they differ when a reply was lost.
    """

    controls: Mapping[int, Tensor]


class Reply(NamedTuple):
    """What the server uses of a reply."""

    update: Params
    change: Tensor
    """of the client's control, float32 of shape (layout.trainable,)"""
    share: float


@settings
class Scaffold:
    """Average updates of clients whose gradients are corrected by control variates."""

    control: Literal["difference", "gradient"] = "difference"
    """a client's new control: mean gradient of its training, from the difference of weights (difference, option II of the
    paper), or the gradient over all its examples at the global model (gradient, option I). That costs an epoch of gradients;
    in our tests on clients with few classes it went astray at learning rates that the other bears"""
    weighting: Literal["uniform", "examples"] = "uniform"
    """weight of a client in both means: the same for all, as in the paper, or its number of training examples"""
    server: ServerOptim = ServerOptim()
    """how the mean update is applied"""

    def init(self, job: Job) -> State:
        """Start from the job's parameters, all controls zero."""
        size = job.layout.trainable
        return State(
            job.start,
            Moments.start(self.server, size),
            total=torch.zeros(size, dtype=torch.float64),
            weights=torch.zeros(job.clients, dtype=torch.float64),
            held=torch.zeros(job.clients, dtype=torch.int32),
            round=0,
        )

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the global model, the server's control, and which of the client's own is in it."""
        bases = state.held[torch.tensor(cohort)].tolist()
        shared = {"weights": dense(state.params), "control": vector(state.control)}
        messages = {
            base: Message("train", state.round + 1, state.params.layout, {"base": number(base)} | shared) for base in set(bases)
        }
        return {client: messages[base] for client, base in zip(cohort, bases, strict=True)}

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine]:
        """Train with corrected gradients; send the differences of weights and control."""
        base, held = int(request.number("base")), mine.controls if mine else {}
        if base and base not in held:
            raise DataError(f"client {client.id} does not hold its control of round {base}, which the server builds on.")
        start, common = request.dense("weights"), _control(request, "control", client.layout)
        own = held[base] if base else torch.zeros_like(common)
        trained = client.train(start, drift=common - own)
        if self.control == "gradient":
            new = client.gradients(start, batches=None, training=True).trainable.clone()
        else:
            moved = start.trainable - trained.params.trainable
            new = own - common + moved / (client.lr * client.gradient_weight(trained.steps))
        reply = request.reply(
            update=dense(trained.params - start),
            change=vector(new - own),
            examples=number(trained.examples),
            loss=number(trained.loss),
        )
        return reply, Mine({base: own, request.round: new} if base else {request.round: new})

    def read(self, state: State, reply: Message) -> Reply:
        """Decode both differences and the client's weight."""
        change = _control(reply, "change", state.params.layout)
        return Reply(reply.dense("update"), change, weight(reply, self.weighting))

    def aggregate(self, state: State, replies: Iterable[tuple[int, Reply]]) -> State:
        """Apply the mean of the updates, and add up the changes of the controls."""
        mean, total = WeightedMean(state.params.layout), state.total.clone()
        weights, held, round = state.weights.clone(), state.held.clone(), state.round + 1
        for client, (update, change, share) in replies:
            mean.add(update, share)
            if not weights[client]:
                weights[client] = share
            total.add_(change, alpha=float(weights[client]))
            held[client] = round
        if not mean.weight:
            return State(state.params, state.moments, state.total, state.weights, state.held, round)
        params, moments = step(self.server, state.params, mean.value(), state.moments)
        return State(params, moments, total, weights, held, round)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model, nothing pruned."""
        return state.params, Masks.full(state.params.layout)


def _control(message: Message, name: str, layout: Layout) -> Tensor:
    """Read a control, or the change of one."""
    found = message.vector(name)
    if found.shape != (layout.trainable,) or found.dtype != torch.float32:
        raise WireError(
            Reason.COUNT, 0, f"{name} is {len(found)} numbers of {found.dtype}, not {layout.trainable} of torch.float32"
        )
    return found
