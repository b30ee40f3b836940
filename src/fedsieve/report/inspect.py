"""What became of each layer of a run: shape, density over the rounds, dead units, operations; and how masks and signs moved.

Densities and movements are read from the records. Shapes and operations need the network, dead units the final model too;
where either is missing the rest is shown, with a note that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsieve.errors import FedsieveError
from fedsieve.report.html import figure, page, section, table, text, tiles, write
from fedsieve.report.plots import HUES, INK, MUTED, WIDTH, Line, canvas, plot, whole_numbers
from fedsieve.report.records import Run, number, outcome, read
from fedsieve.report.table import digits, printable

if TYPE_CHECKING:
    from rich.table import Table

    from fedsieve.models.spec import ModelSpec

MOST_EVENTS, MOST_ROUNDS, MOST_LAYERS = 50, 300, 60
MOVEMENTS = {
    "mask_overlap": "masks' overlap from round to round",
    "client_overlap": "clients' own masks' overlap",
    "sign_flips": "sign flips of kept weights",
}
_EXTREME: dict[str, tuple[str, Callable[..., Any]]] = {
    "mask_overlap": ("lowest", min),
    "client_overlap": ("lowest", min),
    "sign_flips": ("highest", max),
}


@dataclass(frozen=True, slots=True)
class Units:
    """Outputs or inputs of a layer: how many there are, and how many are left without the dead ones."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor of weights. None: not known."""

    name: str
    shape: tuple[int, ...] | None
    weights: int | None
    first: float | None
    """density after the first round"""
    half: float | None
    """density after half of the rounds that were played"""
    last: float | None
    outputs: Units | None
    inputs: Units | None
    dense_flops: int | None
    """of one example forward with all weights"""
    sparse_flops: int | None
    """the same for the weights kept after the last round"""

    @property
    def title(self) -> str:
        """Name without what is common to all."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of a run's layers."""

    run: Run
    layers: Sequence[Layer]
    notes: Sequence[str]

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return round and value of a movement, where it was measured."""
        return [(row["round"], value) for row in self.run.rows if (value := number(row.get(key))) is not None]

    @property
    def events(self) -> list[tuple[int, str]]:
        """Round and sentence of what the method had to say."""
        return [(row["round"], str(event)) for row in self.run.rows for event in row.get("events") or ()]

    def total(self, what: str) -> int | None:
        """Sum a column over the layers; None where it is not known."""
        found = [getattr(layer, what) for layer in self.layers]
        return None if not found or None in found else sum(found)


def inspect(folder: Path, network: Callable[[], ModelSpec]) -> Inspection:
    """Read what a run folder says of its layers.

    Args:
        folder: the run folder.
        network: builds the network that the config names; it may raise, then the rest is shown.

    Raises:
        UsageError: `folder` is no run folder.
        DataError: one of its files is damaged.
    """
    run = read(folder)
    shapes, model_is_there = _final_shapes(run.folder), (run.folder / "model.safetensors").is_file()
    notes: list[str] = []
    spec, why = _network(run, network, shapes)
    if spec is None:
        notes.append(f"The network cannot be built from config.toml, so operations and dead units are not known: {why}")
    widths: Mapping[str, Any] = {}
    if spec is not None and model_is_there:
        from fedsieve.finish.compact import narrowed
        from fedsieve.finish.compact import widths as compared

        widths = compared(spec, narrowed(run.folder, spec))
    elif not model_is_there:
        notes.append("The run has not ended: there is no final model yet, so dead units are not known.")
    if not run.rows:
        notes.append("No round has been completed.")
    return Inspection(run, [_layer(run, name, shapes, spec, widths) for name in _names(run, shapes, spec)], notes)


def _final_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of the final model, if there is one."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _network(run: Run, network: Callable[[], ModelSpec], shapes: Mapping[str, tuple[int, ...]]) -> tuple[ModelSpec | None, str]:
    """Build the network, if it is the one of the run; else say why not."""
    if "init" not in run.config.get("model", {}):
        return None, "the run was started from Python, with a model of its own."
    try:
        spec = network()
    except FedsieveError as error:
        return None, str(error).splitlines()[0]
    built = {slot.name: slot.shape for slot in spec.layout.slots}
    recorded: dict[str, Any] = next((row["densities"] for row in reversed(run.rows) if row.get("densities")), {})
    if (shapes and built != shapes) or not recorded.keys() <= built.keys():
        return None, "the run ended with another network than the one named there."
    return spec, ""


def _names(run: Run, shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec | None) -> list[str]:
    """Return the tensors to show, from input to output: those that may be pruned or cost operations, as far as is known."""
    if spec is not None:
        return [slot.name for slot in spec.layout.slots if slot.maskable or spec.flops[slot.name]]
    recorded = next((list(row["densities"]) for row in reversed(run.rows) if row.get("densities")), [])
    return recorded or [name for name, shape in shapes.items() if len(shape) > 1]


def _layer(
    run: Run,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec | None,
    widths: Mapping[str, Any],
) -> Layer:
    shape = shapes.get(name) if spec is None else spec.layout.named[name].shape
    rows = run.rows
    first, half, last = (_density(rows[i], name) if rows else None for i in (0, (len(rows) - 1) // 2, -1))
    if rows and spec is not None and not spec.layout.named[name].maskable:
        first = half = last = 1.0
    weights = None if shape is None else prod(shape)
    flops = None if spec is None else spec.flops[name]
    kept = None if weights is None or last is None else round(last * weights)
    sparse = flops * kept // weights if flops is not None and kept is not None and weights else flops
    found = widths.get(name.removesuffix(".weight"))
    outputs, inputs = (Units(*pair) for pair in zip(found["before"], found["after"], strict=True)) if found else (None, None)
    return Layer(name, shape, weights, first, half, last, outputs, inputs, flops, sparse)


def _density(row: Mapping[str, Any], name: str) -> float | None:
    """Return the density of a layer after a round: 1 while nothing is pruned, None where the network had no such layer."""
    densities = row.get("densities")
    return 1.0 if densities is None else number(densities.get(name))


def as_json(found: Inspection) -> dict[str, Any]:
    """Return all of it as what `fedsieve inspect --json` prints."""
    came = outcome(found.run)
    return {
        "version": 1,
        "run": found.run.label,
        "status": came.status,
        "rounds": came.rounds,
        "density": came.density,
        "layers": [asdict(layer) for layer in found.layers],
        "total": {what: found.total(what) for what in ("weights", "dense_flops", "sparse_flops")},
        "moved": [{"round": row["round"], **{key: number(row.get(key)) for key in MOVEMENTS}} for row in found.run.rows],
        "events": [{"round": round, "event": event} for round, event in found.events],
        "notes": list(found.notes),
    }


def sentences(found: Inspection) -> list[str]:
    """Return a line on each movement, on events, and on what is not known."""
    lines = []
    for key, name in MOVEMENTS.items():
        series = found.series(key)
        if not series:
            lines.append(f"{name}: not measured ({_why_not(found, key)})")
            continue
        word, choose = _EXTREME[key]
        at, value = choose(series, key=lambda point: point[1])
        lines.append(f"{name}: {word} {100 * value:.3g} % in round {at}, last {100 * series[-1][1]:.3g} %")
    events = found.events
    lines.append(f"events: {len(events) or 'none'}")
    lines += [f"  round {round}: {printable(event)}" for round, event in events[:10]]
    lines += [f"  and {len(events) - 10} more, in records.jsonl"] * (len(events) > 10)
    return [*lines, *found.notes]


def _why_not(found: Inspection, key: str) -> str:
    rows = found.run.rows
    if rows and not any(key in row for row in rows):
        return "the run is of an earlier version"
    if key == "client_overlap":
        return "no two clients sent masks of their own in a round"
    return "nothing was pruned over two rounds of the same network"


# ------------------------------------------------------------------------------------------------ tables


def _cells(layer: Layer) -> list[str]:
    """Return the cells of a layer, but for its name and shape."""
    return [
        *(_known(layer.weights, "{:,}"), *(_share(value) for value in (layer.first, layer.half, layer.last))),
        *(_dead(units) for units in (layer.outputs, layer.inputs)),
        *(_mega(value) for value in (layer.dense_flops, layer.sparse_flops)),
    ]


def _known(value: int | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _share(value: float | None) -> str:
    return "–" if value is None else digits(value, "share")


def _mega(value: int | None) -> str:
    return "–" if value is None else digits(value / 1e6)


def _dead(units: Units | None) -> str:
    return "–" if units is None else f"{units.before - units.after:,}/{units.before:,}"


def _shape(layer: Layer) -> str:
    return "–" if layer.shape is None else "x".join(map(str, layer.shape)) or "scalar"


def _sums(found: Inspection) -> list[str]:
    """Return the cells of the last line."""
    weights, dense, sparse = (found.total(what) for what in ("weights", "dense_flops", "sparse_flops"))
    return [_known(weights, "{:,}"), "", "", _share(outcome(found.run).density), "", "", _mega(dense), _mega(sparse)]


def layers_table(found: Inspection) -> Table:
    """Return the layers as a table for a terminal of 80 columns, the shape of each under its name."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("layer", overflow="fold", min_width=11)
    heads = ("weights", "density\nfirst", "\nhalf", "\nlast", "dead\noutputs", "dead\ninputs", "MFLOPs\ndense", "\nsparse")
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for layer in found.layers:
        shown.add_row(Text(printable(layer.title)).append(f"\n{_shape(layer)}", style="dim"), *_cells(layer))
    if found.layers:
        shown.add_row("all", *_sums(found), style="bold")
    return shown


# ------------------------------------------------------------------------------------------------ page


def write_page(found: Inspection, out: Path) -> Path:
    """Write the page; return its path.

    Raises:
        UsageError: it cannot be written there.
    """
    write(out, _page(found))
    return out


def _page(found: Inspection) -> str:
    notes = "".join(f"<p>{text(note)}</p>" for note in found.notes)
    parts = [
        f'<header><p class="kicker">Inspection of the layers</p><h1>{text(found.run.label)}</h1>'
        f"<p>Folder {text(found.run.folder.resolve().name)}, {text(outcome(found.run).status)} after "
        f"{outcome(found.run).rounds:,} rounds.</p>{notes}</header>",
        tiles(_tiles(found)),
        section("Layers", [_layers_html(found)] if found.layers else [], columns=False),
        section("Over the rounds", [_heat_figure(found), _units_figure(found), _overlap_figure(found), _flips_figure(found)]),
        section(f"Events ({len(found.events)})", [_events_html(found)] if found.events else [], columns=False),
    ]
    footer = (
        "Density is the share of a layer's weights that are kept. A dead unit is a channel or neuron that the final model's "
        "zeros leave without effect. FLOPs are those of one example forward, two a multiply-add; sparse: of kept weights only. "
        "Overlap is what two masks both keep over what either keeps."
    )
    return page(f"Layers of {found.run.label}", parts, footer)


def _tiles(found: Inspection) -> list[tuple[str, str, str, str]]:
    came, dense, sparse = outcome(found.run), found.total("dense_flops"), found.total("sparse_flops")
    units = [layer.outputs for layer in found.layers if layer.outputs is not None]
    dead, there = sum(each.before - each.after for each in units), sum(each.before for each in units)
    cells = [("Density", _share(came.density), "", f"after round {came.rounds}")]
    cells.append(("Dead units", f"{dead:,}" if units else "–", "", f"of {there:,}" if units else "not known"))
    share, note = ("–", "not known")
    if dense and sparse is not None:
        share, note = f"{100 * sparse / dense:.3g}", f"{_mega(sparse)} of {_mega(dense)} MFLOPs"
    cells.append(("Operations", share, "%" * (share != "–"), note))
    for key, title in (("mask_overlap", "Mask overlap"), ("client_overlap", "Clients' overlap"), ("sign_flips", "Sign flips")):
        series = found.series(key)
        value, when = (f"{100 * series[-1][1]:.3g}", f"round {series[-1][0]}") if series else ("–", "not measured")
        cells.append((title, value, "%" * bool(series), when))
    return cells


def _layers_html(found: Inspection) -> str:
    head = ["layer", "shape", "weights", "density, first", "half", "last", "dead outputs", "dead inputs", "MFLOPs", "sparse"]
    body = [[text(layer.title), text(_shape(layer)), *map(text, _cells(layer))] for layer in found.layers]
    return table(head, [*body, ["all", "", *map(text, _sums(found))]], words=(0, 1), last_is_sum=True)


def _heat_figure(found: Inspection) -> str:
    """Draw the density of each layer over the rounds as colours."""
    title, rows = "Density of each layer over the rounds", found.run.rows
    layers = [layer for layer in found.layers if rows and _density(rows[-1], layer.name) is not None][:MOST_LAYERS]
    if not rows or not layers:
        return figure(title, "No density is known.", "")
    picked = rows if len(rows) <= MOST_ROUNDS else [rows[i * (len(rows) - 1) // (MOST_ROUNDS - 1)] for i in range(MOST_ROUNDS)]
    values = [[_density(row, layer.name) for row in picked] for layer in layers]
    least = min((value for line in values for value in line if value), default=1.0)
    logs = 0 < 10 * least < 1
    low = log(least) if logs else 0.0
    shades = [[(log(max(v, least)) if logs else v) if v is not None else float("nan") for v in line] for line in values]
    edges = [row["round"] for row in picked]
    caption = "Dark is dense." + (" The colours are on a log scale; the lightest is none too." if logs else "")
    caption += f" The first {MOST_LAYERS} of {len(found.layers)} layers." if len(layers) < len(found.layers) else ""
    with canvas(max(180, 70 + 20 * len(layers))) as drawing:
        from matplotlib.colors import LinearSegmentedColormap, to_rgba

        names = [_shorten(layer.title) for layer in layers]
        left = 14 + 6.6 * max(map(len, names))
        colours = LinearSegmentedColormap.from_list("density", [to_rgba(HUES[0], 0.04), to_rgba(HUES[0], 1.0)])
        look: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": 0.0 if logs else 1.0, "aspect": "auto"}
        look["interpolation"] = "none"
        cells = drawing.axes(left=left, right=84, bottom=42, top=8)
        cells.imshow(shades, extent=(edges[0] - 0.5, edges[-1] + 0.5, len(layers) - 0.5, -0.5), **look)
        cells.set(xlabel="round")
        cells.set_yticks(range(len(layers)), names, fontsize=11, color=INK)
        cells.grid(visible=False)
        whole_numbers(cells)
        scale = drawing.axes(left=WIDTH - 70, right=56, bottom=42, top=8)
        scale.imshow([[low * i / 63 if logs else 1 - i / 63] for i in range(64)], extent=(0, 1, 0, 1), **look)
        marks = [least**share for share in (1, 0.5, 0)] if logs else [0, 0.5, 1]
        scale.set(xticks=(), yticks=(0, 0.5, 1), yticklabels=[digits(mark, "share") for mark in marks])
        scale.yaxis.tick_right()
        scale.grid(visible=False)
    return figure(title, caption, drawing.svg)


def _overlap_figure(found: Inspection) -> str:
    title = "Overlap of masks"
    lines = []
    for key, mark, colour, dash in (
        ("mask_overlap", "rounds", HUES[0], "-"),
        ("client_overlap", "clients", HUES[1], (0, (5, 2))),
    ):
        if series := found.series(key):
            lines.append(Line(mark, [float(x) for x, _ in series], [100 * y for _, y in series], colour, dash))
    if not lines:
        return figure(title, f"It was not measured: {_why_not(found, 'mask_overlap')}.", "")
    caption = "rounds: of the global masks after a round and after the one before."
    if len(lines) > 1 or lines[0].mark == "clients":
        caption += " clients: of the masks that the clients of a round sent."
    return figure(title, caption, plot(lines, "round", "overlap (%)", percent=True, whole=True))


def _flips_figure(found: Inspection) -> str:
    title = "Sign flips"
    series = found.series("sign_flips")
    if not series:
        return figure(title, f"They were not measured: {_why_not(found, 'sign_flips')}.", "")
    line = Line("", [float(x) for x, _ in series], [100 * y for _, y in series], HUES[2])
    caption = "Share of the weights kept in two rounds that have another sign after the second."
    return figure(title, caption, plot([line], "round", "flipped (%)", whole=True))


def _units_figure(found: Inspection) -> str:
    title = "Units left in each layer"
    units = [(layer, layer.outputs) for layer in found.layers if layer.outputs is not None][:MOST_LAYERS]
    if not units:
        return figure(title, "Dead units are not known, see above.", "")
    with canvas(28 + 22 * len(units)) as drawing:
        names = [_shorten(layer.title) for layer, _ in units]
        axes = drawing.axes(left=14 + 6.6 * max(map(len, names)), right=110, bottom=24, top=4)
        axes.barh(range(len(units)), [1] * len(units), height=0.66, color=MUTED, alpha=0.18, linewidth=0)
        axes.barh(range(len(units)), [u.after / u.before for _, u in units], height=0.66, color=HUES[0], linewidth=0)
        axes.set(xlim=(0, 1), ylim=(len(units) - 0.4, -0.6))
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "0.25", "0.5", "0.75", "1"))
        axes.set_yticks(range(len(units)), names, fontsize=11, color=INK)
        axes.grid(visible=False, axis="y")
        for i, (_, unit) in enumerate(units):
            said = f"{unit.after:,} of {unit.before:,}"
            axes.annotate(said, (1, i), (6, 0), textcoords="offset points", va="center", fontsize=12, color=INK)
    caption = "Channels or neurons of the final model that are not dead; one is left at least."
    return figure(title, caption, drawing.svg)


def _events_html(found: Inspection) -> str:
    events = found.events
    more = f"<p>and {len(events) - MOST_EVENTS} more, in records.jsonl</p>" if len(events) > MOST_EVENTS else ""
    return table(["round", "event"], [[str(at), text(said)] for at, said in events[:MOST_EVENTS]], words=(0, 1)) + more


def _shorten(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
