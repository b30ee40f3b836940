"""FedPM: learn the probabilities of a random mask over frozen weights (Isik et al. 2023, arXiv 2209.15328).

With P the maskable weights, p their probabilities and H the binary entropy in bits:

    down  the seed of the weights, 64 bits; after the first merge each weight's votes, at most P log2(1 + votes) bits
          (weighting = examples: probabilities, 32 P bits; with bits = q: q P)
    up    one mask that the client drew                     at most P bits, sum H(p) at best; examples and loss

A client learns scores, of which sigmoid makes probabilities; a mask is drawn anew in each step. With a `density` it first
moves all scores by one number, so that the probabilities have that mean: masks would else become denser than the final one.
The server counts the masks of a round: with the prior Beta(1, 1) the mode of the posterior is their mean.

Deviates: Adam's moments begin at zero in each round; in the published code each client keeps them. Biases are zero; the
published code masks them too, and tests by a mask drawn for each batch; here one is drawn a round (mask = sample), or what is
likelier than not is kept (threshold). `density` and `penalty` are ours, to compare methods at the same density.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import e
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsieve.algorithms.base import Job, check_density, check_voters, weight
from fedsieve.local.executor import Client
from fedsieve.models.frozen import Magnitudes, check, frozen
from fedsieve.params import Layout, Masks, Params
from fedsieve.reparam.bernoulli import BernoulliMask
from fedsieve.settings import Count, Density, NonNegative, Positive, settings
from fedsieve.sparsity.select import select
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import integers, mask, number, seed
from fedsieve.wire.shares import read_shares, shares

BOUND = 0.01
"""least and, from 1, largest probability whose score is taken; with a density at most a hundredth of it"""
RATES = {"adam": 0.1, "sgd": 100.0}
"""learning rates unless another is set"""


@dataclass(frozen=True, slots=True)
class State:
    """The probabilities after `round` rounds, and the votes that they come from."""

    params: Params
    """frozen weights"""
    probabilities: Tensor
    """float32 of shape (layout.maskable,)"""
    ones: Tensor
    """weight of the votes to keep since the prior was last reset, float64 of shape (layout.maskable,)"""
    votes: float
    """weight of all votes since then"""
    merges: int
    seed: int
    streams: Streams
    round: int


@settings
class FedPM:
    """Learn with what probability a weight of a random network is kept."""

    own_start: ClassVar[bool] = True
    density: Density | None = None
    """density of the final mask, in (0, 1]: the most probable weights are kept; None: as `mask` says"""
    mask: Literal["threshold", "sample"] = "threshold"
    """final mask without a density: what is likelier kept than not, or one drawn by the probabilities"""
    magnitudes: Magnitudes = "constant"
    """size of the weights: the same in each tensor (constant), or as drawn (kaiming)"""
    gain: Positive = e
    """constant magnitudes are gain / sqrt(fan_in), > 0 (the published code has e)"""
    start: Literal["density", "half", "uniform"] = "density"
    """first probabilities: `density` (1/2 without one), 1/2, or drawn from [0, 1)"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """by what clients learn scores, from zero moments in each round: Adam, or SGD, for which gradients are very small"""
    lr: Positive | None = None
    """learning rate of the scores in all rounds, > 0; None: 0.1 for adam, 100 for sgd"""
    penalty: NonNegative = 0.0
    """times the sum of the probabilities is added to the loss, >= 0"""
    bits: Annotated[int, Field(ge=0, le=16)] = 0
    """bits down for each probability, in [0, 16] (0: exactly; votes where all weigh alike, else floats)"""
    estimate: Literal["mode", "mean"] = "mode"
    """probability from the posterior Beta(1 + ones, 1 + zeros): ones / votes (mode), (1 + ones) / (2 + votes) (mean)"""
    reset: Count = 1
    """rounds with votes after which the prior is Beta(1, 1) again, >= 1"""
    weighting: Literal["examples", "uniform"] = "uniform"
    """weight of a client's mask: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Draw the network."""
        check(job.spec)
        check_density(job.layout, self.density)
        if self.estimate == "mode" and self.reset == 1:
            vote = "algorithm.estimate = mode, by which one vote makes every probability 0 or 1,"
            check_voters(job, 2, vote, "algorithm.estimate = mean, or algorithm.reset = 2 to count votes of more rounds")
        word, layout = job.streams("fedpm").word(), job.layout
        none = torch.zeros(layout.maskable, dtype=torch.float64)
        params, first = frozen(job.spec, word, self.magnitudes, self.gain), self._first(layout, word)
        return State(params, first, none, 0.0, 0, word, job.streams, round=0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the seed and the probabilities to all."""
        sections = {"seed": seed(state.seed)}
        if state.merges and self._counted:
            sections |= {"ones": integers(state.ones.long()), "votes": number(state.votes)}
        elif state.merges:
            sections["shares"] = shares(state.probabilities, self.bits)
        return dict.fromkeys(cohort, Message("train", state.round + 1, state.params.layout, sections))

    def client_update(self, request: Message, client: Client, mine: None) -> tuple[Message, None]:
        """Learn scores from the probabilities on, and send a mask drawn by them."""
        word, layout = request.seed("seed"), client.layout
        if "ones" in request.sections:
            before = self._estimated(*_votes(request))
        elif "shares" in request.sections:
            before = read_shares(request, "shares", self.bits, layout.maskable)
        else:
            before = self._first(layout, word)
        weights = frozen(client.spec, word, self.magnitudes, self.gain)
        trained = client.train(
            Params(layout, torch.cat([_scores(before, self.density), weights.dense])),
            reparam=BernoulliMask(weights.maskable, self.penalty),
            moves=torch.arange(layout.trainable) < layout.maskable,
            lr=self.lr or RATES[self.optimizer],
            adam=self.optimizer == "adam",
        )
        drawn = _drawn(layout, trained.params.maskable.sigmoid(), client.stream("mask"))
        return request.reply(mask=mask(drawn), examples=number(trained.examples), loss=number(trained.loss)), None

    def read(self, state: State, reply: Message) -> tuple[Masks, float]:
        """Decode a mask and its weight."""
        return reply.mask("mask"), weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Masks, float]]]) -> State:
        """Take the probabilities from the posterior."""
        fresh = state.merges % self.reset == 0
        ones, votes, before = state.ones * (not fresh), state.votes * (not fresh), 0.0 if fresh else state.votes
        for _, (voted, share) in replies:
            ones.add_(voted.kept, alpha=share)
            votes += share
        if votes == before:
            return replace(state, round=state.round + 1)
        found = self._estimated(ones, votes)
        return replace(state, probabilities=found, ones=ones, votes=votes, merges=state.merges + 1, round=state.round + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the weights under one mask."""
        layout, stream = state.params.layout, state.streams.at(round=state.merges)("mask")
        if self.density is not None:
            keep = round(self.density * layout.maskable)
            masks = select(state.probabilities, keep, within=Masks.full(layout), ties=stream)
        elif self.mask == "sample":
            masks = _drawn(layout, state.probabilities, stream)
        else:
            masks = Masks(layout, state.probabilities >= 0.5)
        return state.params.under(masks), masks

    @property
    def _counted(self) -> bool:
        """Whether votes are whole numbers, and sent as such."""
        return self.weighting == "uniform" and not self.bits

    def _estimated(self, ones: Tensor, votes: float) -> Tensor:
        """Return the probabilities that votes come to, float32."""
        return (ones / votes if self.estimate == "mode" else (1 + ones) / (2 + votes)).float()

    def _first(self, layout: Layout, word: int) -> Tensor:
        """Return the probabilities before anything is learned."""
        if self.start == "uniform":
            return torch.from_numpy(Streams(word)("probabilities").uniform(layout.maskable)).float()
        return torch.full((layout.maskable,), self.density if self.start == "density" and self.density else 0.5)


def _votes(request: Message) -> tuple[Tensor, float]:
    """Read each weight's votes, float64 of shape (layout.maskable,), and how many there could be.

    Raises:
        WireError: COUNT for another number of weights; RANGE for votes that cannot be.
    """
    ones, votes = request.integers("ones").double(), request.number("votes")
    if len(ones) != request.layout.maskable:
        raise WireError(Reason.COUNT, 0, f"votes on {len(ones)} weights, not {request.layout.maskable}")
    if not votes > 0 or not bool(((ones >= 0) & (ones <= votes)).all()):
        raise WireError(Reason.RANGE, 0, f"section 'ones' holds votes outside of [0, {votes}]")
    return ones, votes


def _scores(probabilities: Tensor, density: float | None) -> Tensor:
    """Return scores of probabilities; with a density all moved by one number, so that their probabilities have that mean."""
    bound = min(BOUND, (density or 1) / 100)
    scores = probabilities.clamp(bound, 1 - bound).logit()
    if density is None or density == 1:
        return scores
    low, high = -40.0, 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float((scores + middle).sigmoid().mean()) < density else (low, middle)
    return scores + high


def _drawn(layout: Layout, probabilities: Tensor, stream: Stream) -> Masks:
    """Draw a mask."""
    return Masks(layout, torch.from_numpy(stream.uniform(layout.maskable)) < probabilities)
