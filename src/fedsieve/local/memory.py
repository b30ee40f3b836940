"""How many bytes training takes at a client that stores no pruned weight: what a method needs, not what this process uses."""

from __future__ import annotations

from collections.abc import Mapping

from fedsieve.params import Masks

NUMBER, PLACE = 4, 8
"""bytes of a float32, and of a position"""


def training_memory(masks: Masks, *, momentum: bool, top: Mapping[str, int] | None = None, dense: int = 0) -> int:
    """Return the most bytes held at a time, activations and examples not counted.

        training   values, a bit of support a maskable weight, gradients, and velocity if there is momentum
        growing    values, support, the steepest gradients with their positions, and one tensor's whole gradient

    Not counted are activations, which may well be larger than all of this, and copies that arithmetic makes.

    Args:
        masks: what is kept.
        momentum: whether SGD has momentum.
        top: gradients of pruned weights that `client.top_gradients` collects of each slot.
        dense: other numbers that are held while training or growing.
    """
    layout = masks.layout
    values = NUMBER * (masks.count + layout.size - layout.maskable)
    support = -(-layout.maskable // 8)
    gradients = NUMBER * (masks.count + layout.trainable - layout.maskable)
    training = gradients * (2 if momentum else 1)
    growing = 0
    if top:
        largest = max(layout.named[name].numel for name in top)
        growing = (NUMBER + PLACE) * sum(top.values()) + NUMBER * largest
    return values + support + max(training, growing) + NUMBER * dense
