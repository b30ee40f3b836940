"""Sparse inference against dense PyTorch and ONNX Runtime on one thread: `python -m fedsieve.bench.inference`.

The CNN of job J1 (1.66 M parameters, images of 1 x 28 x 28) under random masks, as `fedsieve.bench.kernels` draws them. Of each
density and number of images a call, all variants take turns, so that they see the same machine:

    pytorch      the dense module in evaluation mode, channels last where that is faster
    accelerated  the same with our dense convolutions (`fedsieve.local.convolution`)
    onnx         the dense network in ONNX Runtime, on its provider for CPUs
    sparse       `fedsieve.load_sparse` of what `fedsieve export --runtime sparse` writes

Times are the processor's, medians. All get normalised images. Sizes are those of files: `torch.save` of the state dict, the
ONNX file, sparse.safetensors with values in 32 and 16 bits. Without onnx and onnxruntime (the extra `bench`) their rows are
left out.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsieve import files
from fedsieve.bench import history
from fedsieve.bench.kernels import FIRST, milliseconds, random_masks
from fedsieve.engine.folder import environment
from fedsieve.engine.transports import keep_freed_memory
from fedsieve.finish import runtime
from fedsieve.finish.recipe import Recipe
from fedsieve.local.convolution import accelerate
from fedsieve.models.spec import ModelSpec, build
from fedsieve.params import Masks
from fedsieve.settings import Local, Model
from fedsieve.streams import Streams

DENSITIES = (0.1, 0.05, 0.01)
BATCHES = (1, 32, 128)
SECONDS = 6.0
"""about how long the variants of a density and batch size take turns"""
GOALS = {"throughput": 4.0, "size": 15.0}
"""what FedSparsify claims, arXiv 2204.12430: times the throughput of the dense network, times as small a file"""
MODEL, SHAPE, CLASSES = Model(name="cnn"), (1, 28, 28), 10
DIFFERENCE = 1e-4
"""that scores of variants may have"""

Scores = Callable[[Tensor], Tensor]


def onnx_bytes(module: nn.Module, example: Tensor) -> bytes | None:
    """Return a module as an ONNX file whose batch size is free; None if onnx or onnxruntime is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs another package
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "b"}}}
        torch.onnx.export(module, (example,), buffer, dynamo=False, **names)  # type: ignore[arg-type]
    return buffer.getvalue()


def onnx_scores(model: bytes) -> Scores:
    """Return an ONNX file as a function, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def variants(spec: ModelSpec, masks: Masks, folder: Path) -> tuple[dict[str, Scores], dict[str, int]]:
    """Return the network under masks in each variant, and the bytes of its files."""
    params = spec.initial("glorot", Streams(0)).under(masks)
    dense = deepcopy(spec.module).eval()
    dense.load_state_dict({name: tensor.clone() for name, tensor in params.items()})
    last, fast = (deepcopy(dense).to(memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    accelerate(fast, Local())
    files.replace(folder / "model.safetensors", files.safetensors({k: v.clone() for k, v in params.items()}, {}))
    recipe, sizes = Recipe(MODEL, SHAPE, CLASSES, tokens=False), {}
    for values in ("fp16", "fp32"):
        path = runtime.export(folder, folder, spec, recipe, values=values)
        sizes[f"sparse {values}"] = path.stat().st_size
    sparse = runtime.load(path)
    if len(sparse.sparse) != 4:
        raise AssertionError("a layer of the CNN is not computed by sparse kernels")
    found: dict[str, Scores] = {
        "contiguous": dense,
        "channels last": lambda x: last(x.contiguous(memory_format=torch.channels_last)),
        "accelerated": lambda x: fast(x.contiguous(memory_format=torch.channels_last)),
        "sparse": lambda x: sparse(x, normalised=True),
    }
    saved = io.BytesIO()
    torch.save(dense.state_dict(), saved)
    sizes["state dict"] = len(saved.getvalue())
    exported = onnx_bytes(dense, spec.example)
    if exported:
        found["onnx"] = onnx_scores(exported)
        sizes["onnx"] = len(exported)
    return found, sizes


@torch.inference_mode()
def measure(density: float, seconds: float) -> list[dict[str, Any]]:
    """Measure the network at a density; return a row for each batch size."""
    spec = build(MODEL, SHAPE, CLASSES)
    masks = random_masks(spec.layout, (min(1.0, FIRST * density), density, density, density))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        acts, sizes = variants(spec, masks, Path(folder))
    for batch in BATCHES:
        x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
        right = acts["contiguous"](x)
        difference = max(float((act(x) - right).abs().max()) for act in acts.values())
        if difference > DIFFERENCE * float(right.abs().max()):
            raise AssertionError(f"scores differ by {difference}")
        times = milliseconds([partial(act, x) for act in acts.values()], seconds)
        rates = {name: 1e3 * batch / time for name, time in zip(acts, times, strict=True)}
        rates = {"pytorch": max(rates.pop("contiguous"), rates.pop("channels last")), **rates}
        ratios = {f"over {name}": rates["sparse"] / rate for name, rate in rates.items() if name != "sparse"}
        smaller = {"file, fp32": sizes["state dict"] / sizes["sparse fp32"]}
        smaller["file, fp16"] = sizes["state dict"] / sizes["sparse fp16"]
        rows.append(
            {"density": density, "batch": batch, "images_per_second": rates, "ratios": ratios | smaller, "bytes": sizes}
        )
    return rows


def main() -> int:
    """Print the table, and keep the figures in results/bench_inference.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    try:
        for density in DENSITIES:
            for row in measure(density, SECONDS):
                rows.append(row)
                rates = "  ".join(f"{name} {rate:,.0f}" for name, rate in row["images_per_second"].items())
                times = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
                print(f"density {density:<5} batch {row['batch']:3}  images/s: {rates}  sparse {times}", flush=True)
            print(f"bytes: {row['bytes']}")
    finally:
        torch.set_num_threads(threads)
    if "onnx" not in rows[0]["bytes"]:
        print("ONNX Runtime was left out: pip install 'fedsieve[bench]'")
    ratios = {
        f"{name} at {row['density']}": ratio for row in rows if row["batch"] == 32 for name, ratio in row["ratios"].items()
    }
    figures = {"ratios": ratios, "goals": GOALS, "rows": rows, **environment()}
    files.replace(Path("results/bench_inference.json"), json.dumps(figures, indent=2) + "\n")
    kept = ("over pytorch", "over onnx", "file, fp32")
    history.add("inference", {name: ratio for name, ratio in ratios.items() if name.startswith(kept)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
