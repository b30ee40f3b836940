"""HideNseek: one pruning at the server without data, then signs learned together (Vallapuram et al. 2022, arXiv 2206.04385).

The network is weights drawn from a seed, a mask over them and a sign for each kept one. With d the density, P the maskable
weights, F the numbers trained as such (`others`, `exclude_head`; none by default) and q the `bits`:

    once   down  the seed, and a hash of weights and mask           128 bits; P H(d) more, if a client asks for the mask
    down   the merged signs (vote), or shares of +1 (mean, logit)   d P, or q d P bits, and 32 F; nothing before a first merge
    up     the signs a client learned                               d P bits, and 32 F, examples and loss

A client draws the weights and prunes by itself, by the same rule from the same seed. If its hash is another, it says so instead
of taking part, and is sent the mask the next time.

Known are from the abstract: pruning by saliency once, at the server, without data; a mask of +1 and -1 over the kept weights,
learned by clients together. No code is published. All else is our reading, and most of it is a setting.

Deviates: saliency is taken 100 times while pruning; once cuts layers off at low densities (iterations = 1: once). How far each
sign starts from flipping is drawn, alike for all clients, anew each round (restart = drawn): signs that all start equally far
flip only after long local training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsieve.aggregate.mean import SignVotes
from fedsieve.algorithms.base import Job, check_density, check_voters, measured, weight
from fedsieve.errors import DataError
from fedsieve.local.executor import Client
from fedsieve.models.drawn import MASK, NOTHING, Drawn, Held, lacking, read_lack
from fedsieve.models.flow import pruned
from fedsieve.models.frozen import Magnitudes, Others, Parts, bounds, check, evened, frozen, scores
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks, Params
from fedsieve.reparam.base import seen
from fedsieve.reparam.sign import Estimator, SignMask
from fedsieve.settings import Count, CountOrZero, Density, NonNegative, Positive, Threshold, settings
from fedsieve.sparsity.select import at_floor
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Section
from fedsieve.wire.sections import number, signs
from fedsieve.wire.shares import read_shares, shares

Vote = tuple[Tensor | None, Tensor, float, int]
"""one reply: a client's signs, its ordinary numbers, its weight; or no signs, and what it lacks"""
RATES = {"sgd": 1.0, "adam": 0.003}
"""learning rates unless another is set"""


@dataclass(frozen=True, slots=True)
class State:
    """The network and its signs after `round` rounds."""

    network: Drawn
    params: Params
    """frozen weights, zero where pruned; ordinary numbers as they were merged"""
    signs: Tensor
    """the merged signs, True for +1, bool of shape (weights with a sign,)"""
    shares: Tensor
    """clients' share for +1, never on the other side of 1/2 than the sign, float32 of shape (weights with a sign,)"""
    merges: int
    round: int
    events: tuple[str, ...]
    """tensors that the guard may have kept from being cut off, in round 1"""


@dataclass(frozen=True, slots=True)
class Mine:
    """What a client keeps: the network, and with memory = stateful what it learned, float32 of shape (what it learns,)."""

    network: Held
    learned: Tensor | None


@settings
class HideNSeek:
    """Prune a random network once without data, then learn the signs of the weights that are kept."""

    own_start: ClassVar[bool] = True
    density: Density = 0.1
    """density of the maskable weights, in (0, 1]"""
    iterations: Count = 100
    """times that saliency is taken while pruning, >= 1 (1: one-shot, which cuts layers off at low densities)"""
    scope: Literal["global", "layer"] = "global"
    """rank saliency over the whole network, or in each tensor separately to the same density"""
    floor: CountOrZero = 1
    """weights that each tensor keeps at least, >= 0 (0: no guard)"""
    sent: Literal["seed", "mask"] = "seed"
    """how a client learns what was pruned: it prunes by itself from the seed, or is sent the mask (if that takes too long)"""
    magnitudes: Magnitudes = "kaiming"
    """size of the weights: as drawn (kaiming), or alike in each tensor (constant); saliency is always that of the draw"""
    exclude_head: bool = False
    """keep the last maskable tensor whole, and train it as ordinary weights at local.lr: 32 bits each, both ways"""
    others: Others = "none"
    """what no mask covers and is trained too, at local.lr: nothing, biases, normalisation, or all"""
    start: Literal["random", "keep"] = "random"
    """signs before the first round: drawn, or those of the drawn weights"""
    scale: Positive = 0.5
    """bound of the real numbers behind signs at a client's start, over Xavier's, > 0: smaller flips more signs a round"""
    restart: Literal["drawn", "bound"] = "drawn"
    """their size once signs were merged: drawn up to the bound anew each round, or the bound itself"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """by what clients learn them: SGD as the section local says, or Adam, from zero moments in each round"""
    lr: Positive | None = None
    """their learning rate in all rounds, > 0; None: 1 for sgd, whose gradients are small, 0.003 for adam; less
    for networks of convolutions and for low densities"""
    estimator: Estimator = "clipped"
    """derivative in place of the sign's: 1, but 0 beyond `clip` (clipped); 1 (identity); that of tanh (tanh)"""
    clip: NonNegative = 1.0
    """bound of the real numbers behind the signs, so that signs can still flip, >= 0 (0: none)"""
    gradient: Literal["none", "layer"] = "none"
    """layer: divide gradients by the mean magnitude of the tensor's weights, so that wide layers learn as fast"""
    merge: Literal["vote", "mean", "logit"] = "vote"
    """what clients start from: signs by vote, the mean of the signs, or its arctanh (up to 0.99); ties keep the sign"""
    bits: Annotated[int, Field(ge=0, le=16)] = 8
    """bits down for each mean (merge = mean or logit), in [0, 16] (0: floats)"""
    memory: Literal["stateless", "stateful"] = "stateless"
    """stateful: clients mix what they learned before into their start, and are evaluated with signs of their own"""
    own: Threshold = 0.5
    """share of a client's own numbers in its start, in [0, 1] (memory = stateful)"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client's vote: its number of training examples, or the same for all"""

    def init(self, job: Job) -> State:
        """Draw the network and prune it."""
        check(job.spec)
        check_density(job.layout, self.density, self.floor)
        if self.merge == "vote":
            check_voters(job, 2, "algorithm.merge = vote", "algorithm.merge = mean")
        word = job.streams("hidenseek").word()
        masks, weights = self._pruned(job.spec, word), self._weights(job.spec, word)
        drawn, at = scores(job.layout, word, bounds(job.layout), positive=self.start == "keep"), self._parts(masks).signed.kept
        network = Drawn.start(word, weights, masks, job.clients, self.sent)
        return State(network, weights.under(masks), drawn[at] >= 0, (drawn[at] >= 0).float(), 0, 0, at_floor(masks, self.floor))

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the merged signs, and to each client what it lacks."""
        return self._messages(state, "train", {client: int(state.network.lacks[client]) for client in cohort}, {})

    def client_update(self, request: Message, client: Client, mine: Mine | None) -> tuple[Message, Mine | None]:
        """Learn signs from the merged ones on; or say what is lacking."""
        held = self._held(request, client.spec, mine)
        if isinstance(held, int):
            return lacking(request, held), None
        weights = self._weights(client.spec, held.seed).under(held.masks)
        start, parts = self._start(request, weights, held), self._parts(held.masks)
        if mine is not None and mine.learned is not None:
            start.trainable[parts.learned] = self.own * mine.learned + (1 - self.own) * start.trainable[parts.learned]
        trained = client.train(start, masks=held.masks, **self._rule(client, weights, held))
        said = {"signs": signs(trained.params.maskable >= 0, parts.signed)} | parts.section(trained.params)
        reply = request.reply(**said, examples=number(trained.examples), loss=number(trained.loss))
        return reply, Mine(held, trained.params.trainable[parts.learned] if self.memory == "stateful" else None)

    def read(self, state: State, reply: Message) -> Vote:
        """Decode a client's signs, or what it lacks."""
        if lack := read_lack(reply):
            return None, torch.zeros(0), 0.0, lack
        parts = self._parts(state.network.masks)
        return reply.signs("signs", parts.signed), parts.read(reply), weight(reply, self.weighting), NOTHING

    def aggregate(self, state: State, replies: Iterable[tuple[int, Vote]]) -> State:
        """Merge the signs by their weighted mean."""
        layout, lacks, votes = state.params.layout, dict[int, int](), SignVotes(len(state.signs))
        free = self._parts(state.network.masks).ordinary.nonzero().squeeze(1)
        sums = torch.zeros(len(free), dtype=torch.float64)
        for client, (chosen, numbers, share, lack) in replies:
            lacks[client] = lack
            if chosen is not None:
                votes.add(chosen, share)
                sums.add_(numbers, alpha=share)
        events = () if state.round else state.events
        state = replace(state, network=state.network.answered(lacks), round=state.round + 1, events=events)
        if not votes.weight:
            return state
        merged, mean = votes.value(state.signs)
        params = Params(layout, state.params.flat.index_copy(0, free, (sums / votes.weight).float()))
        return replace(state, params=params, signs=merged, shares=mean, merges=state.merges + 1)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the weights with the merged signs."""
        flat, at = state.params.flat.clone(), self._parts(state.network.masks).signed.kept.nonzero().squeeze(1)
        flat[at] = torch.where(state.signs, flat[at], -flat[at])
        return Params(state.params.layout, flat), state.network.masks

    def evaluation(self, state: State, clients: Sequence[int], epochs: int) -> Mapping[int, Message]:
        """Ask for an evaluation; who may not have the mask is sent it, for what is pruned here is not kept."""
        lacks = {client: MASK if state.network.lacks[client] else NOTHING for client in clients}
        return self._messages(state, "eval", lacks, {"epochs": number(epochs)})

    def client_evaluate(self, request: Message, client: Client, mine: Mine | None) -> Message:
        """Evaluate with the merged signs, or with the client's own if it keeps some; epochs more train signs."""
        held = self._held(request, client.spec, mine)
        if isinstance(held, int):
            raise DataError(f"client {client.id} does not hold the network that it is to evaluate.")
        weights = self._weights(client.spec, held.seed).under(held.masks)
        latent, rule = self._start(request, weights, held), self._rule(client, weights, held)
        if mine is not None and mine.learned is not None:
            latent.trainable[self._parts(held.masks).learned] = mine.learned

        def train(epochs: int) -> Params:
            return seen(client.train(latent, masks=held.masks, epochs=epochs, purpose="tune", **rule).params, rule["reparam"])

        start = seen(latent, rule["reparam"])
        return request.reply(counts=measured(client, start, held.masks, int(request.number("epochs")), train=train))

    def _messages(self, state: State, kind: str, lacks: dict[int, int], said: dict[str, Section]) -> dict[int, Message]:
        """Return the merged signs, after the first merge, and to each client what it lacks; who lacks the same shares it."""
        layout, round = state.params.layout, state.round + (kind == "train")
        if state.merges:
            said["signs"] = signs(state.signs) if self.merge == "vote" else shares(state.shares, self.bits)
            said |= self._parts(state.network.masks).section(state.params)
        told = {lack: state.network.sections(lack) | said for lack in set(lacks.values())}
        made = {lack: Message(kind, round, layout, sections) for lack, sections in told.items()}
        return {client: made[lack] for client, lack in lacks.items()}

    def _held(self, request: Message, spec: ModelSpec, mine: Mine | None) -> Held | int:
        return Held.told(request, mine.network if mine else None, partial(self._weights, spec), partial(self._pruned, spec))

    def _start(self, request: Message, weights: Params, held: Held) -> Params:
        """Return what was merged, with real numbers in the place of signs, for a client to learn from."""
        layout, parts = weights.layout, self._parts(held.masks)
        flat, bound = weights.flat.clone(), self.scale * bounds(layout)[parts.signed.kept]
        if self.restart == "drawn":
            bound *= torch.from_numpy(Streams(held.seed).at(round=request.round)("sizes").uniform(len(bound)))
        if "signs" not in request.sections:
            values = scores(layout, held.seed, self.scale * bounds(layout), positive=self.start == "keep")[parts.signed.kept]
        elif self.merge == "vote":
            values = bound * request.signs("signs", parts.signed)
        else:
            mean = 2 * read_shares(request, "signs", self.bits, len(bound)) - 1
            values = bound * (mean.clamp(-0.99, 0.99).atanh() if self.merge == "logit" else mean)
        flat[: layout.maskable][parts.signed.kept] = values
        if "signs" in request.sections:
            flat[: layout.trainable][parts.ordinary] = parts.read(request)
        return Params(layout, flat)

    def _rule(self, client: Client, weights: Params, held: Held) -> dict[str, Any]:
        """Return by what rule a client learns."""
        parts = self._parts(held.masks)
        scale = evened(weights, held.masks) if self.gradient == "layer" else None
        plain = parts.ordinary[: client.layout.maskable] if self.exclude_head else None
        lr = self.lr or RATES[self.optimizer]
        moves = torch.where(parts.ordinary, client.lr / lr, parts.learned.float())
        reparam = SignMask(weights.maskable, self.estimator, self.clip, scale, plain)
        return {"reparam": reparam, "moves": moves, "lr": lr, "adam": self.optimizer == "adam"}

    def _weights(self, spec: ModelSpec, word: int) -> Params:
        return frozen(spec, word, self.magnitudes)

    def _pruned(self, spec: ModelSpec, word: int) -> Masks:
        rule: dict[str, Any] = {"scope": self.scope, "steps": self.iterations, "floor": self.floor}
        keep, ties = round(self.density * spec.layout.maskable), Streams(word)("ties")
        return pruned(spec, frozen(spec, word), keep, head=self.exclude_head, ties=ties, **rule)

    def _parts(self, masks: Masks) -> Parts:
        return Parts.of(masks, self.others, head=self.exclude_head)
