"""A config is checked by one mechanism, whether it comes from TOML, the command line or Python; as text it is a fixed point."""

import random
import tomllib
from typing import Literal, get_args, get_origin

import pytest
import tomli_w

from fedsieve import Data, Engine, FedAvg, FedSparsify, Local, Model, UsageError
from fedsieve.algorithms.base import find, names
from fedsieve.config import from_file, from_name, keys, sections
from fedsieve.settings import nearest

KEYS = [(method, key) for method in names() for key in keys(sections(method))]


def written(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def refused(path, values=None):
    with pytest.raises(UsageError) as error:
        from_file(path, values)
    return str(error.value)


def field(method, key):
    """The description and the type of a key."""
    section, *names = key.split(".")
    kind, text = sections(method)[section], ""
    for name in names:
        found = kind.__pydantic_fields__[name]
        kind, text = found.annotation, found.description
    return text, kind


@pytest.mark.parametrize("name", names())
def test_resolved_config_is_a_fixed_point(tmp_path, name):
    given = {"algorithm.weighting": "uniform", "model.hidden": ["30", "20"], "model.dropout": "0.5", "data.root": None}
    given |= {"engine.seed": "7", "local.lr": "1e-3", "local.nesterov": "true", "local.momentum": ".9"}
    config = from_name(name, given)
    again = from_file(written(tmp_path, tomli_w.dumps(config.tables())))
    assert again == config
    assert tomli_w.dumps(again.tables()) == tomli_w.dumps(config.tables())
    assert (config.engine.seed, config.local.lr, config.model.hidden, config.model.dropout) == (7, 1e-3, (30, 20), 0.5)
    assert config.algorithm.weighting == "uniform"


def test_values_given_besides_a_file_override_it_and_nothing_else(tmp_path):
    path = written(
        tmp_path, '[algorithm]\nname = "fedavg"\nserver = {name = "adam", lr = 0.5}\n[local]\nepochs = 3\nbatch = 8\n'
    )
    config = from_file(path, {"algorithm.server.lr": "0.25", "local.epochs": "2"})
    assert config.algorithm == FedAvg(server={"name": "adam", "lr": 0.25})
    assert config.local == Local(epochs=2, batch=8)
    assert (config.data, config.model, config.engine) == (Data(), Model(), Engine())


@pytest.mark.parametrize(("method", "key"), KEYS)
def test_every_key_has_help_with_its_range_a_type_and_a_default(method, key):
    text, kind = field(method, key)
    assert len(text) > 10
    section, *path = key.split(".")
    value = getattr(from_name(method), section)
    for name in path:
        value = getattr(value, name)
    known = keys(sections(method))[key]
    if known in (int, float):
        assert any(sign in text for sign in (">", "in (", "in [")), text
    if get_origin(kind) is Literal:
        assert value in get_args(kind)


def edits(key, count):
    """Some one-letter edits of the last part of a key: a letter lost, doubled, swapped or replaced."""
    chance, found = random.Random(key), set()
    start = key.rindex(".") + 1
    for place in range(start, len(key)):
        found |= {key[:place] + key[place + 1 :], key[:place] + key[place] + key[place:], key[:place] + "x" + key[place + 1 :]}
        if place + 1 < len(key):
            found.add(key[:place] + key[place + 1] + key[place] + key[place + 2 :])
    found -= {key, key[:start]}
    return chance.sample(sorted(found), min(count, len(found)))


@pytest.mark.parametrize(("method", "key"), KEYS)
def test_misspelt_key_in_a_file_is_answered_with_the_right_one_and_its_line(tmp_path, method, key):
    for wrong in edits(key, 4):
        section, _, last = wrong.rpartition(".")
        algorithm = "" if section == "algorithm" else f"\n[{section}]"
        text = f'# mine\n[algorithm]\nname = "{method}"\n{algorithm}\n{last} = 1\n'
        said = refused(written(tmp_path, text))
        assert len(said.splitlines()) <= 6
        assert said.startswith(f"{tmp_path / 'mine.toml'}, line {text.splitlines().index(f'{last} = 1') + 1}: {wrong} ")
        assert repr(key) in said, wrong


def test_key_of_another_section_is_found():
    known = keys(sections("fedavg"))
    assert nearest("engine.epochs", known) == " Did you mean 'local.epochs'?"
    assert nearest("--rounds", [f"--{key}" for key in known]) == " Did you mean '--engine.rounds'?"
    assert nearest("zzzzzzz", known) == ""


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Data(nam="digits"), "Data.name"),
        (lambda: Engine(eval_evry=3), "Engine.eval_every"),
        (lambda: Local(learning_rate=3), ""),
        (lambda: FedSparsify(densty=0.1), "FedSparsify.density"),
        (lambda: FedAvg(server={"lrr": 1}), "FedAvg.server.lr"),
    ],
)
def test_misspelt_keyword_in_python_is_answered_with_the_right_one(make, key):
    with pytest.raises(UsageError, match="is no setting") as error:
        make()
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("algorithm.density", 1.5, "in (0, 1]"),
        ("algorithm.density", "nan", "in (0, 1]"),
        ("algorithm.variant", "globl", "'global'"),
        ("data.clients", 0, ">= 1"),
        ("data.alpha", "-1", "> 0"),
        ("data.partition", "dirichlt", "Did you mean 'dirichlet'?"),
        ("engine.seed", 2**63, "in [0, 2**63)"),
        ("engine.rounds", 2.5, ">= 1"),
        ("engine.dropout", 1, "in [0, 1)"),
        ("local.lr", "fast", "> 0"),
        ("local.lr", "inf", "> 0"),
        ("local.device", "gpu", "cpu, or cuda"),
        ("local.nesterov", "maybe", "boolean"),
        ("model.hidden", [3, 0], ">= 1"),
        ("model.dense", 3, "tuple"),
    ],
)
def test_value_that_is_not_allowed_is_named_with_its_key_and_range(tmp_path, key, value, said):
    with pytest.raises(UsageError) as error:
        from_name("fedsparsify", {key: value})
    message = str(error.value)
    assert message.startswith(f"{key} = {value if not isinstance(value, list) else value[-1]}: ")
    assert said in message
    assert len(message.splitlines()) <= 8
    section, name = key.split(".")
    head = "" if section == "algorithm" else f"[{section}]\n"
    path = written(tmp_path, f'[algorithm]\nname = "fedsparsify"\n{head}{name} = {value!r}\n')
    assert refused(path).startswith(f"{path}, line {4 if head else 3}: {key} = ")
    cls = sections("fedsparsify")[section]
    with pytest.raises(UsageError, match=f"{cls.__name__}.{name} = "):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[algoritm]\nname = 'fedavg'\n", 1, "algorithm.name is not given"),
        ("[algorithm]\nname = 3\n", 2, "algorithm.name is not given"),
        ("[algorithm]\n\nname = 'fedavgg'\n", 3, "Did you mean 'fedavg'?"),
        ("[algorithm]\nname = 'fedavg'\n[engin]\nrounds = 3\n", 3, "Did you mean 'engine'?"),
        ("engine = 3\n[algorithm]\nname = 'fedavg'\n", 1, "engine is no section"),
        ("local.lr = -1\n[algorithm]\nname = 'fedavg'\n", 1, "local.lr = -1"),
        ("[algorithm]\nname = 'fedavg'\n[algorithm.server]\n lr = 0\n", 4, "algorithm.server.lr = 0"),
        ("[algorithm]\nname = 'fedavg'\nserver = {lr = 0}\n", 3, "algorithm.server.lr = 0"),
        ("[algorithm]\nname = 'fedavg'\nserver.lr = 0\n[local]\nlr = 1", 3, "algorithm.server.lr = 0"),
        ("[algorithm]\nname = 'fedavg'\nserver.lrr = 0\n", 3, "'algorithm.server.lr'"),
        ("[local]\nlr = 1\n[algorithm]\nname = 'fedavg'\nlr = 1\n", 5, "algorithm.lr is no setting"),
    ],
)
def test_file_and_line_are_named(tmp_path, text, line, said):
    tomllib.loads(text)
    path = written(tmp_path, text)
    message = refused(path)
    assert message.startswith(f"{path}, line {line}: ")
    assert said in message
    assert len(message.splitlines()) <= 6


def test_file_that_is_missing_or_no_toml_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "none.toml")
    assert "line 1" in refused(written(tmp_path, "engine rounds\n"))
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert "is no TOML" in refused(tmp_path / "mine.toml")


def test_settings_are_checked_however_often_they_are_changed():
    from dataclasses import replace

    config = from_name("fedsparsify")
    with pytest.raises(UsageError, match=r"FedSparsify.density = 2"):
        replace(config.algorithm, density=2)
    assert find("fedsparsify")(density=0.2) == replace(config.algorithm, density=0.2)
