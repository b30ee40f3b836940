"""SparsyFed: powers of what is learned, pruned by each client before it answers (Guastella et al. 2025, arXiv 2504.05153).

Weights are w = v |v|^(beta - 1) of what a client learns, v (Powerpropagation: Schwarz et al. 2021, arXiv 2110.00296), so small
weights move little and a weight of 0 stays 0. After local training a client keeps the largest weights of each tensor. The
server averages, zeros included; what any client kept is in the next model.

With d the density, u that of the union, u' that of the one before, P the maskable weights, H the binary entropy in bits:

    down  weights of the union; how it changed since the last one a client holds, or all of it    32 u P; P H(u' - u) or P H(u)
    up    weights kept, and their mask within the union                                          32 d P; u P H(d / u)

and in each direction 32 bits for every element that is not maskable. What is sent is w; both ends turn it into v.

Deviates: weights are ranked in each tensor; the published code ranks the whole network (ranking = global). That empties the
first layer of an MLP for good, since its weights start smallest: from Glorot's start the default one keeps 9 of 100,352 at
density 0.05, none at 0.01. Activations are not pruned; the paper prunes those of each layer to the density of its weights,
which saves computation, not bytes. The model that is evaluated and exported is pruned to `density` once more, so that it can be
compared with those of other methods (final = union: as it is sent).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsieve.aggregate.mean import Votes, WeightedMean
from fedsieve.algorithms.base import Job, check_density, weight
from fedsieve.local.executor import Client
from fedsieve.params import Layout, Masks, Params
from fedsieve.reparam.power import Power
from fedsieve.settings import Density, settings
from fedsieve.sparsity.allocate import uniform
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select, select_by_slot
from fedsieve.streams import Stream, Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import mask, number, values
from fedsieve.wire.versions import Known, Versions


@dataclass(frozen=True, slots=True)
class State:
    """The global model after `round` rounds, and who holds its mask."""

    params: Params
    """weights that the network computes with"""
    versions: Versions
    """what some client of the last round kept"""
    round: int
    streams: Streams


@settings
class SparsyFed:
    """Train powers, prune at each client before it answers, average."""

    density: Density = 0.05
    """density of the maskable weights that a client sends, in (0, 1]"""
    beta: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.25
    """exponent of what is learned, >= 1 (1: weights are learned themselves, and pruned ones may come back)"""
    ranking: Literal["layer", "global"] = "layer"
    """what a client keeps: the same density in each tensor, or the largest weights of the whole network. At low densities that
    cuts off layers whose weights start small, for good, since a weight of 0 stays 0"""
    average: Literal["learned", "weights"] = "learned"
    """what the server averages: the clients' v, as the published code does, or their weights"""
    final: Literal["pruned", "union"] = "pruned"
    """what is evaluated and exported: the mean pruned to `density` once more, or all that it keeps"""
    weighting: Literal["examples", "uniform"] = "examples"
    """weight of a client in the mean: its number of training examples, or the same for all"""

    @property
    def promises(self) -> Literal["exactly", "at most", "nothing"]:
        """Whether the model ends at `density`, or keeps what any client kept."""
        return "exactly" if self.final == "pruned" else "nothing"

    def init(self, job: Job) -> State:
        """Start dense."""
        check_density(job.layout, self.density)
        return State(job.start, Versions.start(Masks.full(job.layout), job.clients), 0, job.streams)

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Send the weights of the union, and that as far as a client lacks it."""
        weights = values(state.params, state.versions.masks)
        return state.versions.messages("train", state.round + 1, cohort, {"weights": weights})

    def client_update(self, request: Message, client: Client, mine: Known | None) -> tuple[Message, Known]:
        """Train what the weights are powers of, then prune."""
        masks, known = Known.told(request, mine)
        power = Power(self.beta)
        start = _mapped(request.values("weights", masks), power.latent)
        within = masks if self._absorbing and masks.density < 1 else None
        trained = client.train(start, masks=within, reparam=power)
        own = self._pruned(trained.params, self._reach(masks), client.stream("prune"))
        reply = request.reply(
            mask=mask(own, within=self._reach(masks)),
            weights=values(_mapped(trained.params, power.effective), own),
            examples=number(trained.examples),
            loss=number(trained.loss),
        )
        return reply, known

    def read(self, state: State, reply: Message) -> tuple[Params, Masks, float]:
        """Decode a client's weights, its mask, and its weight in the mean."""
        reach = self._reach(state.versions.masks)
        own, wanted = reply.mask("mask", within=reach), self._count(reach)
        if own.count != wanted:
            raise WireError(Reason.COUNT, 0, f"the mask keeps {own.count} weights, not {wanted}")
        params = reply.values("weights", own)
        if self.average == "learned":
            params = _mapped(params, Power(self.beta).latent)
        return params, own, weight(reply, self.weighting)

    def aggregate(self, state: State, replies: Iterable[tuple[int, tuple[Params, Masks, float]]]) -> State:
        """Average, zeros included; what any client kept stays."""
        layout, round = state.params.layout, state.round + 1
        mean, votes, answered = WeightedMean(layout), Votes(layout), []
        for client, (params, own, share) in replies:
            mean.add(params, share)
            votes.add(own)
            answered.append(client)
        if not mean.weight:
            return replace(state, round=round)
        params = mean.value()
        if self.average == "learned":
            params = _mapped(params, Power(self.beta).effective)
        versions = state.versions.answered(answered).changed(votes.at_least(1))
        return replace(state, params=params, versions=versions, round=round)

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return the global model: dense before the first answers, then pruned to `density`, or the union."""
        masks = state.versions.masks
        if self.final == "pruned" and bool(state.versions.held.any()):  # a union of all weights is version 1 still
            ties = state.streams.at(round=state.round)("final")
            masks = self._pruned(state.params, masks, ties)
        return state.params.under(masks), masks

    @property
    def _absorbing(self) -> bool:
        """Whether a weight of 0 stays 0, because its gradient is 0."""
        return self.beta > 1

    def _reach(self, masks: Masks) -> Masks:
        """Weights that a client may keep, given those that it was sent."""
        return masks if self._absorbing else Masks.full(masks.layout)

    def _pruned(self, params: Params, within: Masks, ties: Stream) -> Masks:
        keep = self._keep(within.layout)
        if self.ranking == "global":
            return select(magnitude(params), keep, within=within, ties=ties)
        return select_by_slot(magnitude(params), uniform(within.layout, keep), within=within, ties=ties)

    def _count(self, within: Masks) -> int:
        """Weights that a client keeps of those that it may."""
        keep = self._keep(within.layout)
        if self.ranking == "global":
            return min(within.count, keep)
        return sum(min(within.counts()[name], count) for name, count in uniform(within.layout, keep).items())

    def _keep(self, layout: Layout) -> int:
        return round(self.density * layout.maskable)


def _mapped(params: Params, change: Callable[[Tensor], Tensor]) -> Params:
    """Return parameters of which the maskable ones are changed."""
    return Params(params.layout, torch.cat([change(params.maskable), params.dense]))
