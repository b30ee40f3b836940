"""Fully connected networks, for rows of features and for flattened images."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from math import prod

from torch import nn

from fedsieve.errors import UsageError


def mlp(shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = (128, 128)) -> nn.Sequential:
    """Make flatten - (linear - ReLU)* - linear; by default FedSparsify's net (Stripelis et al. 2022, arXiv 2204.12430).

    Takes an example of any shape. 118,282 parameters on 28 x 28 pixels with 10 classes.
    """
    return _perceptron((prod(shape), *hidden, classes), dropout=0.0)


def tabular(shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = (64, 32), dropout: float = 0.0) -> nn.Sequential:
    """Make (linear - ReLU - dropout)* - linear for rows of features, small enough for clients of a few dozen rows."""
    if len(shape) != 1:
        raise UsageError(
            f"model 'tabular' takes rows of features, shape (features,); one example of the data has shape {shape}.\n"
            "Set model.name = 'mlp', which flattens its input, or another that fits (`fedsieve list models`)."
        )
    return _perceptron((*shape, *hidden, classes), dropout)


def _perceptron(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for depth, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers[f"fc{depth}"] = nn.Linear(inputs, outputs)
        if depth < len(widths) - 1:
            layers[f"relu{depth}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{depth}"] = nn.Dropout(dropout)
    return nn.Sequential(layers)
