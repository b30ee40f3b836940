"""What the documentation says is what the code does; the examples run."""

import ast
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedsieve import DataError, Diverged, Engine, FedAvg, FedSparsify, Local, UsageError, cli, errors, fit
from fedsieve.algorithms.base import find, names
from fedsieve.config import from_file
from fedsieve.finish import compact, runtime
from fedsieve.finish.export import export
from fedsieve.finish.recipe import Recipe
from fedsieve.report.settings import entries, settings_markdown
from fedsieve.settings import Data, Model
from fedsieve.wire.message import Reason

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
SETTINGS = [Data, Model, Local, Engine, *map(find, names())]
FREE = {"lost": "CLIENT", "densities": "TENSOR", "phases": "PHASE", "widths": "LAYER"}
"""keys of a record or an export under which names are free, and the word that the page uses for them"""


def section(page, heading):
    """Text of a page from a heading to the next one of the same level."""
    return (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text):
    """Cells of each table row that begins with code."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def first_column(text):
    return {row[0].strip("`") for row in table(text)}


def leaves(tree, prefix=""):
    """Dotted keys of nested dictionaries, free names replaced."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            word = FREE.get(key)
            yield from (leaf for each in value.items() for leaf in leaves({word or each[0]: each[1]}, f"{name}."))
        else:
            yield name


def without_parents(keys):
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


@pytest.fixture(scope="module")
def run(digits, small, tmp_path_factory):
    """Folder of a run in which weights were pruned and clients lost."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    engine = Engine(rounds=3, dropout=0.4, seed=1, eval_every=2)
    result = fit(FedSparsify(density=0.2), model=small, data=digits, engine=engine, out=folder)
    assert any(row["lost"] for row in result.rows)
    export(folder, folder / "export")
    recipe = Recipe.of(Model(name="mlp", hidden=(16,)), digits)
    compact.export(folder, folder / "export", small, recipe)
    runtime.export(folder, folder / "export", small, recipe)
    return folder


def test_every_key_of_a_record_is_documented_and_every_documented_key_is_there(run):
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    found = without_parents({key for row in rows for key in leaves(row)})
    assert found == without_parents(first_column(section("records.md", "records.jsonl")))


def test_summary_and_partition_have_the_keys_documented(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["client_accuracy"] = None
    assert set(leaves(summary)) == first_column(section("records.md", "summary.json"))
    assert set(json.loads((run / "partition.json").read_text())) == first_column(section("records.md", "partition.json"))


def test_tensor_files_have_the_tensors_and_metadata_documented(run, small):
    slots = {slot.name for slot in small.layout.slots}
    masked = {slot.name for slot in small.layout.masked_slots}
    with safe_open(run / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == slots
        assert set(file.metadata()) == first_column(section("records.md", "model.safetensors"))
    documented = first_column(section("records.md", "export/packed.safetensors"))
    with safe_open(run / "export" / "packed.safetensors", framework="pt") as file:
        assert set(file.keys()) == slots | {f"{name}.kept" for name in masked}
        assert set(file.metadata()) | {"TENSOR", "TENSOR.kept", "TENSOR.gaps"} == documented
        assert f"`{file.metadata()['format']}`" in section("records.md", "export/packed.safetensors")
    with safe_open(run / "export" / "sparse.safetensors", framework="pt") as file:
        assert set(file.keys()) == slots | {f"{name}.kept" for name in masked}
        assert set(file.metadata()) == first_column(section("records.md", "export/sparse.safetensors"))
        assert f"`{file.metadata()['format']}`" in section("records.md", "export/sparse.safetensors")


def test_the_compact_export_holds_what_is_documented(run):
    with safe_open(run / "export" / "compact.safetensors", framework="pt") as file:
        assert set(file.metadata()) == first_column(section("records.md", "export/compact.safetensors"))
        assert file.metadata()["format"] in section("records.md", "export/compact.safetensors")
        module = compact.load(run / "export" / "compact.safetensors")
        assert set(file.keys()) == set(module.state_dict())
    sizes = json.loads((run / "export" / "compact.json").read_text())
    documented = {
        key for row in table(section("records.md", "export/compact.json")) for key in re.findall(r"`([^`]+)`", row[0])
    }
    assert set(leaves(sizes)) == documented


def test_a_checkpoint_holds_what_is_documented(run):
    with safe_open(run / "checkpoint" / "latest.safetensors", framework="pt") as file:
        outer = dict(json.loads(file.metadata()["state"])["mapping"])
        frozen = file.get_tensor(outer["progress"]["bytes"]["tensor"]).numpy().tobytes()
    header = json.loads(frozen[8 : 8 + int.from_bytes(frozen[:8], "little")])
    inner = dict(json.loads(header["__metadata__"]["state"])["mapping"])
    documented = first_column(section("records.md", "checkpoint/latest.safetensors"))
    assert set(outer) | {f"progress.{key}" for key in inner} == documented


def test_every_file_of_a_run_folder_is_documented(run):
    from fedsieve.commands import inspect_command, report_command

    report_command([str(run)])
    inspect_command([str(run)])
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    found |= {"audit.json", "audit.html"}  # there are too few examples here; tests/test_audit.py has them written
    listed = (DOCS / "records.md").read_text().split("\n## ")[0]
    assert found == {name for row in table(listed) for name in re.findall(r"`([^`]+)`", row[0])}


def test_exit_codes_are_those_of_the_errors():
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in section("errors.md", "Exit codes").splitlines()]
    codes = {name: int(row[0]) for row in rows if row and row[0].isdigit() for name in re.findall(r"`(\w+)`", row[1])}
    classes = (errors.FedsieveError, UsageError, DataError, Diverged)
    assert codes == {cls.__name__: cls.exit_code for cls in classes} | {"Interrupted": 143}
    documented = {int(row[0]) for row in rows if row and row[0].isdigit()}
    assert documented == {
        0,
        1,
        2,
        3,
        4,
        *(errors.Interrupted(n).exit_code for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)),
    }


@pytest.mark.parametrize("row", table(section("errors.md", "Common errors")), ids=lambda row: row[0].strip("`"))
def test_a_common_error_is_met_as_the_page_says(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        code = cli.main(shlex.split(row[0].strip("`"))[1:])
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    message = capsys.readouterr().err
    assert code == int(row[1])
    assert row[2] in " ".join(message.split())
    assert len(message.splitlines()) <= 8


def test_wire_errors_are_the_closed_list():
    reasons = {name for row in table(section("errors.md", "Wire errors")) for name in re.findall(r"`(\w+)`", row[0])}
    assert reasons == {reason.value for reason in Reason}
    specified = [line.split("|")[1].strip() for line in section("wire.md", "Refusals").splitlines() if line.startswith("|")]
    assert set(specified[2:]) == reasons


def test_the_layers_are_those_that_are_held():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    held = [{name.removeprefix("fedsieve.") for name in layer.split(" | ")} for layer in contract["layers"]]
    text = (DOCS / "architecture.md").read_text().split("<!-- layers -->")[1].split("\n\n")[0]
    assert [set(re.findall(r"`(\w+)`", row[0])) for row in table(text)] == held
    modules = {
        path.stem for path in (ROOT / "src" / "fedsieve").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert modules - {"__init__"} == set().union(*held)


def test_the_settings_page_is_what_the_settings_are():
    if os.environ.get("FEDSIEVE_WRITE_DOCS") == "1":
        (DOCS / "settings.md").write_text(settings_markdown())
    assert (DOCS / "settings.md").read_text() == settings_markdown(), "FEDSIEVE_WRITE_DOCS=1 writes docs/settings.md anew"


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_text_and_every_number_a_range(cls):
    for entry in entries(cls):
        assert entry.text, entry.key
        assert entry.allowed or ("int" not in entry.type and "float" not in entry.type), entry.key
        assert entry.allowed or entry.type != "choice", entry.key


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_the_ranges_shown_are_the_ranges_that_hold(cls):
    """The value next to each bound is taken or refused as the page says."""
    for entry in entries(cls):
        bounds = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])|(>=|>) (\S+)", entry.allowed)
        if not bounds or "." in entry.key:
            continue
        low, high = bounds[2] or bounds[6], bounds[3]
        below, number = {"int": (-1, int), "float": (-1e-6, float)}[entry.type]
        least = number(low)
        assert taken(cls, entry.key, least) == (bounds[1] == "[" or bounds[5] == ">=")
        assert not taken(cls, entry.key, least + below)
        assert taken(cls, entry.key, least - below)
        if high:
            most = 2 ** int(high[2:]) if high.startswith("2^") else number(high)
            assert taken(cls, entry.key, most) == (bounds[4] == "]")
            assert not taken(cls, entry.key, most - below)


def taken(cls, key, value):
    try:
        return getattr(cls(**{key: value}), key) == value
    except UsageError:
        return False


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)), target


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The method of docs/adding-a-method.md, saved where Python finds it; its class and the page's other code."""
    text = (DOCS / "adding-a-method.md").read_text()
    code, use = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "clipped.py").write_text(code)
    (tmp_path / "use.py").write_text(use)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "clipped", raising=False)
    yield find("clipped:Clipped")
    sys.modules.pop("clipped", None)


def test_the_method_of_the_page_runs_from_python_and_from_the_command_line(method, capsys):
    result = runpy.run_path("use.py")["result"]
    text = (DOCS / "adding-a-method.md").read_text()
    (line,) = re.findall(r"^\$ fedsieve (run .*)$", text, flags=re.MULTILINE)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert cli.main([*line.split(), "--out", "run"]) == 0
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    config = from_file(Path("run/config.toml"))
    assert config.algorithm == method(norm=0.5)
    assert config.engine.rounds == len(result.rows) == 2
    assert json.loads(Path("run/summary.json").read_text())["accuracy"] > 0.5


def test_the_method_of_the_page_clips_and_is_else_fedavg(method, digits, small):
    settings = {"model": small, "data": digits, "engine": Engine(rounds=2)}
    loose, plain = (fit(algorithm, **settings) for algorithm in (method(norm=1e6), FedAvg()))
    assert torch.equal(loose.params.flat, plain.params.flat)
    assert loose.summary["bytes_up"] == plain.summary["bytes_up"]
    start = small.initial("module", None)
    tight = fit(method(norm=0.01), **settings)
    moved = float((tight.params - start).trainable.norm())
    assert 0.001 < moved <= 0.02 * (1 + 1e-4) < float((plain.params - start).trainable.norm())


def test_the_method_of_the_page_keeps_what_methods_promise(method, digits, small, tmp_path, monkeypatch):
    import test_conformance as promises

    mine = ("clipped:Clipped", method(norm=5.0), digits, small)
    promises.test_settings_are_frozen_and_described(*mine[:2])
    promises.test_steps_are_pure(*mine)
    promises.test_runs_repeat_and_learn_within_their_density(*mine)
    promises.test_interrupted_and_resumed_is_never_interrupted(*mine, tmp_path)
    promises.test_a_round_without_replies_changes_nothing(*mine)
    promises.test_replies_that_are_not_valid_are_lost_and_end_no_run(*mine, monkeypatch)


def example(name, tmp_path):
    """Run an example in an empty folder; return what it prints."""
    words = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    return done.stdout


def test_the_example_with_an_own_model_learns_in_ten_statements(tmp_path):
    body = ast.parse((ROOT / "examples" / "own_model.py").read_text()).body
    assert len([node for node in body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]) <= 10
    said = example("own_model.py", tmp_path)
    accuracy, density = re.search(r"accuracy ([\d.]+)% at density ([\d.]+)", said).groups()
    assert float(accuracy) > 90
    assert density == "0.100"


def test_the_example_that_compares_methods_prints_a_row_a_method(tmp_path):
    head, *rows = example("compare_methods.py", tmp_path).splitlines()
    assert head.split() == ["method", "accuracy", "%", "density", "MB", "up", "MB", "down"]
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", row[26:])] for row in rows]
    dense, sparse = numbers
    assert min(dense[0], sparse[0]) > 85
    assert (dense[2], sparse[2]) == (1.0, 0.1)
    assert sparse[3] < 0.5 * dense[3]
    assert sparse[4] < 0.5 * dense[4]


def test_the_example_config_is_valid_and_says_what_it_does(tmp_path):
    config = from_file(ROOT / "examples" / "fashion.toml")
    assert config.algorithm == FedSparsify(variant="global", density=0.05)
    assert (config.data.partition, config.data.per_client, config.data.clients) == ("classes", 2, 10)
    assert (config.engine.rounds, config.local.epochs) == (40, 2)


def test_the_example_config_fits_the_data():
    config = from_file(ROOT / "examples" / "fashion.toml")
    try:
        spec, data, _ = config.prepare()
    except DataError as error:
        pytest.skip(str(error).splitlines()[0])
    assert spec.parameters == 118282
    assert ((data.histogram() > 0).sum(axis=1) == 2).all()
