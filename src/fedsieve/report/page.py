"""Pages of runs: one HTML file each, without scripts, that opens without a network; beside a report its tables in Markdown.

Plots are drawn by matplotlib as SVG and stand in the page itself. Their text stays text (in the reader's own font, to be
searched and read aloud), and their colours become CSS variables, so that one drawing serves light, dark and print. Lines
are told apart by letters at their ends, not by colour alone. Equal run folders give equal pages, byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fedsieve.errors import UsageError
from fedsieve.report.html import figure, page, pairs, section, table, text, tiles, write
from fedsieve.report.plots import HUES, INK, MUTED, RULE, VARIABLES, WIDTH, Line, canvas, coloured, plot, whole_numbers
from fedsieve.report.records import (
    DENSITY,
    RATES,
    SEED,
    Outcome,
    Run,
    curve,
    differences,
    find,
    flat,
    groups,
    number,
    outcome,
    read,
    short_names,
    show,
)
from fedsieve.report.table import digits, markdown, printable, rows, size, summary_markdown
from fedsieve.report.tradeoff import DENSE, Setting, draw, front, sizes, swatch

MOST_BARS = 60
MOST_CLIENTS = 200
MOST_LOST = 50
MOST_LINES = 12

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_PHASES = {"train": HUES[0], "masks": HUES[1], "setup": HUES[2], "control": HUES[3], "eval": HUES[5]}


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, and report.md with the same tables; return the path of the page.

    Raises:
        UsageError: `folder` is no run folder, or cannot be written to.
        DataError: one of its files is damaged.
    """
    run = read(folder)
    path = run.folder / "report.html"
    write(path, _report(run))
    write(path.with_suffix(".md"), _report_markdown(run))
    return path


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that compares runs, those in the folders at any depth, to the file `out`; return its path.

    Runs that differ only in their seed are one setting: a mark in the figure of accuracy against megabytes, and in the curves
    the line of their mean with a band from the least to the greatest. Of more than MOST_LINES settings only those on the
    Pareto front have curves.

    Raises:
        UsageError: no folder is given, one holds no run, or `out` cannot be written.
        DataError: a file of a run is damaged.
    """
    if not folders:
        raise UsageError("no run folder was given to compare; name one or more, for example: fedsieve compare runs/a runs/b")
    write(Path(out), _comparison([read(folder) for folder in find(folders)]))
    return Path(out)


# ------------------------------------------------------------------------------------------------ pages


def _report(run: Run) -> str:
    came, data, model = outcome(run), _setting(run, "data.name", "dataset"), _setting(run, "model.name", "model")
    lost = [(row["round"], client, reason) for row in run.rows for client, reason in (row.get("lost") or {}).items()]
    parts = [
        f'<header><p class="kicker">Federated run · <span class="status {_tone(came)}">{text(came.status)}</span></p>'
        f"<h1>{text(run.label)}</h1><p>{text(_sentence(run, data, model))}</p></header>",
        _tiles(run, came),
        section("Accuracy", _accuracy_figures(run)),
        section("Density", [_density_figure(run), _layers_figure(run)]),
        section("Communication", [_phases_figure(run), _phases_table(run)]),
        section("Data and result", [_labels_figure(run) if run.partition else "", _result_table(run)]),
        section(f"Lost clients ({len(lost)})", [_lost_html(lost)] if lost else [], columns=False),
        section("How it was run", [_settings_html(run)], columns=False),
    ]
    return page(f"{run.label} on {data}", parts)


def _comparison(runs: Sequence[Run]) -> str:
    found = _settings_of(runs)
    lines = _drawn(found)
    only = f" Only {len(lines)} of the {len(found)} settings: those on the Pareto front." if len(lines) < len(found) else ""
    of = f" of {len(found)} settings" if len(runs) > len(found) > 1 else ""
    differing = differences(runs)
    shared = [f"{word} {show(flat(runs[0].config)[key])}" for word, key in (("data", "data.name"), ("model", "model.name"))
              if key not in differing and key in flat(runs[0].config)]  # fmt: skip
    parts = [
        f'<header><p class="kicker">{text(" · ".join(["Comparison", *shared]))}</p>'
        f"<h1>{len(runs)} federated run{'s' * (len(runs) != 1)}{of}</h1><p>{_differing(runs, differing)}</p></header>",
        _tradeoff_html(found),
        section("Results", [_results_html(found)], columns=False),
        _key(lines),
        section("Curves", [*_accuracy_comparison(lines, only), _density_comparison(lines, only)]),
        section("Communication", [_phases_comparison(lines, only)]),
        section("Settings that differ", [_differences_html(lines, only)] if differing else [], columns=False),
    ]
    return page(f"Comparison of {len(runs)} runs", parts)


def _differing(runs: Sequence[Run], differing: dict[str, list[Any]]) -> str:
    """Return in words what differs; settings that only some methods have are counted, where there are many."""
    if not differing:
        return "The settings of these runs are the same."
    common = set.intersection(*(set(flat(run.config)) for run in runs))
    named = [key for key in differing if len(differing) <= MOST_LINES or key in common]
    keys = ", ".join(f"<code>{text(key)}</code>" for key in named)
    rest = len(differing) - len(named)
    more = f"{', and ' * bool(named)}{rest} that not all of them have" if rest else ""
    return f"These runs differ in {len(differing)} setting{'s' * (len(differing) > 1)}: {keys}{more}."


# ------------------------------------------------------------------------------------------------ one run


def _setting(run: Run, key: str, total: str) -> str:
    return str(flat(run.config).get(key) or run.summary.get(total) or "unknown")


def _measured(run: Run) -> str:
    """Return which examples the run is evaluated on: those of the test, or those that were held out."""
    return "Validation" if number(flat(run.config).get("data.validation")) else "Test"


def _tone(came: Outcome) -> str:
    return {"done": "good", "diverged": "bad"}.get(came.status, "fair")


def _sentence(run: Run, data: str, model: str) -> str:
    config = flat(run.config)
    clients = (run.partition or {}).get("clients") or config.get("data.clients")
    split = show(config.get("data.partition"))
    skew = f" with alpha {show(config.get('data.alpha'))}" if split in ("dirichlet", "quantity") else ""
    said = f"Model {model} on {data}"
    if clients:
        cohort = config.get("engine.cohort") or "all"
        said += f", {clients} client{'s' * (clients != 1)} ({split} partition{skew}, {cohort} in each round)"
    return f"{said}. Folder {run.folder.resolve().name}."


def _tiles(run: Run, came: Outcome) -> str:
    tops = [row["round"] for row in run.rows if number(row.get("accuracy")) is not None and row["accuracy"] == came.best]
    once = sum(row.get("bytes_down_once", 0) for row in run.rows)
    codec = sum(number(row.get("codec_seconds")) or 0.0 for row in run.rows)
    planned = flat(run.config).get("engine.rounds")
    parameters = run.summary.get("parameters")
    best = "not evaluated" if came.best is None else f"best {100 * came.best:.1f} %" + (f", round {tops[0]}" if tops else "")
    accuracy = "–" if came.accuracy is None else f"{100 * came.accuracy:.1f}"
    density = "–" if came.density is None else digits(came.density, "share")
    up, down = came.bytes_up / 1e6, came.bytes_down / 1e6
    return tiles(
        [
            (f"{_measured(run)} accuracy", accuracy, "%" if came.accuracy is not None else "", best),
            ("Density", density, "", f"model of {parameters:,} parameters" if parameters else ""),
            ("Uplink", digits(up), "MB", f"{digits(up / max(came.rounds, 1))} MB a round"),
            ("Downlink", digits(down), "MB", f"{digits(once / 1e6)} MB as one broadcast to all" if once else ""),
            (
                "Rounds",
                f"{came.rounds:,}",
                "",
                f"of {planned:,} planned" if planned and planned != came.rounds else "as planned",
            ),
            ("Time", digits(came.seconds), "s", f"{digits(codec)} s of it packing and unpacking" if codec else ""),
        ]
    )


def _accuracy_figures(run: Run) -> list[str]:
    titles = ("Accuracy against round", "Accuracy against megabytes carried")
    found = curve(run.rows)
    if not found.accuracy:
        why = "No round has been evaluated." if run.rows else "No round has been completed."
        return [figure(title, why, "") for title in titles]
    lines = [Line("test", found.rounds, found.accuracy, HUES[0])]
    caption = f"{_measured(run)} accuracy of the server's model after each evaluated round."
    clients = [(row["round"], row["client_accuracy"]) for row in run.rows if row.get("client_accuracy")]
    clients = [(x, own) for x, own in clients if all(number(own.get(key)) is not None for key in ("p10", "mean", "p90"))]
    if clients:
        low, middle, high = ([100 * own[key] for _, own in clients] for key in ("p10", "mean", "p90"))
        lines.append(Line("clients", [x for x, _ in clients], middle, HUES[1], _DASHES[1], low, high))
        caption += " Dashed: mean over the clients' own examples; band: 10th to 90th percentile of the clients."
    first = figure(titles[0], caption, plot(lines, "round", "accuracy (%)", percent=True, whole=True))
    caption = "The same accuracy against all bytes carried so far, uplink and downlink, without evaluation."
    second = plot([Line("test", found.megabytes, found.accuracy, HUES[0])], "MB up + down", "accuracy (%)", percent=True)
    return [first, figure(titles[1], caption, second)]


def _density_figure(run: Run) -> str:
    points = [(row["round"], value) for row in run.rows if (value := number(row.get("density"))) is not None]
    if not points:
        return figure("Density over the rounds", "No density was recorded.", "")
    log = _far_apart([y for _, y in points])
    line = Line("", [x for x, _ in points], [y for _, y in points], HUES[0])
    axis = "density (log scale)" if log else "density"
    caption = f"Share of the prunable weights that are kept: {digits(points[-1][1], 'share')} after round {points[-1][0]}."
    return figure("Density over the rounds", caption, plot([line], "round", axis, whole=True, logy=log))


def _layers_figure(run: Run) -> str:
    found = [(row["round"], row["densities"]) for row in run.rows if row.get("densities")]
    if not found:
        return ""
    last, densities = found[-1]
    shown = list(densities.items())[:MOST_BARS]
    caption = f"Share of each layer's weights that is kept after round {last}, from input to output."
    if len(shown) < len(densities):
        caption += f" The first {len(shown)} of {len(densities)} layers."
    with canvas(28 + (22 if len(shown) <= 25 else 15) * len(shown)) as drawing:
        labels = [_shorten(name, 30) for name, _ in shown]
        axes = drawing.axes(left=14 + 6.4 * max(map(len, labels)), right=52, bottom=24, top=4)
        axes.barh(range(len(shown)), [density for _, density in shown], height=0.66, color=HUES[0], linewidth=0)
        axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6))
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "0.25", "0.5", "0.75", "1"))
        axes.set_yticks(range(len(shown)), labels, fontsize=12 if len(shown) <= 25 else 10, color=INK)
        axes.grid(visible=False, axis="y")
        for i, (_, density) in enumerate(shown):
            axes.annotate(digits(density, "share"), (density, i), (5, 0), textcoords="offset points", va="center", color=INK)
    return figure("Density of each layer", caption, drawing.svg)


def _phases(run: Run) -> list[str]:
    return [p for p in _PHASES if any(_carried(row, p, way) for row in run.rows for way in ("up", "down"))]


def _carried(row: dict[str, Any], phase: str, way: str) -> float:
    """Return the megabytes of one round, phase and direction."""
    return float(((row.get("phases") or {}).get(phase) or {}).get(way, 0)) / 1e6


def _total(run: Run, phases: Sequence[str], way: str) -> float:
    return sum(_carried(row, phase, way) for row in run.rows for phase in phases)


def _phases_figure(run: Run) -> str:
    phases = _phases(run)
    title = "Megabytes in each round, by phase"
    if not phases:
        return figure(title, "No bytes were carried." if run.rows else "No round has been completed.", "")
    step = -(-len(run.rows) // 120)
    chunks = [run.rows[i : i + step] for i in range(0, len(run.rows), step)]
    edges = [chunk[0]["round"] - 0.5 for chunk in chunks] + [run.rows[-1]["round"] + 0.5]
    with canvas(320) as drawing:
        panels = [drawing.axes(left=48, right=8, bottom=182, top=20), drawing.axes(left=48, right=8, bottom=40, top=162)]
        for axes, way, name in zip(panels, ("up", "down"), ("uplink", "downlink"), strict=True):
            base = [0.0] * len(chunks)
            for phase in phases:
                top = [b + mean(_carried(row, phase, way) for row in chunk) for b, chunk in zip(base, chunks, strict=True)]
                axes.stairs(top, edges, baseline=base, fill=True, facecolor=_PHASES[phase], linewidth=0)
                base = top
            axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08 * max(base) or 1))
            axes.set_title(f"{name}, MB a round", loc="left", fontsize=13, color=MUTED, pad=5)
            axes.locator_params(axis="y", nbins=4)
            whole_numbers(axes)
        panels[0].tick_params(labelbottom=False)
        panels[1].set_xlabel("round")
    caption = "Messages carried in each round; the two panels have their own scales."
    caption += f" Each step is the mean of {step} rounds." if step > 1 else ""
    return figure(title, caption, drawing.svg, _phase_key(phases))


def _phase_key(phases: Sequence[str]) -> str:
    return (
        '<p class="phases">'
        + "".join(
            f'<span><svg class="swatch box" viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" '
            f'style="fill: {coloured(_PHASES[phase])}"/></svg>{phase}{" (not in the totals)" * (phase == "eval")}</span>'
            for phase in phases
        )
        + "</p>"
    )


def _phase_rows(run: Run) -> list[tuple[str, str, str]]:
    phases = _phases(run)
    named = [(phase + " (not in the total)" * (phase == "eval"), [phase]) for phase in phases]
    named += [("total", [phase for phase in phases if phase != "eval"])] * bool(phases)
    return [(name, digits(_total(run, which, "up")), digits(_total(run, which, "down"))) for name, which in named]


def _phases_table(run: Run) -> str:
    lines = _phase_rows(run)
    if not lines:
        return ""
    once = sum(row.get("bytes_down_once", 0) for row in run.rows) / 1e6
    note = f" Counting each distinct broadcast once, the downlink is {digits(once)} MB." if once else ""
    caption = f"Downlink is counted once for each client that receives it.{note}"
    return figure("Megabytes in total, by phase", caption, table(["phase", "MB up", "MB down"], lines, last_is_sum=True))


def _labels_figure(run: Run) -> str:
    histogram = (run.partition or {}).get("histogram") or []
    if not histogram or not histogram[0]:
        return figure("Labels of each client", "The partition holds no counts of labels.", "")
    count = min(len(histogram), MOST_CLIENTS)
    picked = [histogram[i * len(histogram) // count] for i in range(count)]
    examples = [sum(counts) for counts in picked]
    classes = len(picked[0])
    shares = [[counts[k] / max(total, 1) for counts, total in zip(picked, examples, strict=True)] for k in range(classes)]
    caption = "Above: training examples of each client. Below: the share that each label has of them."
    if count < len(histogram):
        caption += f" {count} of the {len(histogram):,} clients, evenly spaced."
    with canvas(340) as drawing:
        from matplotlib.colors import LinearSegmentedColormap, to_rgba

        colours = LinearSegmentedColormap.from_list("share", [to_rgba(HUES[0], 0.03), to_rgba(HUES[0], 1.0)])
        bars = drawing.axes(left=58, right=66, bottom=270, top=8)
        bars.stairs(examples, [i - 0.5 for i in range(count + 1)], fill=True, facecolor=MUTED, linewidth=0)
        bars.set(xlim=(-0.5, count - 0.5), ylim=(0, 1.1 * max(max(examples), 1)), ylabel="examples")
        bars.locator_params(axis="y", nbins=3)
        bars.tick_params(labelbottom=False)
        bars.set_xticks([])
        cells = drawing.axes(left=58, right=66, bottom=40, top=82)
        cells.set(xlabel="client" if count == len(histogram) else "client (selection)", ylabel="label")
        cells.grid(visible=False)
        cells.locator_params(axis="y", integer=True, nbins=11)
        whole_numbers(cells)
        if count < len(histogram):
            where = [i * (count - 1) // 4 for i in range(5)]
            cells.set_xticks(where, [str(i * len(histogram) // count) for i in where])
        scale = drawing.axes(left=WIDTH - 50, right=36, bottom=40, top=182)
        look: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "none"}
        cells.imshow(shares, **look)
        scale.imshow([[1 - i / 63] for i in range(64)], extent=(0, 1, 0, 1), **look)
        scale.set(xticks=(), yticks=(0, 0.5, 1), yticklabels=("0", "50 %", "100 %"))
        scale.yaxis.tick_right()
        scale.grid(visible=False)
    return figure("Labels of each client", caption, drawing.svg)


def _summary_cells(run: Run) -> dict[str, str]:
    cells = {"status": outcome(run).status, **rows([run])[0]}
    cells.pop("folder")
    last: dict[str, Any] = next((row["client_accuracy"] for row in reversed(run.rows) if row.get("client_accuracy")), {})
    for key, word in (("mean", "mean over clients"), ("std", "sd over clients"), ("worst10", "worst tenth of the clients")):
        if (value := number(last.get(key))) is not None:
            cells[f"accuracy %, {word}"] = digits(100 * value, "percent")
    if total := sum(row.get("examples", 0) for row in run.rows):
        cells["training examples seen"] = f"{total:,}"
    if total := sum(row.get("flops", 0) for row in run.rows):
        cells["training GFLOPs, under the masks"] = digits(total / 1e9)
    if peak := max((number(row.get("peak_memory_mb")) or 0.0 for row in run.rows), default=0.0):
        cells["peak memory, MB"] = digits(peak)
    return cells


def _result_table(run: Run) -> str:
    return figure(
        "The run in numbers", "At the last round, and in total; bytes without evaluation.", pairs(_summary_cells(run))
    )


def _lost_html(lost: Sequence[tuple[int, str, str]]) -> str:
    reasons: dict[str, int] = {}
    for _, _, reason in lost:
        reasons[reason] = reasons.get(reason, 0) + 1
    counts = [(text(reason), str(count)) for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    each = [(str(number), text(client), text(reason)) for number, client, reason in lost[:MOST_LOST]]
    more = f"<p>and {len(lost) - MOST_LOST} more, in records.jsonl</p>" if len(lost) > MOST_LOST else ""
    said = "<p>A lost reply counts no bytes up; what was sent to the client counts.</p>"
    details = table(["round", "client", "reason"], each, words=(0, 1, 2)) + more
    return f"{said}{table(['reason', 'times'], counts)}<details><summary>Each by round</summary>{details}</details>"


def _settings_html(run: Run) -> str:
    parts = []
    facts: dict[str, Any] = {key: run.summary[key] for key in ("started", "config_hash") if key in run.summary}
    facts |= flat({key: run.summary[key] for key in ("hardware", "versions") if isinstance(run.summary.get(key), dict)})
    if facts:
        parts.append(f"<details><summary>Versions and hardware</summary>{pairs(facts)}</details>")
    parts.append(f"<details open><summary>Settings (config.toml)</summary>{pairs(flat(run.config))}</details>")
    return "".join(reversed(parts))


def _report_markdown(run: Run) -> str:
    came = outcome(run)
    data, model = _setting(run, "data.name", "dataset"), _setting(run, "model.name", "model")
    parts = [
        f"# {_md(run.label)}",
        f"{_md(_sentence(run, data, model))} Status: {_md(came.status)}.",
        summary_markdown([run]),
    ]
    extra = [(key, value) for key, value in _summary_cells(run).items() if key not in rows([run])[0] and key != "status"]
    if extra:
        parts.append(markdown(["more", ""], extra))
    if lines := _phase_rows(run):
        parts += ["## Megabytes by phase", markdown(["phase", "MB up", "MB down"], lines)]
    last: dict[str, float] = next((row["densities"] for row in reversed(run.rows) if row.get("densities")), {})
    if last:
        parts += [
            "## Density of each layer",
            markdown(["layer", "density"], [(n, digits(d, "share")) for n, d in last.items()]),
        ]
    lost = [(str(row["round"]), str(c), str(why)) for row in run.rows for c, why in (row.get("lost") or {}).items()]
    if lost:
        parts += [f"## Lost clients ({len(lost)})", markdown(["round", "client", "reason"], lost[:MOST_LOST], right=False)]
        parts += [f"and {len(lost) - MOST_LOST} more, in records.jsonl"] * (len(lost) > MOST_LOST)
    settings = [(key, show(value)) for key, value in flat(run.config).items()]
    parts += ["## Settings", markdown(["setting", "value"], settings, right=False)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", printable(text))


# ------------------------------------------------------------------------------------------------ several runs


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in their seed: a setting, and a line where it has one."""

    family: str
    """name of the method and what it takes besides, without density"""
    density: Any
    """as it was asked for; None where that is no setting"""
    runs: list[Run]
    colour: str
    mark: str = ""
    dash: Any = "-"

    @property
    def name(self) -> str:
        """Family, density and how many runs."""
        asked = "" if self.density is None else f", density {show(self.density)}"
        return f"{self.family}{asked}" + (f" ({size(self.runs)})" if len(self.runs) > 1 else "")

    def mean(self, key: str) -> float | None:
        """Return the mean of a number of the outcome, over the runs that have it."""
        known = [value for value in (getattr(outcome(run), key) for run in self.runs) if value is not None]
        return mean(known) if known else None


def _settings_of(runs: Sequence[Run]) -> list[Group]:
    """Return the settings, those of the greatest accuracy first."""
    families = _families([group[0] for group in groups(runs)])
    named = dict(zip((id(family[0]) for family in families), short_names([family[0] for family in families]), strict=True))
    kin = {id(run): family[0] for family in families for run in family}
    found = [Group(named[id(kin[id(group[0])])], flat(group[0].config).get(DENSITY), group, HUES[0]) for group in groups(runs)]
    found.sort(key=lambda group: -1.0 if (accuracy := group.mean("accuracy")) is None else accuracy, reverse=True)
    best = {group.family for group, _ in _best(found)}
    hues = _hues([*(group for group in found if group.family in best), *(group for group in found if group.family not in best)])
    return [replace(group, colour=hues[group.family]) for group in found]


def _families(runs: Sequence[Run]) -> list[list[Run]]:
    """Put together what differs in density only, or also in the learning rates that were chosen for each density."""
    found = []
    for family in groups(runs, (SEED, DENSITY, *RATES)):
        densities = {flat(run.config).get(DENSITY) for run in family}
        found += [family] if len(densities) == len(family) else groups(family, (SEED, DENSITY))
    return found


def _hues(found: Sequence[Group]) -> dict[str, str]:
    """Give the families colours: each one of those used little so far, and of these the one whose users are least near."""
    places: dict[str, list[tuple[float, float]]] = {}
    for group in found:
        carried = (group.mean("bytes_up") or 0.0) + (group.mean("bytes_down") or 0.0)
        places.setdefault(group.family, []).append((math.log(1 + carried), 10 * (group.mean("accuracy") or 0.0)))
    hues: dict[str, str] = {}
    for family, own in places.items():
        users = {hue: [other for other, taken in hues.items() if taken == hue] for hue in HUES}
        most = min(map(len, users.values())) + (len(hues) >= len(HUES))
        near = {
            hue: sum(math.exp(-3 * math.dist(a, b)) for other in users[hue] for a in own for b in places[other])
            for hue in HUES
            if len(users[hue]) <= most
        }
        hues[family] = min(near, key=lambda hue: near[hue])
    return hues


def _marked(found: Sequence[Group]) -> list[tuple[Group, Setting]]:
    """Return the settings that have an accuracy and bytes, each as a mark."""
    marked = []
    for group in found:
        known = [(100 * came.accuracy, came) for came in map(outcome, group.runs) if came.accuracy is not None]
        carried = mean((came.bytes_up + came.bytes_down) / 1e6 for _, came in known) if known else 0.0
        if carried > 0:
            scores = [score for score, _ in known]
            density = number(group.density)
            if density is None:
                density = float(f"{mean(1.0 if came.density is None else came.density for _, came in known):.2g}")
            mark = Setting(group.family, group.colour, density, carried, mean(scores), min(scores), max(scores))
            marked.append((group, mark))
    return marked


def _best(found: Sequence[Group]) -> list[tuple[Group, Setting]]:
    """Return the settings on the Pareto front, from the fewest megabytes to the most."""
    marked = _marked(found)
    return [marked[i] for i in front([mark for _, mark in marked])]


def said_of_front(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the settings on the Pareto front, from the fewest megabytes to the most, each with what it came to in words."""
    return _said(_settings_of(runs))


def _said(found: Sequence[Group]) -> list[tuple[str, str]]:
    return [
        (group.name, f"{digits(mark.accuracy, 'percent')} % for {digits(mark.megabytes)} MB") for group, mark in _best(found)
    ]


def _drawn(found: Sequence[Group]) -> list[Group]:
    """Return the settings that have curves, with their letters and dashes."""
    drawn = list(found)
    if len(found) > MOST_LINES:
        best = {id(group) for group, _ in _best(found)}
        drawn = [group for group in found if not best or id(group) in best][:MOST_LINES]
    used: dict[str, int] = {}
    lines = []
    for i, group in enumerate(drawn):
        used[group.colour] = used.get(group.colour, -1) + 1
        lines.append(replace(group, mark=chr(ord("A") + i), dash=_DASHES[used[group.colour] % len(_DASHES)]))
    return lines


def _tradeoff_html(found: Sequence[Group]) -> str:
    """Return the figure of all settings, and the front in words."""
    title, marked = "Accuracy against megabytes", _marked(found)
    if not marked:
        return ""
    marks = [mark for _, mark in marked]
    log = _far_apart([mark.megabytes for mark in marks], 20)
    caption = "A mark for each setting where it ended: up and to the left is better. Names in bold are on the Pareto front."
    caption += " A thin line joins the densities of one method." if len({mark.name for mark in marks}) < len(marks) else ""
    if any(len(group.runs) > 1 for group, _ in marked):
        caption += " Marks are means over the seeds; a bar goes from the least to the greatest."
    if absent := len(found) - len(marked):
        caption += f" Without an accuracy, and not drawn: {absent} of {len(found)}."
    if stopped := sum(outcome(run).status != "done" for group, _ in marked for run in group.runs):
        caption += f" {stopped} of the runs did not end as done and count up to where they stopped."
    each = "".join(f"<li><b>{text(name)}</b>: {came}</li>" for name, came in _said(found))
    said = f"<p>The Pareto front: no other setting has as much accuracy for as few megabytes.</p><ol>{each}</ol>"
    drawing = figure(title, caption, draw(marks, log=log), _density_key(marks), wide=True)
    return f'<section class="tradeoff">{drawing}<div class="front">{said}</div></section>'


def _density_key(marks: Sequence[Setting]) -> str:
    diameters = sizes(marks)
    shown = list(diameters.items())
    if len(shown) > 6:
        shown = [shown[i * (len(shown) - 1) // 5] for i in range(6)]
    keys = [(swatch(density, size), digits(density, "share")) for density, size in shown]
    keys += [(swatch(1.0, 0.0), "dense")] * any(mark.density >= DENSE for mark in marks)
    step = f'<path d="M0 14V5H16" fill="none" style="stroke: {coloured(RULE)}" stroke-width="6"/>'
    return (
        '<p class="phases"><span>density</span>'
        + "".join(
            f'<span><svg class="swatch dot" viewBox="0 0 16 16" aria-hidden="true">{drawing}</svg>{word}</span>'
            for drawing, word in [*keys, (step, "Pareto front")]
        )
        + "</p>"
    )


def _mark(line: Group) -> str:
    dashes = "" if line.dash == "-" else f' stroke-dasharray="{" ".join(str(2 * length) for length in line.dash[1])}"'
    return (
        f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" fill="none" '
        f'style="stroke: var(--{VARIABLES[line.colour]})" stroke-width="2.5"{dashes}/></svg><b>{line.mark}</b>'
    )


def _key(lines: Sequence[Group]) -> str:
    return '<div class="key">' + "".join(f"<span>{_mark(line)} {text(line.name)}</span>" for line in lines) + "</div>"


def _results_html(found: Sequence[Group]) -> str:
    runs = [run for group in found for run in group.runs]
    letters = {id(line.runs): line for line in _drawn(found)}
    cells = rows(runs, each=False)
    alike = ["rounds"] * (len({row["rounds"] for row in cells}) == 1)
    columns = [column for column in cells[0] if column not in ("method", "folder", *alike)]
    asked = any(group.density is not None for group in found)
    several = len(runs) > len(found)
    head = ["method", *["density asked"] * asked, *["seeds"] * several, *columns]
    body = []
    for group, row in zip(found, cells, strict=True):
        mark = f'<span class="mark">{_mark(letters[id(group.runs)])}</span>' if id(group.runs) in letters else ""
        body.append(
            [
                f'<span class="name">{mark}{text(group.family)}</span>',
                *[text(show(group.density))] * asked,
                *[str(len(group.runs))] * several,
                *(text(row[column]) for column in columns),
            ]
        )
    every = [row for row in rows(runs) if row["folder"]]
    each = [[text(row["method"]), *(text(cell) for cell in list(row.values())[1:])] for row in every]
    each = [[*row[:1], text(outcome(run).status), *row[1:]] for row, run in zip(each, runs, strict=True)]
    titles = ["run", "status", *list(every[0])[1:]]
    unfinished = sum(outcome(run).status != "done" for run in runs)
    warning = (
        f"<p>{unfinished} of the {len(runs)} runs did not end as done: see the status of each run.</p>" if unfinished else ""
    )
    said = ["Means over the seeds ± their sample standard deviation."] * several + [f"{cells[0]['rounds']} rounds each."] * len(
        alike
    )
    note = f"<p>{' '.join(said)}</p>" if said else ""
    return (
        f"{table([text(c) for c in head], body)}{note}{warning}"
        f"<details><summary>Each run</summary>{table(titles, each, words=(0, 1, len(titles) - 1))}</details>"
    )


def _accuracy_comparison(lines: Sequence[Group], only: str) -> list[str]:
    """Return the curves; `only` says which settings they are of, if not of all."""
    band = " Line: mean over the seeds; band: least to greatest." if any(len(line.runs) > 1 for line in lines) else ""
    band += only
    log = _far_apart([own.megabytes[-1] for line in lines for run in line.runs if (own := curve(run.rows)).accuracy])
    scale = " Log scale." if log else ""
    figures = []
    for kind, axis, caption in (
        ("rounds", "round", "Accuracy of the server's model at its evaluated rounds." + band),
        ("megabytes", "MB up + down", "All bytes carried so far, without evaluation." + scale + band),
        ("seconds", "seconds", "Wall time of the rounds, each on the machine of its run." + band),
    ):
        drawn = [line for line in (_merged(group, kind) for group in lines) if line is not None]
        title = {"rounds": "Accuracy against round", "megabytes": "Accuracy against megabytes carried so far"}.get(kind)
        if not drawn:
            return [figure("Accuracy", "No run has been evaluated.", "")]
        svg = plot(drawn, axis, "accuracy (%)", percent=True, whole=kind == "rounds", logx=log and kind == "megabytes")
        figures.append(figure(title or "Accuracy against seconds", caption, svg))
    return figures


def _far_apart(values: Sequence[float], factor: float = 10) -> bool:
    """Return whether the values are positive and span more than this factor, so that a log scale shows them better."""
    return bool(values) and 0 < factor * min(values) < max(values)


def _merged(group: Group, kind: str) -> Line | None:
    """Return the mean and band over the runs, at the rounds that were evaluated in all of them that were evaluated."""
    curves = [own for own in (curve(run.rows) for run in group.runs) if own.accuracy]
    if not curves:
        return None
    common = sorted(set.intersection(*(set(own.rounds) for own in curves)))
    at = [[own.rounds.index(number) for number in common] for own in curves]
    xs = [[getattr(own, kind)[i] for i in where] for own, where in zip(curves, at, strict=True)]
    ys = [[own.accuracy[i] for i in where] for own, where in zip(curves, at, strict=True)]
    return _mean_line(group, [mean(x) for x in zip(*xs, strict=True)], ys) if common else None


def _mean_line(group: Group, x: list[float], ys: Sequence[list[float]]) -> Line:
    columns = list(zip(*ys, strict=True))
    band = ([min(c) for c in columns], [max(c) for c in columns]) if len(ys) > 1 else (None, None)
    return Line(group.mark, x, [mean(c) for c in columns], group.colour, group.dash, *band)


def _density_comparison(lines: Sequence[Group], only: str) -> str:
    drawn = []
    for group in lines:
        found = [{float(r["round"]): d for r in run.rows if (d := number(r.get("density"))) is not None} for run in group.runs]
        found = [densities for densities in found if densities]
        common = sorted(set.intersection(*map(set, found))) if found else []
        if common:
            drawn.append(_mean_line(group, common, [[densities[x] for x in common] for densities in found]))
    if not drawn:
        return figure("Density over the rounds", "No density was recorded.", "")
    log = _far_apart([y for line in drawn for y in line.y])
    caption = "Share of the prunable weights that are kept after each round." + " Log scale." * log + only
    svg = plot(drawn, "round", "density", whole=True, logy=log)
    return figure("Density over the rounds", caption, svg)


def _phases_comparison(lines: Sequence[Group], only: str) -> str:
    bars = [
        (f"{group.mark} {way}", {phase: mean(_total(run, [phase], way) for run in group.runs) for phase in _PHASES})
        for group in lines
        for way in ("up", "down")
    ]
    used = [phase for phase in _PHASES if any(carried[phase] for _, carried in bars)]
    if not used:
        return figure("Megabytes carried, by phase", "No bytes were carried.", "")
    with canvas(48 + 40 * len(lines)) as drawing:
        axes = drawing.axes(left=58, right=62, bottom=40, top=4)
        spots = [i // 2 + (-0.19 if i % 2 == 0 else 0.19) for i in range(len(bars))]
        for spot, (_, carried) in zip(spots, bars, strict=True):
            start = 0.0
            for phase in used:
                axes.barh(spot, carried[phase], left=start, height=0.32, color=_PHASES[phase], linewidth=0)
                start += carried[phase]
            total = digits(start - carried["eval"])
            axes.annotate(total, (start, spot), (5, 0), textcoords="offset points", va="center", fontsize=11, color=INK)
        axes.set(xlim=(0, max(sum(carried.values()) for _, carried in bars)), ylim=(len(lines) - 0.5, -0.5), xlabel="MB")
        axes.set_yticks(spots, [name for name, _ in bars], fontsize=11, color=INK)
        axes.grid(visible=False, axis="y")
    several = " (mean over the seeds)" if any(len(group.runs) > 1 for group in lines) else ""
    caption = f"All messages of the whole run{several}. The number at each bar is its sum without evaluation.{only}"
    return figure("Megabytes carried, by phase", caption, drawing.svg, _phase_key(used))


def _differences_html(lines: Sequence[Group], only: str) -> str:
    ordered = [run for line in lines for run in line.runs]
    body = []
    for key, values in differences(ordered).items():
        given = iter(values)
        cells = [", ".join(dict.fromkeys(show(next(given)) for _ in line.runs)) for line in lines]
        body.append([f"<code>{text(key)}</code>", *map(text, cells)])
    head = ["setting", *(f'<span class="mark">{_mark(line)}</span>' for line in lines)]
    return f"<p>{text(only.strip())}</p>" * bool(only) + table(head, body, words=range(len(head)))


def _shorten(name: str, length: int) -> str:
    name = printable(name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"
