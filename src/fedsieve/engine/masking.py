"""What the record of a round says of masks: how they and the signs moved since the round before, how far clients' own agree."""

from __future__ import annotations

from typing import Any

from fedsieve.algorithms.base import Algorithm
from fedsieve.params import Layout, Masks, Params
from fedsieve.sparsity.measure import Agreement, overlap, sign_flips


def moved(algorithm: Algorithm[Any, Any, Any], before: Any, round: int, params: Params, masks: Masks) -> dict[str, Any]:
    """Return how masks and signs moved in a round; None while nothing is pruned, in round 1, and where the network is another.

    Events are the tensors that keep nothing from this round on: the network is cut off there.

    The model of the round before is made of its state anew, so nothing has to be kept for it, in a checkpoint neither.

    Args:
        algorithm: the method.
        before: its state after the round before.
        round: the round that ended.
        params: the model after it.
        masks: its masks.
    """
    row: dict[str, Any] = {"mask_overlap": None, "sign_flips": None, "events": []}
    if masks.count == masks.layout.maskable:
        return row
    empty = [name for name, count in masks.counts().items() if not count]
    if round > 1:
        earlier, kept = algorithm.finalize(before)
        if earlier.layout.fingerprint == params.layout.fingerprint:
            row |= {"mask_overlap": overlap(kept, masks), "sign_flips": sign_flips(earlier, params, kept & masks)}
            empty = [name for name in empty if kept[name].any()]
    return row | {"events": [f"{name} keeps none of its {masks.layout.named[name].numel} weights" for name in empty]}


class Own:
    """Overlap of the masks that clients of one exchange sent, gathered from what `read` returned of each."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._agreement: Agreement | None = None
        self._mixed = False

    def add(self, content: Any) -> None:
        """Take note of the first masks in a client's content, if it is masks or a tuple with some."""
        parts = content if isinstance(content, tuple) else (content,)
        masks = next((part for part in parts if isinstance(part, Masks)), None)
        if masks is None:
            return
        if self._layout is None or self._agreement is None:
            self._layout, self._agreement = masks.layout, Agreement(masks.layout)
        if masks.layout.fingerprint != self._layout.fingerprint:
            self._mixed = True
        else:
            self._agreement.add(masks)

    @property
    def any(self) -> bool:
        """Whether a client sent masks."""
        return self._agreement is not None

    def overlap(self) -> float | None:
        """Return the mean overlap; None for masks of fewer than two clients, or of several networks."""
        return self._agreement.value() if self._agreement is not None and not self._mixed else None
