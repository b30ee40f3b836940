"""Sparse inference: the packed form by gaps, what is refused, and scores equal to those of the trained model."""

import gc
import json
import sys
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import fedsieve
from conftest import same
from fedsieve import DataError, Masks, Model, Streams, UsageError, build, cli, load_sparse
from fedsieve.config import from_file
from fedsieve.data.datasets import load as load_data
from fedsieve.finish import export, runtime
from fedsieve.finish.compact import load as load_compact
from fedsieve.finish.recipe import Recipe
from fedsieve.local.patterns import Pattern
from fedsieve.local.sparse_kernels import SIZES, Chain, Stage
from fedsieve.settings import Data


def content(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def write(path, tensors, **metadata):
    path.write_bytes(fedsieve.files.safetensors(tensors, metadata))
    return path


# ---- the packed form


@given(zeros=st.lists(st.integers(0, 800), max_size=12), last=st.integers(0, 800))
def test_gaps_are_what_is_documented(zeros, last):
    """Any number of zeros before each element and after the last one, read back by a reader of its own."""
    kept = np.array([bit for n in zeros for bit in [False] * n + [True]] + [False] * last)
    gaps = export._gaps(kept)
    assert len(gaps) == len(zeros) + sum(n // 255 for n in [*zeros, last])
    read, open_ = [], 0
    for byte in gaps.tolist():
        open_ += byte
        if byte < 255:
            read.append(open_)
            open_ = 0
    assert read == zeros
    assert open_ == last // 255 * 255
    assert same(export._from_gaps(gaps, kept.size), np.flatnonzero(kept))
    for size in (kept.size - last % 255 - 1, kept.size - last % 255 + 255):
        assert size < 0 or export._from_gaps(gaps, size) is None


@example(size=25, density=0.95, values="fp32", seed=0)
@given(
    size=st.integers(0, 3000),
    density=st.sampled_from([0.0, 0.002, 0.01, 0.05, 0.12, 0.5, 0.95, 1.0]),
    values=st.sampled_from(["fp32", "fp16"]),
    seed=st.integers(0, 99),
)
def test_a_packed_tensor_comes_back_from_the_smaller_form(tmp_path_factory, size, density, values, seed):
    draw = torch.Generator().manual_seed(seed)
    tensor = torch.randn(size, generator=draw) * (torch.rand(size, generator=draw) < density)
    path = tmp_path_factory.mktemp("packed") / "file"
    path.write_bytes(export.pack({"w": tensor.view(1, size), "n": torch.arange(3)}, values))
    back = export.load(path)
    assert set(back) == {"w", "n"}
    held, metadata = content(path)
    packed = json.loads(metadata["shapes"])
    rounded = tensor.half().float() if values == "fp16" and packed else tensor
    assert torch.equal(back["w"], rounded.view(1, size))
    assert set(packed) == ({"w"} if "w.kept" in held or "w.gaps" in held else set())
    if packed:
        count, bits = int((rounded != 0).sum()), -(-size // 8)
        assert held["w"].dtype == {"fp32": torch.float32, "fp16": torch.float16}[values]
        gaps = len(export._gaps(rounded.numpy() != 0))
        places = held["w.gaps"] if "w.gaps" in held else held["w.kept"]
        assert len(held["w"]) == count
        assert len(places) == min(bits, gaps)
        assert count * held["w"].element_size() + len(places) < 4 * size


@pytest.mark.parametrize(("density", "least"), [(0.05, 15.5), (0.01, 70)])
def test_a_sparse_file_is_as_small_as_claimed(density, least):
    tensor = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    tensor[torch.rand(200_000, generator=torch.Generator().manual_seed(1)) >= density] = 0
    assert 4 * tensor.numel() / len(export.pack({"w": tensor})) > least


def test_files_of_the_first_version_are_read(tmp_path):
    tensors = {"w": torch.tensor([1.0, 2.0]), "w.kept": torch.tensor([0b01000001], dtype=torch.uint8), "b": torch.ones(2)}
    path = write(tmp_path / "old", tensors, format="fedsieve-packed-1", shapes='{"w": [2, 4]}')
    back = export.load(path)
    assert back["w"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]
    assert back["b"].tolist() == [1, 1]


def test_fp16_refuses_what_it_cannot_hold():
    tensor = torch.zeros(100)
    tensor[3] = 1e5
    with pytest.raises(UsageError, match=r"65,504.*--values fp32"):
        export.pack({"w": tensor}, "fp16")
    tensor[3] = torch.inf
    export.pack({"w": tensor}, "fp16")


def byte(*numbers):
    return torch.tensor(numbers, dtype=torch.uint8)


HOSTILE = {
    "another format": ({}, {"format": "fedsieve-packed-3"}),
    "no shapes": ({}, {"shapes": "{"}),
    "shape of text": ({}, {"shapes": '{"w": "12"}'}),
    "negative shape": ({}, {"shapes": '{"w": [-2, -600]}'}),
    "boolean shape": ({}, {"shapes": '{"w": [true, 600]}'}),
    "fractions": ({}, {"shapes": '{"w": [1.0, 600]}'}),
    "huge shape": ({}, {"shapes": '{"w": [1000000, 1000000, 1000000]}'}),
    "a little too large": ({}, {"shapes": '{"w": [856]}'}),
    "too small": ({}, {"shapes": '{"w": [600]}'}),
    "another name": ({}, {"shapes": '{"v": [601]}'}),
    "one value for many": ({"w": torch.ones(1)}, {}),
    "too many values": ({"w": torch.ones(3)}, {}),
    "values of bytes": ({"w": byte(1, 2)}, {}),
    "values in rows": ({"w": torch.ones(2, 1)}, {}),
    "gaps of int64": ({"w.gaps": torch.tensor([255, 254, 90])}, {}),
    "both": ({"w.kept": torch.zeros(76, dtype=torch.uint8)}, {}),
    "bits too short": ({"w.gaps": None, "w.kept": byte(0b11000000)}, {}),
    "bits too long": ({"w.gaps": None, "w.kept": byte(0b11000000, *[0] * 76)}, {}),
    "neither": ({"w.gaps": None}, {}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    good = {"w": torch.tensor([1.0, 2.0]), "w.gaps": byte(255, 254, 90)}
    metadata = {"format": export.FORMAT, "shapes": '{"w": [601]}'}
    whole = export.load(write(tmp_path / "good", good, **metadata))["w"]
    assert whole.nonzero().flatten().tolist() == [509, 600]
    tensors, changed = HOSTILE[name]
    held = {key: tensor for key, tensor in (good | tensors).items() if tensor is not None}
    with pytest.raises(DataError, match="no packed model"):
        export.load(write(tmp_path / "bad", held, **metadata | changed))


# ---- kernels without gradients


@pytest.mark.parametrize("stride", [1, 2])
def test_one_example_alone_has_the_scores_it_has_among_others(stride):
    """Bit for bit: an example's sums are taken in the same order, whatever stands beside it."""
    draw = np.random.default_rng(0)
    conv, last = draw.random((6, 3, 3, 3)) < 0.4, draw.random((7, 6 * (4 if stride == 1 else 2) ** 2)) < 0.3
    stages = [Stage(Pattern(conv, (stride, stride), (1, 1)), (2, 2), True), Stage(Pattern(last), relu=True)]
    values = [torch.from_numpy(draw.normal(size=int(kept.sum())).astype(np.float32)) for kept in (conv, last)]
    biases, chain = [torch.randn(6), None], Chain(stages)
    x = torch.randn(11, 3, 9 - stride, 9 - stride, generator=torch.Generator().manual_seed(0))
    x[2, 0, 3, 3] = torch.nan
    together = chain(x, values, biases)
    trained = chain(x, [each.clone().requires_grad_() for each in values], biases)
    assert same(together, trained.detach())
    for index in range(len(x)):
        assert same(chain(x[index : index + 1], values, biases)[0], together[index])


def test_a_chain_keeps_memory_for_few_sizes():
    chain = Chain([Stage(Pattern(np.ones((2, 3), bool)))])
    for examples in range(1, 3 * SIZES):
        x = torch.randn(examples, 3, 1, 1)
        assert torch.allclose(chain(x, [torch.ones(6)], [None])[:, 0, 0, 0], x.sum((1, 2, 3)), atol=1e-5)
    assert len(chain._steps) == SIZES


# ---- the runtime

OWN = """
from torch import nn


def net(shape, classes):
    return nn.Sequential(
        nn.Conv2d(1, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 48, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, classes),
    )
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with a model of one's own."""
    (tmp_path / "ownsparse.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    sys.modules.pop("ownsparse", None)


RUNS = {
    "mlp": ["--model.hidden", "600", "200"],
    "cnn": [],
    "resnet8": ["--model.norm", "batch"],
    "ownsparse:net": [],
}


def final(folder):
    """Module of a run's final model, from its folder, in evaluation mode."""
    config = from_file(folder / "config.toml")
    module = build(config.model, (1, 8, 8), 10).module.eval()
    module.load_state_dict(torch.load(folder / "export/model.pt"), strict=False)
    return module


@pytest.mark.parametrize("model", RUNS)
def test_the_runtime_has_the_scores_of_the_final_model(place, model, capsys):
    words = f"run fedsparsify --data digits --model {model} --algorithm.density 0.2 --engine.rounds 3 --out a".split()
    assert cli.main([*words, *RUNS[model], "--data.train_limit", "200", "--data.clients", "2", "--local.lr", "0.05"]) == 0
    assert cli.main(["export", "a", "--runtime", "sparse"]) == 0
    path = place / "a/export/sparse.safetensors"
    assert f"sparse.safetensors  {path.stat().st_size:,} bytes" in capsys.readouterr().out
    large, small = final(place / "a"), load_sparse(path)
    data = load_data(Data(name="digits", test_limit=20))
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (data.mean, data.std))
    x = (data.x_test - mean) / std
    with torch.no_grad():
        right = large(x)
    scale = float(right.abs().max())
    assert bool(small.sparse)
    for batch in (1, 3, 8, 20):
        for scores in (
            small(data.x_test[:batch]),
            small(data.x_test[:batch].float()),
            small(x[:batch], normalised=True),
            small(x[:batch].numpy(), normalised=True),
        ):
            assert not scores.requires_grad
            assert (scores - right[:batch]).abs().max() <= 1e-5 * scale

    dense = load_sparse(str(path), sparse_conv=0, sparse_linear=0)
    assert dense.sparse == ()
    assert (dense(x, normalised=True) - right).abs().max() <= 1e-6 * scale
    with pytest.raises(UsageError, match="sparse_conv"):
        load_sparse(path, sparse_conv=1.5)

    assert cli.main(["export", "a", "--runtime", "sparse", "--compact", "--values", "fp16"]) == 0
    less = path.stat().st_size
    halved = {name: tensor for name, tensor in export.read(path, (runtime.FORMAT,))[0].items() if tensor.is_floating_point()}
    compacted = load_compact(place / "a/export/compact.safetensors")
    assert {name: tensor.shape for name, tensor in compacted.state_dict().items() if name in halved} == {
        name: tensor.shape for name, tensor in halved.items()
    }
    assert less < 0.8 * sum(tensor.numel() * tensor.element_size() for tensor in small.module.state_dict().values())
    assert (load_sparse(path)(x, normalised=True) - right).abs().max() <= 3e-3 * scale


def test_tokens_are_taken_as_they_are(tmp_path):
    spec = build(Model(name="charlstm"), (6,), 65, tokens=True)
    path = write_sparse(tmp_path, spec, Recipe(Model(name="charlstm"), (6,), 65, tokens=True), 0.1)
    model, x = load_sparse(path), torch.arange(12).view(2, 6)
    module = spec.module.eval()
    module.load_state_dict(export.read(path, (runtime.FORMAT,))[0])
    with torch.no_grad():
        assert (model(x) - module(x)).abs().max() <= 1e-6
    with pytest.raises(UsageError, match=r"\(examples, 6\), torch.int64"):
        model(x.float())


def write_sparse(folder, spec, recipe, density):
    """Write sparse.safetensors of a network that starts at random under a random mask."""
    kept = torch.rand(spec.layout.maskable, generator=torch.Generator().manual_seed(0)) < density
    params = spec.initial("glorot", Streams(0)).under(Masks(spec.layout, kept))
    params.dense[...] = torch.randn(params.dense.shape, generator=torch.Generator().manual_seed(1))
    (folder / "model.safetensors").write_bytes(
        fedsieve.files.safetensors({name: tensor.clone() for name, tensor in params.items()}, {})
    )
    return runtime.export(folder, folder / "out", spec, recipe)


MLP = Model(name="mlp", hidden=(500, 300))


@pytest.fixture
def mlp(tmp_path):
    """sparse.safetensors of an MLP on images of 1 x 10 x 10."""
    return write_sparse(tmp_path, build(MLP, (1, 10, 10), 10), Recipe(MLP, (1, 10, 10), 10, False, (3.0,), (2.0,)), 0.05)


def test_what_is_no_batch_is_refused(mlp):
    model = load_sparse(mlp)
    for x in (torch.zeros(1, 10, 10), torch.zeros(2, 1, 10, 9), torch.zeros(0, 1, 10, 10), torch.zeros(2, 1, 10, 10).double()):
        with pytest.raises(UsageError, match=r"\(examples, 1, 10, 10\), torch.uint8 or torch.float32"):
            model(x)
    with pytest.raises(UsageError, match=r"torch.float32\."):
        model(torch.zeros(2, 1, 10, 10, dtype=torch.uint8), normalised=True)


def held(thing):
    """Bytes of each piece of memory that tensors and arrays reached from a thing hold."""
    sizes, seen, open_ = {}, set(), [thing]
    while open_:
        each = open_.pop()
        if id(each) in seen or isinstance(each, ModuleType | FunctionType | type):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif isinstance(each, np.ndarray):
            while isinstance(each.base, np.ndarray):
                each = each.base
            sizes[each.ctypes.data] = each.nbytes
        open_ += gc.get_referents(each)
    return list(sizes.values())


def test_dense_weights_are_not_held(mlp):
    weights = 4 * (100 * 500 + 500 * 300 + 300 * 10)
    model = load_sparse(mlp)
    assert set(model.sparse) == {name for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}
    model(torch.zeros(4, 1, 10, 10))
    model(torch.zeros(1, 1, 10, 10))
    sizes = held(model)
    assert 0.05 * weights < sum(sizes) < 0.5 * weights
    assert max(sizes) < 0.06 * weights
    assert sum(held(load_sparse(mlp, sparse_linear=0))) >= weights


def test_hostile_sparse_files_are_refused(mlp, tmp_path):
    tensors, metadata = content(mlp)
    names = [name for name in tensors if "." in name and tensors[name].dtype == torch.float32]
    recipe, shapes = json.loads(metadata["recipe"]), json.loads(metadata["shapes"])

    def refused(tensors=tensors, recipe=recipe, shapes=shapes, **more):
        told = {"recipe": json.dumps(recipe), "shapes": json.dumps(shapes)}
        with pytest.raises(DataError, match=r"bad\b"):
            load_sparse(write(tmp_path / "bad", tensors, **metadata | told | more))

    for length in (0, 7, 100, len(mlp.read_bytes()) - 1):
        (tmp_path / "bad").write_bytes(mlp.read_bytes()[:length])
        with pytest.raises(DataError, match="no packed model"):
            load_sparse(tmp_path / "bad")
    for name in names:
        refused({key: tensor for key, tensor in tensors.items() if not key.startswith(name)})
    refused(tensors | {"more": torch.ones(2)})
    bias = next(name for name in names if name.endswith("bias") and name not in shapes)
    refused(tensors | {bias: tensors[bias].double()})
    refused(tensors | {bias: tensors[bias][:-1].clone()})
    for name, (rows, columns) in shapes.items():
        refused(shapes=shapes | {name: [columns, rows]})
        refused(shapes=shapes | {name: [rows, columns, 1]})
    refused(format="fedsieve-packed-2")
    refused(recipe=[])
    for wrong in (
        {"model": {"name": "nonsense"}},
        {"model": {"name": "mlp", "hidden": [0]}},
        {"classes": 11},
        {"model": recipe["model"] | {"hidden": [500, 300, 20]}},
        {"shape": [1, -10, -10]},
        {"shape": [10**7, 10**7]},
        {"shape": "abc"},
        {"classes": -1},
        {"mean": [1.0, 2.0]},
        {"mean": ["a"], "std": ["b"]},
        {"tokens": True},
    ):
        refused(recipe=recipe | wrong)
    own = recipe | {"model": {"name": "notthere:net"}}
    with pytest.raises(UsageError, match="cannot import 'notthere'"):
        load_sparse(write(tmp_path / "bad", tensors, **metadata | {"recipe": json.dumps(own)}))


def test_the_size_of_a_file_is_that_of_its_kept_weights(mlp):
    tensors, metadata = content(mlp)
    kept = sum(len(tensors[name]) for name in json.loads(metadata["shapes"]))
    biases = 500 + 300 + 10
    assert 5 * kept < mlp.stat().st_size < 5.02 * kept + 4 * biases + 1500
    assert kept == pytest.approx(0.05 * (100 * 500 + 500 * 300 + 300 * 10), rel=0.05)


def test_options_are_checked(place, capsys):
    assert cli.main(["export", "a", "--runtime", "dense"]) == 2
    assert "('none', 'sparse')" in capsys.readouterr().err
    assert cli.main(["export", "a", "--values", "int8"]) == 2
    assert "('fp32', 'fp16')" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    out = capsys.readouterr().out
    assert "--runtime {none,sparse}" in out
    assert "fedsieve.load_sparse" in out


def test_the_variants_of_the_bench_have_the_same_scores(tmp_path):
    from fedsieve.bench.inference import CLASSES, MODEL, SHAPE, variants
    from fedsieve.bench.kernels import random_masks

    spec = build(MODEL, SHAPE, CLASSES)
    masks = random_masks(spec.layout, (min(1.0, 6 * 0.05), 0.05, 0.05, 0.05))
    acts, sizes = variants(spec, masks, tmp_path)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    scores = {name: act(x) for name, act in acts.items()}
    right = scores["contiguous"]
    assert all((each - right).abs().max() <= 1e-4 * right.abs().max() for each in scores.values())
    assert 14.5 < sizes["state dict"] / sizes["sparse fp32"] < 17
    assert sizes["state dict"] / sizes["sparse fp16"] > 24
