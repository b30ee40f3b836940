"""The report: it reads what runs leave behind, says it truly, and draws it on one page that needs nothing else."""

from __future__ import annotations

import html.parser
import json
import math
import re
import statistics
import sys
from csv import DictReader
from io import StringIO
from pathlib import Path
from subprocess import run as execute

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedsieve.errors import DataError, UsageError
from fedsieve.report.page import write_comparison, write_report
from fedsieve.report.records import differences, groups, names, outcome, read
from fedsieve.report.table import csv, digits, rows, summary_markdown, summary_table
from fedsieve.streams import Streams

LAYERS = {"conv1.weight": 0.9, "conv2.weight": 0.6, "fc1.weight": 0.2, "fc2.weight": 0.7}


def sample(
    folder: Path,
    *,
    method: str = "fedsparsify",
    density: float | None = 0.05,
    seed: int = 0,
    rounds: int = 40,
    clients: int = 20,
    every: int = 1,
    ended: bool = True,
    lost: bool = False,
    settings: dict[str, object] | None = None,
) -> Path:
    """Write a run folder as a run would: density falls, accuracy rises with noise, masks travel beside weights."""
    folder.mkdir(parents=True)
    noise = Streams(seed).at(client=0)(method + str(density)).numpy()
    tables = {
        "data": {"name": "mnist", "clients": clients, "partition": "dirichlet", "alpha": 0.3},
        "model": {"name": "lenet5", "hidden": []},
        "algorithm": {"name": method, **({} if density is None else {"density": density})},
        "local": {"epochs": 1, "lr": 0.1, "nesterov": False},
        "engine": {"rounds": max(rounds, 1), "cohort": 0, "seed": seed},
    }
    for key, value in (settings or {}).items():
        table, name = key.split(".")
        tables[table][name] = value
    text = "".join(f"[{t}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in kv.items()) + "\n" for t, kv in tables.items())
    (folder / "config.toml").write_text(text)
    records, weights = [], 61_706
    for number in range(1, rounds + 1):
        now = 1.0 if density is None else density + (1 - density) * (1 - number / rounds) ** 3
        accuracy = 0.95 - 0.8 * math.exp(-number / 7) + 0.008 * noise.standard_normal()
        spread = 0.12 * math.exp(-number / 30)
        normal = {"p5": -1.64, "p10": -1.28, "p25": -0.67, "p50": 0, "p75": 0.67, "p90": 1.28, "p95": 1.64, "worst10": -1.75}
        own = {"mean": accuracy - 0.02, "std": spread, **{key: min(1.0, accuracy + spread * z) for key, z in normal.items()}}
        evaluated = every > 0 and (number % every == 0 or number == rounds)
        up, down = int(4 * weights * now) * clients, int(4 * weights * min(1.0, 1.1 * now)) * clients
        mask = 0 if density is None else weights // 10 * clients
        record = {"round": number, "accuracy": accuracy, "loss": 1 - accuracy, "train_loss": 2 * math.exp(-number / 9)}
        record |= {"client_accuracy": own, "clients": clients, "lost": {"3": "checksum"} if lost and number % 9 == 4 else {}}
        record |= {} if evaluated else {"accuracy": None, "loss": None, "client_accuracy": None}
        record |= {"density": now, "densities": {name: min(1.0, now * (0.6 + share)) for name, share in LAYERS.items()}}
        record |= {"bytes_up": up + mask, "bytes_down": down + mask, "bytes_down_once": (down + mask) // clients}
        phases = {"train": {"up": up, "down": down}, "masks": {"up": mask, "down": mask}}
        record["phases"] = phases | {"eval": {"up": 90 * clients, "down": down // 4}}
        record |= {"examples": 60_000, "flops": int(3e9 * now), "seconds": 1.5 + 0.2 * noise.random()}
        records.append(record | {"codec_seconds": 0.03, "peak_memory_mb": 410.2})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    skew = noise.dirichlet([0.3] * 10, size=clients)
    histogram = (skew * noise.integers(100, 900, size=(clients, 1))).astype(int).tolist()
    (folder / "partition.json").write_text(
        json.dumps({"clients": clients, "histogram": histogram, "classes": 10, "hash": "ab12"})
    )
    if ended and records:
        scores = [record["accuracy"] for record in records if record["accuracy"] is not None]
        summary = {"algorithm": method, "dataset": "mnist", "model": "lenet5", "seed": seed, "rounds": rounds, "status": "done"}
        summary |= {"accuracy": scores[-1] if scores else None, "best_accuracy": max(scores, default=None)}
        summary |= {key: sum(record[key] for record in records) for key in ("bytes_up", "bytes_down", "seconds")}
        summary |= {"density": records[-1]["density"], "parameters": weights, "config_hash": "c0ffee", "clients": clients}
        summary |= {"versions": {"torch": "2.13.0"}, "hardware": {"cores": 2}, "started": "2025-01-02T03:04:05"}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rewrite(folder: Path, change: object) -> None:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for record in records:
        change(record)  # type: ignore[operator]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- reading


def test_a_run_folder_is_read_as_it_was_written(tmp_path):
    run = read(sample(tmp_path / "a", rounds=3))
    assert [row["round"] for row in run.rows] == [1, 2, 3]
    assert run.config["algorithm"] == {"name": "fedsparsify", "density": 0.05}
    assert run.summary["status"] == "done"
    assert run.partition["clients"] == 20
    assert run.label == "fedsparsify, density 0.05, seed 0"


def test_what_is_no_run_folder_is_refused_and_says_what_one_is(tmp_path):
    for folder, said in ((tmp_path, "no config.toml and no records.jsonl"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UsageError, match=said) as caught:
            read(folder)
        assert "fedsieve run" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 8


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(min_value=0, max_value=10_000))
def test_records_cut_at_any_byte_give_the_whole_rounds_before_the_cut(cut, tmp_path_factory):
    folder = sample(tmp_path_factory.mktemp("cut") / "a", rounds=4)
    written = (folder / "records.jsonl").read_bytes()
    kept = written[: cut % (len(written) + 1)]
    (folder / "records.jsonl").write_bytes(kept)
    expected = [json.loads(line) for line in written.splitlines()][: len([e for e in ends(written) if e <= len(kept)])]
    assert read(folder).rows == expected


def ends(text: bytes) -> list[int]:
    """Positions behind each record, its newline not needed."""
    return [i for i, byte in enumerate(text) if byte == ord("\n")]


@pytest.mark.parametrize("broken", ['{"round": 2, "acc', "[1, 2]", '{"accuracy": 0.5}', ""])
def test_a_broken_line_before_the_last_is_named_with_file_and_number(tmp_path, broken):
    path = sample(tmp_path / "a", rounds=3) / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"records\.jsonl, line 2 "):
        read(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "partition.json"])
def test_another_damaged_file_is_named(tmp_path, name):
    folder = sample(tmp_path / "a", rounds=2)
    (folder / name).write_text('{"half')
    with pytest.raises(DataError, match=re.escape(name)):
        read(folder)


def test_without_a_summary_the_records_are_added_up_to_the_same(tmp_path):
    ended = sample(tmp_path / "ended", rounds=7, every=3)
    killed = sample(tmp_path / "killed", rounds=7, every=3, ended=False)
    whole, part = outcome(read(ended)), outcome(read(killed))
    assert part.status == "unfinished"
    assert whole.status == "done"
    for key in ("rounds", "accuracy", "best", "p10", "density", "bytes_up", "bytes_down"):
        assert getattr(part, key) == getattr(whole, key), key
    assert part.seconds == pytest.approx(whole.seconds)


LEAF = st.one_of(st.integers(0, 3), st.booleans(), st.text(max_size=2))
CONFIG = st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), LEAF, max_size=3), max_size=3)


@settings(deadline=None, max_examples=30)
@given(configs=st.lists(CONFIG, min_size=1, max_size=4))
def test_differences_are_the_keys_whose_values_are_not_all_equal(configs):
    from fedsieve.report.records import Run

    runs = [Run(Path("x"), config, [], {}, None) for config in configs]
    expected = {}
    for table in "abc":
        for key in "xyz":
            values = [config.get(table, {}).get(key) for config in configs]
            if any(value != other for value in values for other in values):
                expected[f"{table}.{key}"] = values
    assert differences(runs) == expected


def test_names_say_what_differs_and_are_never_the_same(tmp_path):
    folders = [
        sample(tmp_path / "a", rounds=1),
        sample(tmp_path / "b", rounds=1, density=0.5, settings={"data.alpha": 1.0}),
        sample(tmp_path / "c", rounds=1, method="fedprox", density=None, settings={"algorithm.mu": 0.1}),
        sample(tmp_path / "d", rounds=1, method="fedprox", density=None, settings={"algorithm.mu": 0.1}),
    ]
    assert names([read(folder) for folder in folders]) == [
        "fedsparsify, density 0.05, alpha 0.3, seed 0",
        "fedsparsify, density 0.5, alpha 1.0, seed 0",
        "fedprox, alpha 0.3, seed 0 (c)",
        "fedprox, alpha 0.3, seed 0 (d)",
    ]


# ---- tables


def test_runs_that_differ_in_seed_only_get_mean_and_sample_deviation(tmp_path):
    runs = [read(sample(tmp_path / f"s{seed}", seed=seed, rounds=5)) for seed in (0, 1, 2)]
    runs.append(read(sample(tmp_path / "other", method="fedavg", density=None, rounds=5)))
    assert [len(group) for group in groups(runs)] == [3, 1]
    found = rows(runs)
    assert [row["method"] for row in found][3:] == ["fedsparsify, density 0.05: mean ± sd (3 seeds)", "fedavg, seed 0"]
    scores = [100 * run.summary["accuracy"] for run in runs[:3]]
    assert found[3]["accuracy %"] == f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
    assert found[3]["MB up"] == digits(runs[0].summary["bytes_up"] / 1e6)
    assert len(rows(runs, each=False)) == 2


def test_the_table_holds_what_the_summary_says(tmp_path):
    run = read(sample(tmp_path / "a", rounds=6))
    row = rows([run])[0]
    assert row["accuracy %"] == f"{100 * run.summary['accuracy']:.1f}"
    assert row["client p10 %"] == f"{100 * run.rows[-1]['client_accuracy']['p10']:.1f}"
    assert row["MB down"] == digits(sum(r["bytes_down"] for r in run.rows) / 1e6)
    assert row["density"] == "0.05"
    assert row["folder"] == str(run.folder)


@pytest.mark.parametrize("count", [1, 12])
def test_tables_fit_80_columns_and_lose_no_number(tmp_path, count):
    runs = [read(sample(tmp_path / str(i), method=f"method-{i}", rounds=3, seed=i // 2)) for i in range(count)]
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(summary_table(runs))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for run in runs:
        assert f"{100 * run.summary['accuracy']:.1f}" in text
    assert "…" not in text


def test_text_of_a_run_cannot_steer_the_terminal_or_break_a_table(tmp_path):
    runs = [read(sample(tmp_path / "a", method="[red]a|b\x1b[31m\nc</td><script>", rounds=2))]
    console = Console(width=80, file=StringIO(), color_system=None)
    console.print(summary_table(runs))
    assert "\x1b" not in console.file.getvalue()
    assert "[red]a|b" in console.file.getvalue()
    text = summary_markdown(runs)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1
    assert "<script" not in text.replace("\\<", "")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0, "amount", "0"),
        (0.0197, "amount", "0.0197"),
        (1.4849, "amount", "1.48"),
        (64.66, "amount", "64.7"),
        (1234.5, "amount", "1,234"),
        (2e-5, "amount", "2.0e-05"),
        (0.05, "share", "0.05"),
        (1.0, "share", "1"),
        (93.96, "percent", "94.0"),
        (1000, "count", "1,000"),
    ],
)
def test_numbers_are_written_with_the_digits_they_deserve(value, kind, text):
    assert digits(value, kind) == text


def test_csv_has_a_row_a_round_and_every_number_of_the_records(tmp_path):
    run = read(sample(tmp_path / "a", rounds=10, every=4, lost=True))
    found = list(DictReader(StringIO(csv(run))))
    assert len(found) == 10
    assert "client_accuracy" not in found[0]
    for row, record in zip(found, run.rows, strict=True):
        assert row["accuracy"] == ("" if record["accuracy"] is None else str(record["accuracy"]))
        assert int(row["phases.masks.down"]) == record["phases"]["masks"]["down"]
        assert float(row["densities.fc1.weight"]) == record["densities"]["fc1.weight"]
        assert row["client_accuracy.p90"] == ("" if record["accuracy"] is None else str(record["client_accuracy"]["p90"]))
    assert found[3]["lost"] == "3: checksum"
    assert found[0]["lost"] == ""
    assert csv(read(sample(tmp_path / "none", rounds=0))) == ""


# ---- pages


class Page(html.parser.HTMLParser):
    """What a browser would see: balanced tags, ids, references, text."""

    void = frozenset({"meta", "link", "br", "path", "use", "rect", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.drawings: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.handle_endtag(tag)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            elif key in ("href", "src"):
                self.links.append(value)
            else:
                self.links += [f"#{name}" for name in re.findall(r"url\(#(.*?)\)", value or "")]
        if ("class", "plot") in attrs:
            self.drawings.append(dict(attrs)["aria-label"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += data


def checked(path: Path) -> tuple[Page, str]:
    """Read a page and hold what every page must: one file, no network, no script, sound references, no number that is none."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids, link
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    for drawing in re.findall(r'<svg class="plot".*?</svg>', text, flags=re.DOTALL):
        assert not re.search(r": #[0-9a-f]{3}", drawing), "a colour that does not follow light and dark"
    assert "@import" not in text
    assert list(path.parent.glob(".*.part")) == []
    return page, text


def test_a_report_shows_the_run_in_six_plots_and_numbers(tmp_path):
    folder = sample(tmp_path / "a", lost=True)
    run = read(folder)
    page, _ = checked(write_report(folder))
    assert [said.partition(".")[0] for said in page.drawings] == [
        "Accuracy against round",
        "Accuracy against megabytes carried",
        "Density over the rounds",
        "Density of each layer",
        "Megabytes in each round, by phase",
        "Labels of each client",
    ]
    for number in (f"{100 * run.summary['accuracy']:.1f}", digits(run.summary["bytes_up"] / 1e6), "61,706", "c0ffee", "2.13.0"):
        assert number in page.words
    assert "Lost clients (5)" in page.words
    assert "data.partition" in page.words
    assert "conv2.weight" in page.words
    told = (folder / "report.md").read_text()
    assert "| train | " in told
    assert "conv2.weight" in told
    assert "data.partition | dirichlet" in told
    assert not re.search(r"^[^|\n].*\n\|", told, flags=re.MULTILINE), "a table must stand behind an empty line"


def test_equal_folders_give_equal_pages_whatever_the_matplotlibrc(tmp_path):
    import matplotlib

    first = write_report(sample(tmp_path / "one" / "a", rounds=5)).read_bytes()
    before = {key: matplotlib.rcParams[key] for key in ("font.size", "svg.fonttype", "axes.grid", "text.parse_math")}
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        second = write_report(sample(tmp_path / "two" / "a", rounds=5)).read_bytes()
    assert first == second
    assert {key: matplotlib.rcParams[key] for key in before} == before


@pytest.mark.parametrize(
    "case",
    [
        {"rounds": 0},
        {"rounds": 1},
        {"rounds": 10, "every": 0},
        {"rounds": 9, "every": 4, "ended": False},
        {"clients": 1, "rounds": 3},
        {"clients": 1000, "rounds": 350},
    ],
    ids=str,
)
def test_odd_runs_have_a_page_too_and_it_stays_small(tmp_path, case):
    path = write_report(sample(tmp_path / "a", **case))
    page, text = checked(path)
    assert len(text) < 300_000
    if case.get("rounds") == 0:
        assert "No round has been completed." in page.words
    if case.get("every") == 0:
        assert "No round has been evaluated." in page.words
    if case.get("ended") is False:
        assert "unfinished" in page.words
    if case.get("clients") == 1000:
        assert "200 of the 1,000 clients" in page.words


def test_a_run_that_diverged_is_drawn_up_to_where_it_did(tmp_path):
    folder = sample(tmp_path / "a", rounds=6)

    def diverge(record):
        if record["round"] > 4:
            record["accuracy"] = record["loss"] = record["train_loss"] = math.nan
            record["client_accuracy"] = {"mean": math.nan, "p10": math.nan, "p90": math.nan, "std": math.nan}

    rewrite(folder, diverge)
    (folder / "summary.json").write_text('{"status": "diverged", "accuracy": NaN}')
    page, text = checked(write_report(folder))
    assert 'class="status bad">diverged' in text
    assert len(page.drawings) == 6


def test_text_from_files_is_text_on_the_page(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=\"y\">&amp;$\\frac{1}"
    folder = sample(tmp_path / "a", method=evil, rounds=5, settings={"data.name": "http<b>"})
    rewrite(folder, lambda record: record.update(densities={evil: 0.5, "層\x00\ud800": 0.1}, lost={evil: evil}))
    (folder / "summary.json").write_text(json.dumps({"status": evil, "versions": {evil: evil}}))
    page, text = checked(write_report(folder))
    assert "img" not in page.tags
    assert "<b>" not in text
    assert evil in page.words
    page, _ = checked(write_comparison([folder, sample(tmp_path / "b", rounds=4)], tmp_path / "out.html"))
    assert "img" not in page.tags


def test_a_comparison_says_what_differs_and_merges_seeds(tmp_path):
    folders = [sample(tmp_path / f"s{seed}", seed=seed, rounds=12) for seed in range(3)]
    folders.append(sample(tmp_path / "avg", method="fedavg", density=None, rounds=9, ended=False))
    out = tmp_path / "new" / "page.html"
    assert write_comparison([*folders, folders[0]], out) == out
    page, text = checked(out)
    assert "These runs differ in 4 settings: algorithm.name, algorithm.density, engine.rounds, engine.seed." in page.words
    assert "4 federated runs of 2 settings" in page.words
    assert "fedsparsify, density 0.05 (3 seeds)" in page.words
    assert "Means over the seeds ± their sample standard deviation." in page.words
    assert "0, 1, 2" in page.words
    assert "1 of the 4 runs did not end as done" in page.words
    assert [said.partition(".")[0] for said in page.drawings] == [
        "Accuracy against megabytes",
        "Accuracy against round",
        "Accuracy against megabytes carried so far",
        "Accuracy against seconds",
        "Density over the rounds",
        "Megabytes carried, by phase",
    ]
    assert text.count("fill-opacity: 0.16") == 4  # a band in the three plots of accuracy and in the one of density


def test_the_line_of_seeds_is_their_mean_and_the_band_their_extremes(tmp_path):
    from fedsieve.report.page import _merged, _settings_of

    runs = [read(sample(tmp_path / "a", seed=0, rounds=8, every=2)), read(sample(tmp_path / "b", seed=1, rounds=8, every=4))]
    (group,) = _settings_of(runs)
    line = _merged(group, "megabytes")
    assert line is not None
    for position, number in enumerate((4, 8)):
        scores = [100 * run.rows[number - 1]["accuracy"] for run in runs]
        carried = [sum(row["bytes_up"] + row["bytes_down"] for row in run.rows[:number]) / 1e6 for run in runs]
        assert line.x[position] == pytest.approx(statistics.mean(carried))
        assert line.y[position] == pytest.approx(statistics.mean(scores))
        assert (line.low[position], line.high[position]) == (min(scores), max(scores))


@pytest.mark.parametrize(("factor", "log"), [(1, False), (8, False), (12, True)])
def test_megabytes_are_on_a_log_scale_where_runs_are_more_than_ten_times_apart(tmp_path, factor, log):
    folders = [sample(tmp_path / name, method=name, density=None, rounds=5) for name in ("one", "two")]
    rewrite(
        folders[1], lambda record: record.update(bytes_up=record["bytes_up"] * factor, bytes_down=record["bytes_down"] * factor)
    )
    page, _ = checked(write_comparison(folders, tmp_path / "out.html"))
    assert any("Log scale" in said for said in page.drawings if said.startswith("Accuracy against megabytes carried")) is log


def test_twelve_runs_fit_one_page_and_each_has_a_letter_of_its_own(tmp_path):
    folders = [sample(tmp_path / f"m{i}", method=f"method{i}", rounds=6 + i) for i in range(12)]
    page, text = checked(write_comparison(folders, tmp_path / "out.html"))
    assert len(text) < 500_000
    for letter in "ABCDEFGHIJKL":
        assert text.count(f"<b>{letter}</b>") == 3  # result, key, settings
    styles = re.findall(r'aria-hidden="true"><path d="M0 5H26" (.*?)/></svg><b>(.)</b>', text)
    assert len({style for style, _ in styles}) == 12
    assert "method11" in page.words


def test_runs_without_any_evaluation_are_compared_by_bytes(tmp_path):
    folders = [sample(tmp_path / "a", rounds=4, every=0), sample(tmp_path / "b", rounds=0)]
    page, _ = checked(write_comparison(folders, tmp_path / "out.html"))
    assert "No run has been evaluated." in page.words
    assert len(page.drawings) == 2


def test_long_curves_are_thinned_and_keep_both_ends():
    from fedsieve.report.plots import MOST_POINTS, _thinned

    assert _thinned(MOST_POINTS) == list(range(MOST_POINTS))
    kept = _thinned(100_000)
    assert len(kept) == len(set(kept)) == MOST_POINTS
    assert kept[0] == 0
    assert kept[-1] == 99_999


def test_a_page_that_cannot_be_written_is_an_error_that_leaves_nothing_behind(tmp_path):
    folder = sample(tmp_path / "a", rounds=2)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_comparison([folder], tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken"]
    with pytest.raises(UsageError, match="no run folder was given"):
        write_comparison([], tmp_path / "out.html")


def test_importing_the_report_loads_nothing_heavy_and_drawing_no_pyplot(tmp_path):
    folder = sample(tmp_path / "a", rounds=2)
    code = (
        "import sys, fedsieve.report.page as page; print([m for m in ('matplotlib', 'torch', 'numpy') if m in sys.modules]);"
        f"page.write_report({str(folder)!r}); print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = execute([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True False"]
