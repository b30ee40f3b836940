"""What an audit found, as a table and on a page: how well membership can be told, with intervals, curves and clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsieve.report.html import figure, page, pairs, section, table, text, tiles, write
from fedsieve.report.plots import HUES, MUTED, Line, plot
from fedsieve.report.records import Run, outcome
from fedsieve.report.table import digits

if TYPE_CHECKING:
    from rich.table import Table

MEASURES = {
    "auc": "AUC",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "balanced_accuracy": "balanced accuracy",
    "advantage": "advantage",
}
ATTACKS = {"loss": "by loss", "shadow": "by shadow models"}
_COLOURS = {"loss": HUES[0], "shadow": HUES[1]}
_CHANCE = {"auc": "0.5", "tpr_at_1_fpr": "0.01", "balanced_accuracy": "0.5", "advantage": "0"}


def audit_table(told: Mapping[str, Any]) -> Table:
    """Return what the attacks reach as a table for a terminal, with intervals and the spread over clients."""
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("attack")
    for name in MEASURES.values():
        shown.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for attack, found in told["attacks"].items():
        shown.add_row(ATTACKS[attack], *(f"{found[key]['value']:.3f}" for key in MEASURES), style="bold")
        shown.add_row("  95 % interval", *(_interval(found[key]) for key in MEASURES), style="dim")
        if found["clients"]["count"]:
            for key, word in (("p50", f"median of {found['clients']['count']} clients"), ("p95", "their 95th percentile")):
                cells = (f"{found['clients'][measure][key]:.3f}" for measure in MEASURES)
                shown.add_row(f"  {word}", *cells, style="dim")
    shown.add_row("guessing", *(_CHANCE[key] for key in MEASURES))
    return shown


def _interval(measure: Mapping[str, float]) -> str:
    return f"{measure['low']:.3f}-{measure['high']:.3f}"


def write_page(told: Mapping[str, Any], run: Run, out: Path) -> Path:
    """Write the page; return its path.

    Raises:
        UsageError: it cannot be written there.
    """
    write(out, _page(told, run))
    return out


def _page(told: Mapping[str, Any], run: Run) -> str:
    each = told["examples"]["each"]
    whose = "of the run's clients" if told["client"] is None else f"of client {told['client']}"
    parts = [
        f'<header><p class="kicker">Membership inference</p><h1>{text(run.label)}</h1>'
        f"<p>Does the final model tell who was in the training data? {each:,} training examples {whose} against {each:,} test "
        f"examples. Folder {text(run.folder.resolve().name)}.</p></header>",
        tiles(_tiles(told, run)),
        section("Attacks", [_roc_figure(told), _losses_figure(told)]),
        section("Measures", [_measures_html(told)], columns=False),
        section("How it was done", [pairs(_facts(told, run))], columns=False),
    ]
    footer = (
        "AUC is the chance that a member scores higher than a non-member. TPR at 1 % FPR is the share of members found where "
        "one non-member in a hundred is taken for a member. Balanced accuracy is at the attack's own threshold: the mean "
        "training loss, or even odds. Advantage is the largest difference between the two rates, over all thresholds; being a "
        "largest, it is above 0 by chance too. Intervals: 95 %, bootstrap over examples."
    )
    return page(f"Membership inference against {run.label}", parts, footer)


def _tiles(told: Mapping[str, Any], run: Run) -> list[tuple[str, str, str, str]]:
    cells = []
    for attack, found in told["attacks"].items():
        cells.append((f"AUC, {attack}", f"{found['auc']['value']:.3f}", "", _interval(found["auc"])))
        tpr = found["tpr_at_1_fpr"]
        said = f"{100 * tpr['low']:.3g}–{100 * tpr['high']:.3g} %"
        cells.append((f"TPR at 1 % FPR, {attack}", f"{100 * tpr['value']:.3g}", "%", said))
    members, others = told["accuracy"]["members"], told["accuracy"]["nonmembers"]
    cells.append(("Accuracy", f"{100 * members:.1f}", "%", f"of members; non-members {100 * others:.1f} %"))
    density = outcome(run).density
    cells.append(("Density", "–" if density is None else digits(density, "share"), "", "of the final model"))
    return cells


def _roc_figure(told: Mapping[str, Any]) -> str:
    lines = []
    for attack, found in told["attacks"].items():
        roc = {key: [100 * value for value in values] for key, values in found["roc"].items()}
        lines.append(Line(attack, roc["fpr"], roc["tpr"], _COLOURS[attack], "-", roc["low"], roc["high"]))
    rates = lines[0].x
    lines.append(Line("guess", rates, rates, MUTED, (0, (1.5, 1.5))))
    caption = "Members found against non-members taken for members, on a log axis: what few errors allow is on the left."
    drawn = plot(lines, "false positive rate (%, log scale)", "true positive rate (%)", percent=True, logx=True)
    return figure("ROC of the attacks", caption + " Bands: 95 % intervals.", drawn)


def _losses_figure(told: Mapping[str, Any]) -> str:
    shares = [100 * i / 100 for i in range(101)]
    lines = [
        Line(mark, [max(loss, 1e-6) for loss in told["losses"][key]], shares, colour, dash)
        for key, mark, colour, dash in (
            ("members", "members", HUES[2], "-"),
            ("nonmembers", "others", HUES[3], (0, (5, 2))),
        )
    ]
    caption = "Share of the examples whose loss is at most so much. The further apart the lines, the more the losses tell."
    return figure("Losses", caption, plot(lines, "loss (log scale)", "examples (%)", percent=True, logx=True))


def _measures_html(told: Mapping[str, Any]) -> str:
    body = []
    for attack, found in told["attacks"].items():
        cells = [f"{found[key]['value']:.3f} ({_interval(found[key])})" for key in MEASURES]
        body.append([text(ATTACKS[attack]), *map(text, cells)])
        for key, word in (("p5", "5th percentile"), ("p50", "median"), ("p95", "95th percentile")):
            if count := found["clients"]["count"]:
                cells = [f"{found['clients'][measure][key]:.3f}" for measure in MEASURES]
                body.append([f"– {count:,} clients, {word}", *cells])
    body.append(["guessing", *_CHANCE.values()])
    return table(["attack", *MEASURES.values()], body)


def _facts(told: Mapping[str, Any], run: Run) -> dict[str, Any]:
    examples, shadows = told["examples"], told["shadows"]
    facts: dict[str, Any] = {
        "members": f"{examples['each']:,} drawn of {examples['members']:,}",
        "non-members": f"{examples['each']:,} drawn of {examples['nonmembers']:,} test examples"
        + (", none of which a shadow model has seen" if shadows["count"] else ""),
        "clients that took part": told["clients"],
        "each client": "all its training examples, against all non-members, weighted to its labels",
        "bootstrap": f"{told['bootstrap']['resamples']:,} resamples",
        "seed": told["seed"],
        "shadow models": shadows["count"],
    }
    if shadows["count"]:
        facts["each shadow model"] = (
            f"{shadows['examples']:,} examples, {shadows['epochs']:,} epochs, pruned by magnitude as the run's layers were, "
            f"to a density of {digits(shadows['density'], 'share')}"
        )
        own, others = (100 * shadows["accuracy"][key] for key in ("members", "nonmembers"))
        facts["shadow models' accuracy"] = f"{own:.1f} % of members, {others:.1f} % of others"
    return facts
