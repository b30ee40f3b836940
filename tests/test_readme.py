"""The README is run: its Python as it stands, its commands with the rounds cut to the fewest."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedsieve import cli, commands
from fedsieve.config import from_file

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.skipif(not TEXT.strip(), reason="README.md is empty")


def blocks(*languages):
    """Content of the fenced blocks in one of these languages."""
    return [
        body for language, body in re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) if language in languages
    ]


def shell_lines():
    """Commands of the shell blocks: after `$ ` in console blocks, every line in others; continued lines joined."""
    for body in blocks("console"):
        yield from re.findall(r"^\$ (.*)$", body.replace("\\\n", " "), flags=re.MULTILINE)
    for body in blocks("sh", "bash", "shell"):
        yield from (line for line in body.replace("\\\n", " ").splitlines() if line.strip())


def words_of(line):
    """Words of each command of a line, without variables set before it and what a shell would do with the output."""
    for part in re.split(r"&&|\|\||[;|]", line):
        words = shlex.split(part, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield [Path(words[0]).name, *words[1:]]


COMMANDS = [words for line in shell_lines() for words in words_of(line)]


def test_the_readme_shows_python_and_commands():
    assert blocks("python"), "README.md has text but no fenced ```python block"
    assert any(words[0] == "fedsieve" for words in COMMANDS), "README.md shows no `fedsieve` command in a console or sh block"


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs_as_it_stands(number, tmp_path):
    (tmp_path / "block.py").write_text(blocks("python")[number])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Work in an empty folder with the examples; train a round or two where the data is embedded, and none elsewhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    train, configs = commands._train, []

    def few_rounds(config, out, *, resume=False):
        configs.append(config)
        if config.data.name == "digits":
            fewest = getattr(config.algorithm, "first", 0) + 1
            train(replace(config, engine=replace(config.engine, rounds=fewest)), out, resume=resume)

    monkeypatch.setattr(commands, "_train", few_rounds)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield configs
    for number, handler in before:
        signal.signal(number, handler)


def test_commands_are_valid_and_run_where_the_data_is_embedded(started, capsys):
    """A command on the folder of a run that was not trained, or is a placeholder in capitals, is only parsed."""
    for name, *words in COMMANDS:
        if name != "fedsieve":
            continue
        command, *rest = words or ["--help"]
        folders = [Path(word) for word in rest if not word.startswith("-")]
        if command in ("resume", "report", "compare", "export") and not all(folder.is_dir() for folder in folders):
            commands._parsed(getattr(commands, command.title()), rest, f"fedsieve {command}")
            continue
        trained = len(started)
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code or 0
        assert code == 0, (words, capsys.readouterr().err)
        if command == "run" and "--help" not in rest and "-h" not in rest:
            assert len(started) == trained + 1, words


def test_a_misspelt_option_would_be_noticed(started, capsys):
    """The test above can fail: options that do not exist are refused on its way too."""
    assert cli.main(["run", "fedsparsify", "--algorithm.densty", "0.1"]) == 2
    assert not started


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    inline = re.findall(r"`make ([\w-]+)`", TEXT)
    named = {word for words in COMMANDS if words[0] == "make" for word in words[1:] if re.fullmatch(r"[\w-]+", word)}
    assert {*inline, *named} <= targets


def test_commands_named_in_the_text_exist():
    named = set(re.findall(r"`fedsieve (\w+)", TEXT))
    assert named <= set(cli.COMMANDS)


def test_toml_blocks_are_valid_configs(tmp_path):
    for number, body in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(body)
        assert from_file(path).name
