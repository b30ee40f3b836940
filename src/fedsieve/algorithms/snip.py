"""Pruning at initialisation, then FedAvg under a mask that stays: SNIP, GraSP, SynFlow, magnitude or chance.

With d the density, P the maskable weights, H the binary entropy in bits, and 32 bits more for every element that is not
maskable wherever weights are sent:

    set-up, once     down  to one client: the model                      32 P bits     (scores snip and grasp only)
                     up    its mask, chosen there                        P H(d)
    training         down  weights kept; the mask, once to each client   32 d P; P H(d)
                     up    weights kept                                  32 d P

Scores, all at the start, larger = keep:

    snip       |g w|, g the gradient on a few batches of a client (Lee et al. 2019, arXiv 1810.02340, equation 5)
    grasp      w (H g), H the Hessian (Wang et al. 2020, arXiv 2002.07376)
    synflow    flow through the network, no data (Tanaka et al. 2020, arXiv 2006.05467)
    magnitude  |w|
    random     chance; densities of the tensors by rule (Gadhikar et al. 2023, arXiv 2210.02412)

That one random client scores on one batch is how the FedSparsify study (arXiv 2204.12430) has SNIP and GraSP as baselines.

Deviates: a tensor keeps at least one weight (floor = 0: none, as published), so that none is cut off; that does not protect
accuracy, for a layer of one weight passes next to nothing. Scores are taken in evaluation mode (training = true: as training
normalises). Scoring repeatedly (iterations) goes on at the client that was asked, so it costs no bytes. If
several clients are asked, those weights are kept that most of their masks keep. A random mask is sent like any other, not as a
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsieve.aggregate.mean import WeightedMean
from fedsieve.algorithms.base import Job, check_density, weight
from fedsieve.errors import UsageError
from fedsieve.local.executor import Client
from fedsieve.models.flow import Flow
from fedsieve.params import Layout, Masks, Params
from fedsieve.settings import Count, CountOrZero, Density, Positive, settings
from fedsieve.sparsity.allocate import allocate
from fedsieve.sparsity.scores import flow, magnitude, random, sensitivity
from fedsieve.sparsity.select import at_floor, narrowed, select_by_slot
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import dense, mask, number, values
from fedsieve.wire.versions import Known, Versions


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and who holds its mask."""

    params: Params
    versions: Versions | None
    """None: no client has sent a mask yet"""
    round: int
    clients: int
    streams: Streams
    events: tuple[str, ...] = ()
    """tensors that the guard may have kept from being cut off, in the round in which the mask was chosen"""


@settings
class Snip:
    """Prune before training by a score of each weight, then train under that mask."""

    score: Literal["snip", "grasp", "synflow", "magnitude", "random"] = "snip"
    """what a weight is kept for: at a client |g w| (snip) or w (H g) (grasp); at the server, with no data and no exchange, its
    share of the flow (synflow), |w| (magnitude), or chance (random)"""
    density: Density = 0.05
    """density of the maskable weights from the start, in (0, 1]"""
    batches: CountOrZero = 1
    """batches that a client scores on, >= 0 (0: all its examples); one that holds fewer scores on all it has"""
    clients: Count = 1
    """clients of the first cohort that are asked for a mask, >= 1"""
    iterations: CountOrZero = 0
    """steps of equal factors, each with new scores, >= 0 (0: 100 for synflow, 1 for the others)"""
    allocation: Literal["global", "uniform", "erk", "er", "balanced", "pyramidal"] = "global"
    """rank scores over the whole network (global), or in each tensor, with densities by a rule; then in one step"""
    paper: bool = False
    """allocation as the published codes have it: what is too much for one tensor is lost, so fewer weights are kept"""
    floor: CountOrZero = 1
    """weights that each tensor keeps at least, >= 0, so that none is cut off; not with `paper`"""
    temperature: Positive = 200.0
    """grasp divides the network's outputs by it before the loss, > 0"""
    training: bool = False
    """score as training computes, normalised by the batch and with dropout, not as evaluation does"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""

    @property
    def promises(self) -> Literal["exactly", "at most", "nothing"]:
        """Whether the model ends at `density`, or keeps fewer weights."""
        return "at most" if self.paper else "exactly"

    def init(self, job: Job) -> State:
        """Start dense where clients score, else pruned."""
        self._check(job)
        if self.score in ("snip", "grasp"):
            return State(job.start, None, 0, job.clients, job.streams)
        scores: Callable[[Masks], Tensor]
        if self.score == "synflow":
            through = Flow(job.spec)
            scores = lambda masks: through(job.start, masks)  # noqa: E731
        else:
            once = magnitude(job.start) if self.score == "magnitude" else random(job.layout, job.streams("scores"))
            scores = lambda _: once  # noqa: E731
        masks = self._choose(job.layout, scores, job.streams("ties"))
        versions = Versions.start(masks, job.clients)
        return State(job.start.under(masks), versions, 0, job.clients, job.streams, at_floor(masks, self.floor))

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Ask a few for a mask, or send the kept weights to all, and the mask to those who lack it."""
        round = state.round + 1
        if state.versions is None:
            drawn = state.streams.at(round=round)("asked").choice(len(cohort), min(self.clients, len(cohort)))
            ask = Message("setup", round, state.params.layout, {"weights": dense(state.params)})
            return {cohort[int(place)]: ask for place in drawn}
        return state.versions.messages("train", round, cohort, {"weights": values(state.params, state.versions.masks)})

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known | None]:
        """Choose a mask by the client's own examples, or train under the one that was sent."""
        if request.kind == "setup":
            start = request.dense("weights")
            masks = self._choose(client.layout, lambda masks: self._saliency(start, masks, client), client.stream("ties"))
            return request.reply(mask=mask(masks)), mine
        masks, known = Known.told(request, mine)
        trained = client.train(request.values("weights", masks), masks=masks)
        reply = request.reply(
            weights=values(trained.params, masks), examples=number(trained.examples), loss=number(trained.loss)
        )
        return reply, known

    def read(self, state: State, reply: Message) -> tuple[Params, Masks | None, float]:
        """Decode a mask, or a client's weights and its weight in the mean."""
        if state.versions is not None:
            return reply.values("weights", state.versions.masks), None, weight(reply, self.weighting)
        masks, wanted = reply.mask("mask"), self._count(state.params.layout)
        if masks.count != wanted:
            raise WireError(Reason.COUNT, 0, f"the mask keeps {masks.count} weights, not {wanted}")
        return state.params, masks, 1.0

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, Masks | None, float]]]) -> State:
        """Adopt the mask, which does not end the round; or average the weights."""
        layout, round = state.params.layout, state.round + 1
        if state.versions is None:
            votes = torch.zeros(layout.maskable, dtype=torch.int32)
            for _, (_, masks, _) in replies:
                if masks is not None:
                    votes += masks.kept
            if not votes.any():
                return replace(state, round=round)
            chosen = self._choose(layout, lambda _: votes, state.streams.at(round=round)("ties"))
            versions, events = Versions.start(chosen, state.clients), at_floor(chosen, self.floor)
            return replace(state, params=state.params.under(chosen), versions=versions, events=events)
        mean, answered = WeightedMean(layout), []
        for client, (params, _, share) in replies:
            mean.add(params, share)
            answered.append(client)
        params = mean.value() if mean.weight else state.params
        events = () if state.versions.held.any() else state.events  # somebody trained under the mask before
        return replace(state, params=params, versions=state.versions.answered(answered), round=round, events=events)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its mask."""
        return state.params, state.versions.masks if state.versions else Masks.full(state.params.layout)

    def _check(self, job: Job) -> None:
        layout = job.layout
        check_density(layout, None)
        if self.clients > job.cohort:
            raise UsageError(
                f"algorithm.clients = {self.clients}: at most the {job.cohort} clients of a round can be asked (engine.cohort)."
            )
        if self.allocation == "global" and self.paper:
            raise UsageError("algorithm.paper = true is about rules of allocation: set algorithm.allocation, such as erk.")
        if self.allocation != "global" and self.iterations > 1:
            raise UsageError(
                f"algorithm.iterations = {self.iterations} needs algorithm.allocation = global; {self.allocation} is one step."
            )
        floor, keep = (0, self._count(layout)) if self.paper else (self.floor, None)
        check_density(layout, self.density, floor, keep)
        if self.score == "synflow" and not job.spec.example.is_floating_point():
            raise UsageError("algorithm.score = synflow needs a network that reads numbers, not tokens: snip works for both.")

    def _counts(self, layout: Layout) -> dict[str, int]:
        """Weights that each tensor keeps under a rule of allocation."""
        keep, rule = round(self.density * layout.maskable), self.allocation
        if rule == "global":
            raise ValueError("a ranking over the whole network fixes no counts of its tensors")
        return allocate(layout, keep, rule, paper=self.paper, floor=0 if self.paper else self.floor)

    def _count(self, layout: Layout) -> int:
        """Weights that a mask keeps."""
        return round(self.density * layout.maskable) if self.allocation == "global" else sum(self._counts(layout).values())

    def _choose(self, layout: Layout, score: Callable[[Masks], Tensor], ties: Stream) -> Masks:
        """Keep the highest scores. `score` is asked for those of the weights that are left."""
        full = Masks.full(layout)
        if self.allocation != "global":
            return select_by_slot(score(full), self._counts(layout), within=full, ties=ties)
        steps = self.iterations or (100 if self.score == "synflow" else 1)
        return narrowed(score, self._count(layout), within=full, steps=steps, ties=ties, floor=self.floor)[0]

    def _saliency(self, start: Params, masks: Masks, client: Client) -> Tensor:
        """Score the weights that are left on the client's own examples, other ones in each step."""
        found = client.gradients(
            start,
            masks,
            batches=self.batches or None,
            training=self.training,
            curvature=self.score == "grasp",
            temperature=self.temperature if self.score == "grasp" else 1.0,
            purpose=f"scores/{masks.count}",
        )
        return (sensitivity if self.score == "snip" else flow)(start.under(masks), found)
