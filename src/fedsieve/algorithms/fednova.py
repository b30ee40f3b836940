"""FedNova: average updates over the work that is in them (Wang et al. 2020, arXiv 2007.07481).

    down  the global model      32 P bits a client (16 with wire = fp16 or bf16)
    up    the client's update   32 P bits, its numbers of examples and steps, and the norm of its steps

A client's update is -lr * sum_k a_k g_k over its steps k; the vector a says how much of each gradient is left at the end. Plain
SGD has a_k = 1 and ||a||_1 = number of steps; momentum and the proximal term change it (`gradient_weight` in `local/optim.py`).
With p the clients' weights, which sum to 1:

    w += tau * sum_i p_i update_i / ||a_i||_1        tau = sum_i p_i ||a_i||_1

So a client that takes more steps does not count for more, as it does in FedAvg. If all take equally many, it is FedAvg.

Deviates: the sum runs over the clients that answered, p being renormalised. ||a||_1 is exact for momentum and proximal term
together and for Nesterov's form, where the published code adds up an approximation. With mu > 0 the published code takes tau =
sum_i p_i steps_i (effective = "steps"). Weight decay counts as part of the gradient. Statistics are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.aggregate.optim import Moments, ServerOptim, step
from fedsieve.algorithms.base import Job, weight
from fedsieve.local.executor import Client
from fedsieve.params import Masks, Params
from fedsieve.settings import NonNegative, settings
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, number


@dataclass(frozen=True, slots=True)
class State:
    """The global model and the server optimiser's moments after `round` rounds."""

    params: Params
    moments: Moments
    round: int


class Reply(NamedTuple):
    """What the server uses of a reply."""

    normalised: Params
    """update over ||a||_1; statistics as they are"""
    work: float
    """what the client adds to tau"""
    share: float


@settings
class FedNova:
    """Average the clients' updates over the work that is in each."""

    mu: NonNegative = 0.0
    """weight of a proximal term (mu/2)||w - w_global||^2 in the clients' loss, >= 0 (0: none)"""
    effective: Literal["norms", "steps"] = "norms"
    """tau: weighted mean of the clients' ||a||_1 (norms), or of their numbers of steps, as in the published code with mu > 0"""
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
        """Train from the global model; send the difference and how much work is in it."""
        start = request.dense("weights")
        trained = client.train(start, proximal=self.mu)
        reply = request.reply(
            update=dense(trained.params - start, self.wire),
            steps=number(trained.steps),
            norm=number(client.gradient_weight(trained.steps, proximal=self.mu)),
            examples=number(trained.examples),
            loss=number(trained.loss),
        )
        return reply, None

    def read(self, state: State, reply: Message) -> Reply:
        """Decode an update, normalise it, and decode its weight."""
        steps, norm = reply.number("steps"), reply.number("norm")
        for name, value in (("steps", steps), ("norm", norm)):
            if not 1 <= value <= 2**48:
                raise WireError(Reason.RANGE, 0, f"{name} is {value}, not in [1, 2**48]")
        flat = reply.dense("update").flat.clone()
        flat[: state.params.layout.trainable] /= norm
        work = float(norm if self.effective == "norms" else steps)
        return Reply(Params(state.params.layout, flat), work, weight(reply, self.weighting))

    def aggregate(self, state: State, replies: Iterable[tuple[int, Reply]]) -> State:
        """Apply the mean of the normalised updates, scaled by the mean work."""
        mean, work = WeightedMean(state.params.layout), 0.0
        for _, reply in replies:
            mean.add(reply.normalised, reply.share)
            work += reply.share * reply.work
        if not mean.weight:
            return State(state.params, state.moments, state.round + 1)
        update = mean.value()
        update.trainable.mul_(work / mean.weight)
        params, moments = step(self.server, state.params, update, state.moments)
        return State(params, moments, state.round + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model, nothing pruned."""
        return state.params, Masks.full(state.params.layout)
