"""Sparse inference: write a trained model for it, and run that on the sparse kernels of training.

sparse.safetensors is in the packed form of `fedsieve.finish.export`, and its metadata says how to build the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsieve import files
from fedsieve.errors import UsageError
from fedsieve.finish import compact
from fedsieve.finish.export import Values, pack, read
from fedsieve.finish.recipe import Recipe
from fedsieve.local.forms import sparse_layers
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks
from fedsieve.settings import Local

FORMAT = "fedsieve-sparse-1"
CONV, LINEAR = 0.7, 0.3
"""densities up to which a convolution and a linear layer are computed over their kept weights. Without gradients and on 32
examples convolutions break even at about 0.6, and those of images with few channels, which keep the most weights, at 1"""


LEAST = 2**16
"""weights that such layers must have together: with fewer the kernels take longer to load than they save"""


class SparseModel:
    """A trained network in evaluation mode, whose sparse layers hold and compute their kept weights only.

    Made by `load`. Sparse layers use the calling thread only. They keep memory from call to call, so a model must not be called
    from two threads at once: load it once for each.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, sparse: tuple[str, ...]) -> None:
        self.module, self.recipe = module, recipe
        self.sparse = sparse
        """names of the layers that are computed over their kept weights"""
        spread = (-1, *(1 for _ in recipe.shape[1:]))
        self._scale = (
            tuple(torch.tensor(each).float().view(spread) for each in (recipe.mean, recipe.std)) if recipe.mean else ()
        )

    @torch.inference_mode()
    def __call__(self, x: Tensor | NDArray[Any], *, normalised: bool = False) -> Tensor:
        """Map a batch of examples to scores.

        Args:
            x: (B, ...), B >= 1, as the data set of the run stores examples: images uint8, or float32 in the same units
                (0 to 255); features float32; tokens int64.
            normalised: x is float32 that the data set's mean has been subtracted from and that has been divided by its std;
                without it that is done here, if the data set has a mean.

        Returns:
            float32 (B, classes), or (B, T, classes) for sequences.

        Raises:
            UsageError: x has another shape or type.
        """
        x, recipe = torch.as_tensor(x), self.recipe
        kinds = (torch.int64,) if recipe.tokens else (torch.float32,) if normalised else (torch.uint8, torch.float32)
        if tuple(x.shape[1:]) != recipe.shape or not len(x) or x.dtype not in kinds:
            raise UsageError(
                f"a batch of shape {tuple(x.shape)}, {x.dtype}; needed: (examples, {', '.join(map(str, recipe.shape))}),"
                f" {' or '.join(map(str, kinds))}."
            )
        if self._scale and not normalised:
            x = x.sub(self._scale[0]).div_(self._scale[1])
        elif not recipe.tokens:
            x = x.float()
        scores: Tensor = self.module(x)
        return scores


def export(
    source: Path,
    out: Path,
    spec: ModelSpec,
    recipe: Recipe,
    *,
    compacted: bool = False,
    multiple: int = 1,
    values: Values = "fp32",
) -> Path:
    """Write the final model of a run folder as sparse.safetensors; return its path.

    Args:
        source: the run folder.
        out: folder to write to.
        spec: the network of the run.
        recipe: how to build that network.
        compacted: leave out dead channels and neurons first.
        multiple: see `fedsieve.finish.compact.export`.
        values: see `fedsieve.finish.export.pack`.

    Raises:
        UsageError: the folder holds no final model, or one of another network, or fp16 cannot hold its values.
    """
    tensors = compact.state(compact.narrowed(source, spec, multiple)) if compacted else compact.matching(source, spec)
    content = pack(tensors, values, {"format": FORMAT, "recipe": recipe.text()})
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sparse.safetensors"
    files.replace(path, content)
    return path


def load(path: Path | str, *, sparse_conv: float = CONV, sparse_linear: float = LINEAR) -> SparseModel:
    """Read sparse.safetensors.

    Weights that are not zero are the kept ones. Layers whose density is above the thresholds, and all layers of networks with
    fewer than 65,536 weights in layers below them, stay PyTorch's own: there the kernels take longer to load than they save.

    Args:
        path: the file.
        sparse_conv: largest density at which a convolution is computed over its kept weights only, in [0, 1] (0: never).
        sparse_linear: the same of linear layers.

    Raises:
        DataError: the file is not of this form, or its parts contradict one another.
        UsageError: a threshold is out of range; a model of your own cannot be imported, or has become another.
    """
    thresholds, path = Local(sparse_conv=sparse_conv, sparse_linear=sparse_linear, sparse_least=LEAST), Path(path)
    tensors, metadata = read(path, (FORMAT,))
    recipe = Recipe.read(metadata, path)
    module, layout = recipe.module(tensors, path)
    kept = [tensors[slot.name].flatten() != 0 for slot in layout.masked_slots]
    masks = Masks(layout, torch.cat(kept) if kept else torch.empty(0, dtype=torch.bool))
    names = sparse_layers(module, masks, thresholds)
    if names:
        from fedsieve.local.sparse_network import sparsify  # the compiler behind it takes a second to load

        sparsify(module, masks, names)
    return SparseModel(module.requires_grad_(False), recipe, tuple(names))
