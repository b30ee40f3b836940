"""FedMask: each client learns a mask of its own over frozen weights, common parts are averaged (Li et al., SenSys 2021).

With P the maskable weights and H the binary entropy in bits:

    down  the seed of the weights, 64 bits; a mask, one for each client   at most P bits, P H(d) at density d; none at first
    up    the client's mask                                              at most P bits, P H(d); examples and loss

A client learns a score for each weight, which is kept where that is at least 0. The server averages masks where they overlap:
where at least `overlap` of the clients of a round keep a weight. There all get what most of them have; elsewhere each client
keeps its own bits. For that the server remembers the last mask of each client, P bits. With engine.eval_tune, clients
train the weights that their masks keep, as the paper has it at the end.

No code is published, and what is known here of the paper is a summary of it. What overlaps, how high an average keeps a weight,
how the sparsity term grows with the depth, and learning rates are our reading.

Deviates: clients do not prune by their own data at first; all begin with the same random scores. `density` is ours, to compare
methods at the same density: the best scores are kept before a mask is sent, and the best averages at the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsieve.algorithms.base import Job, check_density, check_voters, measured, weight
from fedsieve.local.executor import Client
from fedsieve.models.frozen import Magnitudes, bounds, check, frozen, scores
from fedsieve.params import Layout, Masks, Params
from fedsieve.reparam.threshold import ThresholdMask
from fedsieve.settings import Count, Density, NonNegative, Positive, Threshold, settings
from fedsieve.sparsity.allocate import uniform
from fedsieve.sparsity.select import select, select_by_slot
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section, mask, number, seed

NEVER = -1e-6
"""score of what is not kept though its score is that of one that is"""
RATES = {"adam": 0.01, "sgd": 1.0}
"""learning rates unless another is set"""


@dataclass(frozen=True, slots=True)
class State:
    """What clients have in common after `round` rounds, and the masks that they sent last."""

    params: Params
    """frozen weights"""
    masks: Masks
    """what most clients keep"""
    common: Tensor
    """where the masks of the last round overlap, bool of shape (layout.maskable,)"""
    sent: Mapping[int, Masks]
    """by client; empty with merge = all"""
    merges: int
    seed: int
    streams: Streams
    round: int


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps: its scores."""

    scores: Tensor
    """float32 of shape (layout.maskable,), at least 0 where its mask keeps a weight"""


@settings
class FedMask:
    """Learn masks over a random network, in common where clients agree, each client's own elsewhere."""

    own_start: ClassVar[bool] = True
    density: Density | None = None
    """density of all masks, in (0, 1]: the best scores are kept; None: what has a score of 0 or more"""
    scope: Literal["global", "layer"] = "layer"
    """with a density: rank scores over the whole network, or in each tensor separately"""
    penalty: NonNegative = 0.0
    """added to the gradient of a score, >= 0: in full in the last tensor, less the earlier, so that early layers stay dense"""
    merge: Literal["overlap", "all"] = "overlap"
    """where masks are averaged: where they overlap, or everywhere (then clients have no masks of their own)"""
    overlap: Count = 2
    """clients of a round that must keep a weight for it to be common, >= 1 (merge = overlap)"""
    vote: Threshold = 0.5
    """least share of the clients that keeps a common weight, in [0, 1] (without a density)"""
    magnitudes: Magnitudes = "kaiming"
    """size of the weights: as drawn (kaiming), or the same in each tensor (constant)"""
    scale: Positive = 0.5
    """bound of the first scores over Xavier's, > 0"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """by what clients learn scores, from zero moments in each round: Adam, or SGD, whose steps are the smaller the sparser"""
    lr: Positive | None = None
    """learning rate of the scores in all rounds, > 0; None: 0.01 for adam, 1 for sgd, whose gradients are small"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client's mask: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Draw the network and the first mask."""
        check(job.spec)
        check_density(job.layout, self.density)
        if self.merge == "overlap":
            check_voters(job, self.overlap, f"algorithm.overlap = {self.overlap}", "algorithm.overlap to fewer")
        else:
            check_voters(job, 2, "algorithm.merge = all, a vote on each weight,", "algorithm.merge to overlap")
        word, layout = job.streams("fedmask").word(), job.layout
        masks, _ = self._kept(layout, self._first(layout, word), Streams(word)("ties"))
        params, nothing = frozen(job.spec, word, self.magnitudes), torch.zeros(layout.maskable, dtype=torch.bool)
        return State(params, masks, nothing, {}, 0, word, job.streams, round=0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send each client its mask, with what is common in it."""
        if state.merges:
            return self._messages(state, "train", state.round + 1, cohort, {})
        return dict.fromkeys(cohort, Message("train", state.round + 1, state.params.layout, {"seed": seed(state.seed)}))

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine]:
        """Learn scores from the mask on, and send the mask that they make."""
        word, layout = request.seed("seed"), client.layout
        first = self._first(layout, word)
        masks, before = self._kept(layout, first, Streams(word)("ties"))
        before = before if mine is None else mine.scores
        if "mask" in request.sections:
            masks = request.mask("mask")
        agrees = (before >= 0) == masks.kept
        start = torch.where(agrees, before, torch.where(masks.kept, first.abs(), -first.abs()))
        weights = frozen(client.spec, word, self.magnitudes)
        trained = client.train(
            Params(layout, torch.cat([start, weights.dense])),
            reparam=ThresholdMask(weights.maskable, penalty=self._penalty(layout)),
            moves=torch.arange(layout.trainable) < layout.maskable,
            lr=self.lr or RATES[self.optimizer],
            adam=self.optimizer == "adam",
        )
        learned, found = self._kept(layout, trained.params.maskable, client.stream("ties"))
        reply = request.reply(mask=mask(learned), examples=number(trained.examples), loss=number(trained.loss))
        return reply, Mine(found)

    def read(self, state: State, reply: Message) -> tuple[Masks, float]:
        """Decode a mask and its weight."""
        return reply.mask("mask"), weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Masks, float]]]) -> State:
        """Average the masks, and note where they overlap."""
        layout, total, sent = state.params.layout, 0.0, dict(state.sent)
        kept, holders = (torch.zeros(layout.maskable, dtype=torch.float64) for _ in range(2))
        for client, (masks, share) in replies:
            kept.add_(masks.kept, alpha=share)
            holders.add_(masks.kept)
            total += share
            if self.merge == "overlap":
                sent[client] = masks
        state = replace(state, round=state.round + 1)
        if not total:
            return state
        mean = kept / total
        if self.density is None:
            masks = Masks(layout, mean >= self.vote)
        else:
            before = state.masks.kept.double() * 1e-9  # decides between equal averages
            masks, _ = self._kept(layout, mean + before, state.streams.at(round=state.round)("ties"))
        common = holders >= self.overlap if self.merge == "overlap" else torch.ones_like(state.common)
        return replace(state, masks=masks, common=common, sent=sent, merges=state.merges + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the weights under the mask of most clients."""
        return state.params.under(state.masks), state.masks

    def evaluation(self, state: State, clients: Sequence[int], epochs: int) -> Mapping[int, Message]:
        """Ask each client to evaluate the mask that it would start from."""
        return self._messages(state, "eval", state.round, clients, {"epochs": number(epochs)})

    def client_evaluate(self, request: Message, client: Client, mine: Mine | None) -> Message:
        """Evaluate the weights under that mask; epochs more train these weights."""
        masks = request.mask("mask")
        params = frozen(client.spec, request.seed("seed"), self.magnitudes).under(masks)
        return request.reply(counts=measured(client, params, masks, int(request.number("epochs"))))

    def _messages(
        self, state: State, kind: str, round: int, clients: Sequence[int], said: Mapping[str, Section]
    ) -> dict[int, Message]:
        """Return each client's own mask, with what is common in it; that of most clients to who has none."""
        layout, sections = state.params.layout, {"seed": seed(state.seed), **said}
        messages = dict.fromkeys(clients, Message(kind, round, layout, sections | {"mask": mask(state.masks)}))
        for client in state.sent.keys() & messages.keys():
            merged = torch.where(state.common, state.masks.kept, state.sent[client].kept)
            messages[client] = Message(kind, round, layout, sections | {"mask": mask(Masks(layout, merged))})
        return messages

    def _first(self, layout: Layout, word: int) -> Tensor:
        """Return the scores before anything is learned."""
        return scores(layout, word, self.scale * bounds(layout))

    def _penalty(self, layout: Layout) -> Tensor | None:
        slots = layout.masked_slots
        parts = [torch.full((slot.numel,), self.penalty * (i + 1) / len(slots)) for i, slot in enumerate(slots)]
        return torch.cat(parts) if self.penalty else None

    def _kept(self, layout: Layout, scores: Tensor, ties: Stream) -> tuple[Masks, Tensor]:
        """Return a mask of the best scores, and the scores shifted so that these are the ones of at least 0."""
        if self.density is None:
            return Masks(layout, scores >= 0), scores
        keep, full = round(self.density * layout.maskable), Masks.full(layout)
        if self.scope == "global":
            masks = select(scores, keep, within=full, ties=ties)
            groups = [(0, layout.maskable)]
        else:
            masks = select_by_slot(scores, uniform(layout, keep), within=full, ties=ties)
            groups = [layout.spans[slot.name] for slot in layout.masked_slots]
        shifted = scores.clone()
        for begin, end in groups:
            kept = masks.kept[begin:end]
            if kept.any():
                shifted[begin:end] -= scores[begin:end][kept].min()
        return masks, torch.where(masks.kept, shifted, shifted.clamp(max=NEVER))
