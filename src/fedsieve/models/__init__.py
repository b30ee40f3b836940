"""Networks as functions of named parameters: `ModelSpec`, the built-in models, and your own."""

from fedsieve.models.spec import CATALOGUE, Entry, Loss, ModelSpec, build, cross_entropy

__all__ = ["CATALOGUE", "Entry", "Loss", "ModelSpec", "build", "cross_entropy"]
