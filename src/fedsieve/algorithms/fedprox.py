"""FedProx: FedAvg with a proximal term in the clients' loss (Li et al. 2020, arXiv 1812.06127, equation 2).

    down  the global model      32 P bits a client (16 with wire = fp16 or bf16)
    up    the client's update   32 P bits, and its number of examples

A client minimises its loss + (mu/2) ||w - w_global||^2 over what is trained. With mu = 0 it is FedAvg, bit for bit. The
`train_loss` of the record is the loss without this term.

Deviates: clients are drawn alike and weighted by examples (`weighting`); the paper draws them by examples and weights them
alike. All train the same number of epochs; the paper also studies slow clients that do less. The paper tunes mu for each data
set; our default is for a first try.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.aggregate.optim import Moments, ServerOptim, step
from fedsieve.algorithms.base import Job, weight
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import NonNegative, settings
from fedsieve.wire.message import Message
from fedsieve.wire.sections import dense, number


@dataclass(frozen=True, slots=True)
class State:
    """The global model and the server optimiser's moments after `round` rounds."""

    params: Params
    moments: Moments
    round: int


@settings
class FedProx:
    """Average the updates of clients that are held near the global model."""

    mu: NonNegative = 0.01
    """weight of the proximal term, >= 0 (0: FedAvg); local.lr * mu should stay below 1"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""
    wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    """number format of model and update on the wire; the server keeps fp32"""
    server: ServerOptim = ServerOptim()
    """how the mean update is applied"""

    def init(self, job: Job) -> State:
        """Start from the job's parameters."""
        return State(job.start, Moments.start(self.server, job.layout.trainable), round=0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the global model to all."""
        weights = dense(state.params, self.wire)
        return dict.fromkeys(cohort, Message("train", state.round + 1, state.params.layout, {"weights": weights}))

    def client_update(self, request: Message, client: Client, mine: None) -> tuple[Message, None]:
        """Train near the global model and send the difference."""
        start = request.dense("weights")
        trained = client.train(start, proximal=self.mu)
        update = dense(trained.params - start, self.wire)
        return request.reply(update=update, examples=number(trained.examples), loss=number(trained.loss)), None

    def read(self, state: State, reply: Message) -> tuple[Params, float]:
        """Decode an update and its weight."""
        return reply.dense("update"), weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, float]]]) -> State:
        """Apply the weighted mean of the updates."""
        mean = WeightedMean(state.params.layout)
        for _, (update, share) in replies:
            mean.add(update, share)
        if not mean.weight:
            return State(state.params, state.moments, state.round + 1)
        params, moments = step(self.server, state.params, mean.value(), state.moments)
        return State(params, moments, state.round + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model, nothing pruned."""
        return state.params, Masks.full(state.params.layout)
