"""How to build the network that an exported file holds, as JSON under the metadata key `recipe`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsieve.data.batches import Federation
from fedsieve.errors import DataError, UsageError
from fedsieve.models.compact import narrow
from fedsieve.models.spec import build
from fedsieve.params import Layout
from fedsieve.settings import Model


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `build` takes, and what is done to the data before."""

    model: Model
    shape: tuple[int, ...]
    """of one example"""
    classes: int
    tokens: bool
    """examples are int64 tokens"""
    mean: tuple[float, ...] = ()
    """per channel, in units of the stored values; empty: not normalised"""
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, model: Model, data: Federation) -> Recipe:
        """Return the recipe of a run's model on its data."""
        return cls(model, data.shape, data.classes, data.tokens, data.train.mean, data.train.std)

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> Recipe:
        """Take a recipe out of the metadata of a file.

        Raises:
            DataError: there is none, or one that is none.
        """
        try:
            told = json.loads(metadata["recipe"])
            shape, mean, std = (tuple(told.get(key, ())) for key in ("shape", "mean", "std"))
            recipe = cls(Model(**told["model"]), shape, int(told["classes"]), bool(told["tokens"]), mean, std)
            sound = all(type(side) is int and side > 0 for side in shape) and recipe.classes > 0
            if not (sound and len(mean) == len(std) and len(mean) in (0, *shape[:1]) and all(map(_number, mean + std))):
                raise ValueError("its shapes or numbers are none")
        except Exception as error:
            raise DataError(f"{path} says not how to build its network: {error!r}") from None
        return recipe

    def text(self) -> str:
        """Return the recipe as it stands in a file."""
        return json.dumps(asdict(self))

    def module(self, tensors: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, Layout]:
        """Build the network with the tensors of a file, in evaluation mode, and its layout; its widths follow from the tensors.

        A model of your own is imported, so its code must be found.

        Raises:
            DataError: the tensors are not those of the model.
            UsageError: a model of your own cannot be imported, or has become another.
        """
        own = ":" in self.model.name
        try:
            spec = build(self.model, self.shape, self.classes, tokens=self.tokens)
            slots = [replace(slot, shape=tuple(tensors[slot.name].shape)) for slot in spec.layout.slots]
            module = narrow(spec.module, {slot.name: tensors[slot.name] for slot in slots})
            unknown = module.load_state_dict(tensors, strict=False).unexpected_keys
            if unknown or any(tensors[slot.name].dtype != torch.float32 for slot in slots):
                raise KeyError(*unknown, "of float32")
            with torch.no_grad():
                scores = module.eval()(spec.example)
            if scores.shape[-1] < self.classes:
                raise ValueError(f"{scores.shape[-1]} scores for {self.classes} classes")
        except (KeyError, RuntimeError, ValueError) as error:
            kind = UsageError if own else DataError
            raise kind(f"{path} was made of another model than {self.model.name} is now: {error}") from None
        except UsageError as error:
            if own:
                raise
            raise DataError(f"{path} says not how to build its network: {error}") from None
        return module, Layout.of(slots)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
