"""Sparse starts to choose from, which server and clients make alike, so that hardly a weight is sent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsieve.init.schemes import kaiming_uniform
from fedsieve.params import Masks, Params
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Reason, Section, WireError
from fedsieve.wire.sections import integers, mask, seed, values


@dataclass(frozen=True, slots=True)
class Pool:
    """Candidates: how many weights each tensor keeps, of weights drawn from a seed or of those given."""

    seed: int
    counts: Tensor
    """int32 (candidates, tensors)"""
    given: Params
    """what is not drawn"""
    among: Masks
    """weights that are given; none: they are drawn"""

    def candidate(self, index: int) -> tuple[Params, Masks]:
        """Make one: the same at both ends."""
        layout, streams = self.given.layout, Streams(self.seed, round=index)
        params, within = self.given, self.among
        if not within.count:
            params, within = Params(layout, self.given.flat.clone()), Masks.full(layout)
            params.maskable.copy_(kaiming_uniform(layout, streams).maskable)
        keep = dict(zip((slot.name for slot in layout.masked_slots), self.counts[index].tolist(), strict=True))
        masks = select_by_slot(magnitude(params), keep, within=within, ties=streams("ties"))
        return params.under(masks), masks

    def sections(self) -> dict[str, Section]:
        """Write all that makes the candidates."""
        counts = integers(self.counts)
        return {"seed": seed(self.seed), "counts": counts, "mask": mask(self.among), "weights": values(self.given, self.among)}

    @classmethod
    def of(cls, request: Message) -> Pool:
        """Read what `sections` wrote."""
        among, tensors = request.mask("mask"), len(request.layout.masked_slots)
        counts = request.integers("counts")
        if not tensors or len(counts) % tensors:
            raise WireError(Reason.COUNT, 0, f"{len(counts)} counts for candidates of {tensors} tensors")
        return cls(request.seed("seed"), counts.view(-1, tensors), request.values("weights", among), among)
