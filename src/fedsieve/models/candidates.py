"""Sparse starts to choose from, which server and clients make alike, so that hardly a weight is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsieve.init.schemes import kaiming_slot
from fedsieve.params import Masks, Params
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot, top
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
        """Make one: the same at both ends. Weights are drawn and chosen tensor by tensor, so no more than one's are held."""
        layout, streams = self.given.layout, Streams(self.seed, round=index)
        keep, ties = (
            dict(zip((slot.name for slot in layout.masked_slots), self.counts[index].tolist(), strict=True)),
            streams("ties"),
        )
        if self.among.count:
            masks = select_by_slot(magnitude(self.given), keep, within=self.among, ties=ties)
            return self.given.under(masks), masks
        params, masks = Params(layout, self.given.flat.clone()), Masks(layout, torch.zeros(layout.maskable, dtype=torch.bool))
        for name, count in keep.items():
            weights = kaiming_slot(layout.named[name], streams).flatten()
            at = torch.from_numpy(top(weights.abs().numpy(), count, ties))
            params[name].view(-1)[at] = weights[at]
            masks[name].view(-1)[at] = True
        return params, masks

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
