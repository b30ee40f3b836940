"""EF21: what changed since the last time, by its largest part (Richtarik, Sokolov and Fatkhullin 2021, arXiv 2106.05203).

Client and server both remember g, what the server takes the client's update for. The client sends c, the k largest of x - g,
both add it, and the server decodes g + c.

    sent  positions of the k, entropy-coded, and 32 bits for each

Deviates: vectors are updates after local training, not gradients. Of clients that are not asked the server's mean holds
nothing: the source's holds their old g. Where masks grow, g is zero.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedsieve.compress.base import Arrived, Caps, Compressor, Frame, Parts, Written
from fedsieve.compress.randk_temporal import recalled, remembered, roomy
from fedsieve.compress.topk import TopK
from fedsieve.settings import Density, Positive, settings


@settings
class Ef21(Compressor):
    """Send the largest changes of the update itself, which both ends remember."""

    caps: ClassVar[Caps] = Caps(client_memory=True, server_memory=True, down=False)

    share: Density = 0.01
    """of the numbers that are sent, in (0, 1]; at least one"""
    ranking: Literal["global", "layer"] = "global"
    """rank magnitudes over the whole vector, or in each tensor separately"""
    memory_mb: Positive = 1024.0
    """megabytes that the server may remember, > 0: clients times trained numbers times 4 bytes must be less"""

    def start(self, clients: int, size: int) -> dict[str, Any]:
        """Begin with zeros."""
        return roomy(clients, size, self.memory_mb, "topk, which remembers at the clients only")

    def encode(self, x: Tensor, frame: Frame, memory: Tensor | None = None) -> tuple[Written, Tensor]:
        """Write the largest changes; the client keeps g + c."""
        before = torch.zeros(frame.n) if memory is None else memory
        written, left = self._inner.encode(x - before, frame)
        assert left is not None  # noqa: S101
        return written, x - left

    def decode(self, parts: Parts, frame: Frame) -> Tensor:
        """Read c."""
        return self._inner.decode(parts, frame)

    def estimate(self, reply: Arrived, memory: Any, cohort: Any) -> Tensor:
        """Return g + c."""
        before, changes = recalled(memory, reply), self.decode(reply.parts, reply.frame)
        return changes if before is None else before + changes

    def learn(self, reply: Arrived, memory: Any, cohort: Any) -> Any:
        """Remember g + c."""
        return remembered(memory, reply, self.estimate(reply, memory, cohort))

    def nominal_bits(self, frame: Frame) -> float:
        """Return 32 k + log2(C(d, k))."""
        return self._inner.nominal_bits(frame)

    @property
    def _inner(self) -> TopK:
        return TopK(share=self.share, ranking=self.ranking)
