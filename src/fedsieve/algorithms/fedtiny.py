"""FedTiny: choose a coarse mask with the clients, then move it in small steps (Huang et al. 2022, arXiv 2212.01977).

With d the density, P the maskable weights, Q all other numbers, S those of them that are BatchNorm statistics, L tensors, C
candidates, a the weights that a round exchanges, H the binary entropy; in bits a client:

    set-up 1  down  64 (seed), C L small whole numbers, 32 Q      up  32 C S; with selection = loss no such set-up
    set-up 2  down  the same, and 32 C S                          up  64 C, the mean loss of each candidate
    round     down  32 d P + 32 Q; masks that changed P H(2a/P), masks for whoever lacks more P H(d)
              up    32 d P + 32 Q; if masks move 32 a, and their places P H(a/P)

Both ends make the candidates. With origin = start they are parts of the job's start, of which the largest weights are sent in
each set-up: 32 bits for each that any candidate keeps, and where it is.

Every `every` rounds one block, from the output to the input and round again, drops its smallest weights and grows as many of
the steepest pruned ones. Clients find these in O(a) memory after training (`client.top_gradients`). `client_memory` in the
record is that of training and growing; in set-up one candidate is made at a time, drawn and pruned tensor by tensor, and no
gradient is taken: beside what is kept that needs the draws of one tensor, 20 bytes for each weight of the largest.

Deviates: layer densities are drawn around the target and brought back to it; none is rejected. The released code sends no
statistics, takes ranks among pruned weights for positions, and lets weights drift under the mask; here not. A weight that was
dropped just now is not grown (exclude_just_pruned). Blocks are those of the model, not five. Biases and normalisation are no
part of the density. The last round moves nothing, since nobody would train what grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsieve.aggregate.mean import StatisticsMean, WeightedMean
from fedsieve.algorithms.base import Job, check_density, check_moves, weight
from fedsieve.errors import UsageError
from fedsieve.local.executor import Client
from fedsieve.local.memory import training_memory
from fedsieve.models.candidates import Pool
from fedsieve.models.spec import CATALOGUE
from fedsieve.params import Masks, Params
from fedsieve.settings import Count, CountOrZero, Density, Share, Threshold, settings
from fedsieve.sparsity.allocate import allocate
from fedsieve.sparsity.regrow import exchanges, lowered, regrow
from fedsieve.sparsity.schedule import moving
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import indices, integers, number, values, vector
from fedsieve.wire.versions import Known, Versions

Reply = tuple[float, Tensor, Tensor, Tensor]
"""a client's weight; its parameters, or what it measured; positions and gradient of the steepest pruned weights"""


@dataclass(frozen=True, slots=True)
class State:
    """The global model and its masks after `round` rounds, and before round 1 the pool that they are chosen from."""

    params: Params
    versions: Versions
    pool: Pool | None
    """None: the choice is made"""
    statistics: Tensor | None
    """of each candidate, averaged over clients, float32 (candidates, statistics)"""
    round: int
    rounds: int
    streams: Streams
    momentum: bool
    client_memory: int | None = None


@settings
class FedTiny:
    """Choose among coarse masks by their losses at the clients, then swap weights block by block while training."""

    density: Density = 0.1
    """density of the maskable weights, in (0, 1]"""
    pool: CountOrZero = 0
    """candidates, >= 0 (0: 0.1 / density, as we recall, 2 at least; 1: nothing to choose; the released code takes 5)"""
    origin: Literal["seeds", "start"] = "seeds"
    """candidates' weights: drawn for each by He's rule, so that a seed is all that is sent; or parts of the job's start"""
    selection: Literal["statistics", "loss"] = "statistics"
    """what candidates are compared by: their losses under the clients' mean BatchNorm statistics, which takes a network with
    BatchNorm (statistics); or under those that they start with, for any network (loss: the paper's vanilla selection)"""
    layers: Literal["uniform", "erk"] = "uniform"
    """densities of the tensors, around which candidates are drawn"""
    noise: Share = 0.5
    """relative spread of a candidate's layer densities, in [0, 1): factors in [1 - noise, 1 + noise]; the first one has none"""
    variance: Literal["mean", "pooled"] = "mean"
    """BatchNorm's variance over clients: mean of theirs (as published), or with the spread of their means (pooled);
    selection = statistics"""
    every: Count = 10
    """rounds between two moves of the mask, >= 1"""
    stop: CountOrZero = 0
    """round in which the share has fallen to 0, >= 0 (0: the last one; published with 100, of 300 rounds as we recall)"""
    alpha: Threshold = 0.2
    """share a(t) = alpha / 2 * (1 + cos(pi t / stop)) of a tensor's kept weights that are exchanged, in [0, 1]; 0.2 as in the
    released code; 0.3 is the law that we recall of the paper"""
    progress: Literal["block", "all"] = "block"
    """what moves at a time: one block, from the output to the input; or every tensor, as in the released code"""
    exclude_just_pruned: bool = True
    """a weight that was dropped just now cannot be grown; false: it can, as in the released code"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in means of weights, gradients and statistics: its number of training examples, or the same for all"""

    @property
    def own_start(self) -> bool:
        """Whether weights start elsewhere than the job says."""
        return self.origin == "seeds"

    @property
    def needs_statistics(self) -> bool:
        """Whether the network must have BatchNorm: a pool of one is not chosen from."""
        return self.selection == "statistics" and self._candidates > 1

    def init(self, job: Job) -> State:
        """Draw the pool."""
        check_density(job.layout, self.density)
        if self.alpha:
            check_moves(job, self.every, min(self.stop or job.rounds, job.rounds) - 1, "algorithm.alpha = 0")
        if self.needs_statistics and not job.spec.has_statistics:
            takers = ", ".join(entry.name for entry in CATALOGUE if "norm" in entry.options)
            raise UsageError(
                f"algorithm.selection = statistics compares {self._candidates} candidates by their BatchNorm statistics; model"
                f" {job.spec.name!r} has {' and '.join(job.spec.norms) or 'no normalisation'}.\n"
                f"Set algorithm.selection = loss, which takes any model; or model.norm = batch with model.name one of {takers};"
                " or algorithm.pool = 1, which compares nothing."
            )
        params, masks = (pool := self._pool(job, round(self.density * job.layout.maskable))).candidate(0)
        versions, choice = Versions.start(masks, job.clients), pool if len(pool.counts) > 1 else None
        return State(params, versions, choice, None, 0, job.rounds, job.streams, job.local.momentum > 0)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the pool first; then the model, the masks as far as a client lacks them, and how much is to move."""
        layout, round = state.params.layout, state.round + 1
        if state.pool is not None:
            asked = state.pool.sections()
            if state.statistics is not None:
                asked["statistics"] = vector(state.statistics.flatten())
            return dict.fromkeys(cohort, Message("setup", round, layout, asked))
        common = {"weights": values(state.params, state.versions.masks)}
        if swaps := self._swaps(state):
            common["swaps"] = integers([swaps.get(slot.name, 0) for slot in layout.masked_slots])
        told = state.versions.sections(cohort)
        made = {id(each): Message("train", round, layout, {**each, **common}) for each in told.values()}
        return {client: made[id(told[client])] for client in cohort}

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known | None]:
        """Measure each candidate; or train, and find the steepest pruned weights."""
        if request.kind == "setup":
            return self._measured(request, client), mine
        masks, known = Known.told(request, mine)
        trained = client.train(request.values("weights", masks), masks=masks)
        sections = {"weights": values(trained.params, masks)}
        if "swaps" in request.sections:
            moves = zip(client.layout.masked_slots, request.integers("swaps").tolist(), strict=True)
            swaps = {slot.name: count for slot, count in moves if count}
            pruned = (
                masks if self.exclude_just_pruned else lowered(masks, magnitude(trained.params), swaps, client.stream("drop"))
            )
            places, gradient = client.top_gradients(trained.params, pruned, swaps, purpose="grow")
            sections |= {"places": indices(places.numpy(), client.layout), "gradient": vector(gradient)}
        return request.reply(**sections, examples=number(trained.examples), loss=number(trained.loss)), known

    def read(self, state: State, reply: Message) -> Reply:
        """Decode statistics or losses of the candidates; or weights, and gradients at as many places as were asked for."""
        share, layout, nothing = weight(reply, self.weighting), state.params.layout, torch.zeros(0)
        if state.pool is not None:
            width = layout.size - layout.trainable if self._unmeasured(state) else 1
            return share, _by_candidate(reply.vector("measured").double(), state.pool, width), nothing, nothing
        masks = state.versions.masks
        params, swaps = reply.values("weights", masks), self._swaps(state)
        if not swaps:
            return share, params.flat, nothing, nothing
        places, gradient = reply.indices("places"), reply.vector("gradient")
        if len(places) != len(gradient) or (self.exclude_just_pruned and masks.kept[places].any()):
            raise WireError(Reason.RANGE, 0, f"{len(gradient)} gradients at {len(places)} places, of which some may be kept")
        chosen = Masks(layout, torch.zeros(layout.maskable, dtype=torch.bool).index_fill_(0, places, True))
        if {name: count for name, count in chosen.counts().items() if count} != swaps:
            raise WireError(Reason.COUNT, 0, f"{len(places)} places are not {swaps}")
        return share, params.flat, places, gradient

    def aggregate(self, state: State, replies: Iterable[tuple[int, Reply]]) -> State:
        """Average what was measured and choose; or average the model and move its masks."""
        if state.pool is not None:
            return self._choose(state, state.pool, replies)
        layout, round, masks = state.params.layout, state.round + 1, state.versions.masks
        mean, steep, answered = WeightedMean(layout), torch.zeros(layout.maskable, dtype=torch.float64), []
        for client, (share, flat, places, gradient) in replies:
            mean.add(Params(layout, flat), share)
            if len(places):
                steep[places] += share * gradient.double()
            answered.append(client)
        swaps = self._swaps(state)
        memory = training_memory(masks, momentum=state.momentum, top=swaps)
        if not answered:
            return replace(state, round=round, client_memory=memory)
        params, ties, again = mean.value(), state.streams.at(round=round)("swap"), not self.exclude_just_pruned
        moved = regrow(masks, magnitude(params), steep.abs(), swaps, ties=ties, again=again)
        versions = state.versions.answered(answered).changed(moved)
        return replace(state, params=params.under(moved), versions=versions, round=round, client_memory=memory)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model and its masks; while nothing is chosen, the first candidate."""
        return state.params, state.versions.masks

    @property
    def _candidates(self) -> int:
        return self.pool or max(2, round(0.1 / self.density))

    def _pool(self, job: Job, keep: int) -> Pool:
        layout, names = job.layout, [slot.name for slot in job.layout.masked_slots]
        counts = []
        for index in range(self._candidates):
            spread = (2 * job.streams(f"pool/{index}").uniform(len(names)) - 1) * (self.noise if index else 0.0)
            counts.append(list(allocate(layout, keep, self.layers, floor=1, factors=(1 + spread).tolist()).values()))
        most = torch.tensor(counts).amax(0) if self.origin == "start" else torch.zeros(len(names), dtype=torch.int64)
        wanted = dict(zip(names, most.tolist(), strict=True))
        among = select_by_slot(magnitude(job.start), wanted, within=Masks.full(layout), ties=job.streams("pool/among"))
        return Pool(job.streams("pool").word(), torch.tensor(counts, dtype=torch.int32), job.start.under(among), among)

    def _choose(self, state: State, pool: Pool, replies: Iterable[tuple[int, Reply]]) -> State:
        mean = StatisticsMean(state.params.layout, pooled=self._unmeasured(state) and self.variance == "pooled")
        for _, (share, found, *_) in replies:
            mean.add(found, share if self._unmeasured(state) else 1.0)  # losses count alike
        if not mean.weight:
            return replace(state, round=state.round + 1)
        if self._unmeasured(state):
            return replace(state, statistics=mean.value())
        params, masks = pool.candidate(best := int(mean.value().argmin()))
        if state.statistics is not None:
            params.statistics.copy_(state.statistics[best])
        versions = Versions.start(masks, len(state.versions.held))
        return replace(state, params=params, versions=versions, pool=None, statistics=None)

    def _swaps(self, state: State) -> dict[str, int]:
        """How many weights each tensor that moves in the coming round exchanges; empty: none moves."""
        t, masks, slots = state.round + 1, state.versions.masks, state.params.layout.masked_slots
        share = moving(t, every=self.every, stop=self.stop, rounds=state.rounds, share=self.alpha)
        if state.pool is not None or not share:
            return {}
        blocks = sorted({slot.block for slot in slots}, reverse=True)
        turn = blocks[(t // self.every - 1) % len(blocks)]
        names = [slot.name for slot in slots if self.progress == "all" or slot.block == turn]
        return exchanges(masks, share, names)

    def _unmeasured(self, state: State) -> bool:
        """Whether BatchNorm's statistics of the candidates are still to come."""
        return self.selection == "statistics" and state.statistics is None

    def _measured(self, request: Message, client: Client) -> Message:
        """Measure statistics of each candidate, or its loss; one candidate at a time."""
        pool, given, found = Pool.of(request), None, []
        if "statistics" in request.sections:
            given = _by_candidate(request.vector("statistics"), pool, client.layout.size - client.layout.trainable)
        for index in range(len(pool.counts)):
            params, masks = pool.candidate(index)
            if self.selection == "statistics" and given is None:
                found.append(client.statistics(params, masks).statistics.clone())
                continue
            if given is not None:
                params.statistics.copy_(given[index])
            found.append(torch.tensor([client.evaluate_training(params, masks).mean_loss], dtype=torch.float64))
        return request.reply(measured=vector(torch.cat(found)), examples=number(client.examples))


def _by_candidate(numbers: Tensor, pool: Pool, width: int) -> Tensor:
    """Return numbers as a row for each candidate. WireError: COUNT where these are not so many of so many each."""
    candidates = len(pool.counts)
    if len(numbers) != candidates * width:
        raise WireError(Reason.COUNT, 0, f"{len(numbers)} numbers of {candidates} candidates, not {width} each")
    return numbers.view(candidates, width)
