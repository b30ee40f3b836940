"""Accuracy against megabytes: which settings are on the front, what they are called, where their names stand."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from fedsieve import cli
from fedsieve.errors import DataError, UsageError
from fedsieve.report.page import _settings_of, said_of_front, write_comparison
from fedsieve.report.records import find, read, rounds, short_names
from fedsieve.report.table import csv
from fedsieve.report.tradeoff import Mark, Setting, Text, arrange, front
from test_report import checked, rewrite, sample


def setting(megabytes, accuracy):
    return Setting("a", "#000000", 0.1, megabytes, accuracy, accuracy, accuracy)


def test_the_front_by_hand():
    points = [(5, 70), (1, 40), (5, 71), (2, 39), (9, 71), (9, 90), (1, 40), (3, 60)]
    assert front([setting(*point) for point in points]) == [1, 6, 7, 2, 5]
    assert front([setting(1, 1)]) == [0]


@pytest.fixture
def study(tmp_path):
    """Two methods, two densities, two seeds, kept as studies keep them: records as a table."""
    for method, rates in (("snip", (0.1, 0.3)), ("feddst", (0.1, 0.1))):
        for density, rate in zip((0.1, 0.01), rates, strict=True):
            for seed in (0, 1):
                at = tmp_path / "kept" / f"{method}-{density}" / f"seed{seed}"
                sample(at, method=method, density=density, seed=seed, rounds=6, settings={"local.lr": rate})
                (at / "records.csv").write_text(csv(read(at)))
                (at / "records.jsonl").unlink()
    return tmp_path / "kept"


def test_runs_are_found_at_any_depth_each_once(study, tmp_path):
    found = find([study, study / "snip-0.1", study / "snip-0.1" / "seed0"])
    assert [str(each.relative_to(study)) for each in found] == [
        f"{name}/seed{seed}" for name in ("feddst-0.01", "feddst-0.1", "snip-0.01", "snip-0.1") for seed in (0, 1)
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        UsageError, match=r"is not a run folder: it has no config.toml and no records.jsonl .*no folder in it is one"
    ):
        find([study, empty])
    with pytest.raises(UsageError, match="there is no such folder"):
        find([tmp_path / "absent"])


def test_a_table_of_records_is_read_as_the_records_it_was_made_of(tmp_path):
    run = read(sample(tmp_path / "run", rounds=20, every=3, lost=True))
    assert any(row["lost"] for row in run.rows)
    (tmp_path / "records.csv").write_text(csv(run))
    assert rounds(tmp_path / "records.csv") == run.rows
    (tmp_path / "records.csv").write_text(csv(run).replace("\n2,", "\ntwo,"))
    with pytest.raises(DataError, match="line 3 is not a record"):
        rounds(tmp_path / "records.csv")


@pytest.mark.parametrize("line", ["two,0.5", "2,high", ",0.5", "2", "2,0.5,7"])
def test_a_broken_line_of_a_table_is_named(tmp_path, line):
    (tmp_path / "records.csv").write_text(f"round,lost\n1,\n{line}\n".replace("lost", "accuracy" if line != "2" else "lost"))
    with pytest.raises(DataError, match="line 3 is not a record"):
        rounds(tmp_path / "records.csv")


def test_a_study_is_one_mark_a_setting_and_one_name_a_method(study, capsys):
    groups = _settings_of([read(each) for each in find([study])])
    assert sorted((group.family, group.density, len(group.runs)) for group in groups) == [
        ("feddst", 0.01, 2), ("feddst", 0.1, 2), ("snip", 0.01, 2), ("snip", 0.1, 2),
    ]  # fmt: skip
    assert len({group.colour for group in groups}) == 2
    page, text = checked(write_comparison([study], study / "page.html"))
    assert "8 federated runs of 4 settings" in page.words
    for name, came in said_of_front([read(each) for each in find([study])]):
        assert f"{name}: {came}" in page.words
    assert write_comparison([study], study / "again.html").read_text() == text
    assert cli.main(["compare", str(study), "--out", str(study / "third.html")]) == 0
    assert (study / "third.html").read_text() == text
    assert "feddst" in capsys.readouterr().out


def test_with_many_runs_the_terminal_has_the_front_in_words(study, capsys):
    for seed in range(2, 9):
        shutil.copytree(study / "snip-0.1" / "seed0", study / "snip-0.1" / f"seed{seed}")
        config = study / "snip-0.1" / f"seed{seed}" / "config.toml"
        config.write_text(config.read_text().replace("seed = 0", f"seed = {seed}"))
    assert cli.main(["compare", str(study), "--out", str(study / "page.html")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("15 runs of 4 settings. On the Pareto front of accuracy against megabytes:\n  ")
    assert " % for " in said


@pytest.mark.parametrize("count", [12, 13])
def test_of_more_than_twelve_settings_only_the_front_has_curves_and_all_are_listed(tmp_path, count):
    for i in range(count):  # the first costs least, the last is best, all others cost as much as it
        folder = sample(tmp_path / "kept" / f"m{i:02}", method=f"m{i:02}", density=None, rounds=2)
        rewrite(folder, lambda row, i=i: row.update(accuracy=(30 + i) / 100, bytes_up=10**6 * (1 if i == 0 else 30)))
        (folder / "summary.json").unlink()
    page, text = checked(write_comparison([tmp_path / "kept"], tmp_path / "page.html"))
    lettered = {letter for letter in "ABCDEFGHIJKLM" if f"<b>{letter}</b>" in text}
    assert lettered == (set("AB") if count > 12 else set("ABCDEFGHIJKL"))
    curves = page.drawings[1:]
    assert len(curves) == 5
    assert all(("Only 2 of the 13 settings: those on the Pareto front." in said) is (count > 12) for said in curves)
    table = page.words.partition("Results")[2]
    places = [table.index(f"m{i:02}") for i in reversed(range(count))]
    assert places == sorted(places), "the most accurate first"


def test_the_front_of_runs_is_by_their_means(tmp_path):
    folders = []
    for method, factor, accuracy in (("cheap", 1, 0.5), ("dear", 10, 0.9), ("worse", 10, 0.4)):
        folder = sample(tmp_path / method, method=method, density=None, rounds=2)
        rewrite(folder, lambda row, f=factor, a=accuracy: row.update(bytes_up=f * 10**6, bytes_down=f * 10**6, accuracy=a))
        (folder / "summary.json").unlink()
        folders.append(folder)
    assert said_of_front([read(folder) for folder in folders]) == [
        ("cheap", "50.0 % for 4.00 MB"),
        ("dear", "90.0 % for 40.0 MB"),
    ]


def test_short_names_say_in_what_a_run_is_not_like_most(tmp_path):
    def run(name, **own):
        usual = {"merge": "vote", "scope": "global", "gradient": "none", "bits": 8} | own
        folder = sample(tmp_path / name, method="hidenseek", density=0.1, rounds=1)
        text = (folder / "config.toml").read_text()
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in usual.items())
        (folder / "config.toml").write_text(text.replace("density = 0.1\n", f"density = 0.1\n{lines}"))
        return read(folder)

    runs = [run("a"), run("b", merge="logit"), run("c", scope="layer"), run("d", gradient="layer"), run("e", bits=4)]
    assert short_names(runs) == [
        "hidenseek", "hidenseek, logit", "hidenseek, scope layer", "hidenseek, gradient layer", "hidenseek, bits 4",
    ]  # fmt: skip
    assert short_names(runs[:2]) == ["hidenseek, vote", "hidenseek, logit"]


def test_names_cover_no_mark_and_no_name_where_there_is_room():
    frame = (0.0, 0.0, 900.0, 600.0)
    marks = [[Mark((100.0 + 200 * (i % 4), 100.0 + 150 * (i // 4)), 5.0)] for i in range(12)]
    texts = [Text(f"method {i}", 7.0) for i in range(12)]
    boxes = [spot.box for spot in arrange(texts, marks, [], frame)]
    for i, (left, bottom, right, top) in enumerate(boxes):
        assert frame[0] <= left < right <= frame[2]
        assert frame[1] <= bottom < top <= frame[3]
        for (mark,) in marks:
            near = min(max(mark.at[0], left), right), min(max(mark.at[1], bottom), top)
            assert math.dist(near, mark.at) >= mark.radius
        assert not any(left < b[2] and b[0] < right and bottom < b[3] and b[1] < top for j, b in enumerate(boxes) if j != i)


def test_a_name_that_is_too_long_for_the_figure_is_written_all_the_same():
    (spot,) = arrange([Text("x" * 500, 7.0)], [[Mark((10.0, 10.0), 5.0)]], [], (0.0, 0.0, 900.0, 600.0))
    assert spot.box[2] - spot.box[0] == pytest.approx(3500)
