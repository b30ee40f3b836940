"""What pages are made of: the page itself, its sections, figures and tables, without scripts and links to other files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedsieve.errors import UsageError
from fedsieve.report.plots import VARIABLES, with_ids
from fedsieve.report.records import show
from fedsieve.report.table import printable

_DARK = {
    **{"ink": "#e8ebee", "muted": "#a3adb8", "rule": "#343b43", "paper": "#14181d"},
    **{"hue0": "#5ab4ec", "hue1": "#ff9057", "hue2": "#3ecb9f", "hue3": "#e392cf", "hue4": "#e6b84a", "hue5": "#c3cad2"},
}


def write(path: Path, content: str) -> None:
    """Write a page so that a crash leaves the old one or the new one.

    Raises:
        UsageError: it cannot be written there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content, encoding="utf-8", newline="\n")
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Give a file in a folder that you may write to."
        ) from error


FOOTER = (
    "Accuracy is measured on test examples, or where data.validation is set on training examples that were held out. A megabyte"
    " (MB) is a million bytes. Bytes are the lengths of the messages carried; evaluation is not counted in the totals."
    " Density is the share of the prunable weights that are kept."
)


def page(title: str, parts: Sequence[str], footer: str = FOOTER) -> str:
    """Return a whole page of parts that are HTML already; the plots get ids of their own."""
    body = "\n".join(part for part in parts if part)
    counter = iter(range(1, 1000))
    body = re.sub(r'(<svg class="plot".*?</svg>)', lambda found: with_ids(found[1], f"p{next(counter)}-"), body, flags=re.S)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>\n{_style()}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n"
        f"<footer>{text(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    light = "".join(f"--{name}:{colour};" for colour, name in VARIABLES.items())
    dark = "".join(f"--{name}:{colour};" for name, colour in _DARK.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_CSS}"


_CSS = """\
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1200px;margin:0 auto;padding:32px 24px 48px}
header{margin-bottom:24px}
header p{margin:0;max-width:96ch;color:var(--muted)}
header code{color:var(--ink)}
.kicker{font-size:14px;color:var(--muted)}
h1{margin:2px 0 6px;font-size:30px;line-height:1.2;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{margin:0 0 16px;padding-top:14px;border-top:1px solid var(--rule);font-size:20px;line-height:1.3}
section{margin-top:24px}
.columns{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:32px 40px;align-items:start}
.status{font-weight:600;color:var(--ink)}
.status::before{content:"";display:inline-block;width:.6em;height:.6em;margin-right:.4em;border-radius:50%;background:var(--tone)}
.good{--tone:var(--hue2)}.fair{--tone:var(--hue4)}.bad{--tone:var(--hue1)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:14px 20px;margin:0;
padding:14px 0;border-top:1px solid var(--rule)}
.tiles dt{font-size:14px;color:var(--muted)}
.tiles dd{margin:0}
.tiles dd.value{font-size:28px;line-height:1.25;font-weight:600;letter-spacing:-.01em;white-space:nowrap}
.tiles small{font-size:16px;font-weight:400;color:var(--muted);letter-spacing:0}
.tiles dd.note{font-size:13px;color:var(--muted);line-height:1.4}
figure{margin:0;break-inside:avoid}
.columns figure{display:grid;grid-template-rows:subgrid;grid-row:span 2;row-gap:0}
.columns{row-gap:0}.columns figure{margin-bottom:20px}
h3{margin:0;font-size:16px;line-height:1.35}
figcaption p{margin:2px 0 8px;font-size:14px;line-height:1.45;color:var(--muted)}
svg.plot{display:block;width:100%;height:auto;overflow:visible}
svg.plot image{image-rendering:pixelated}
.broad svg.plot{min-width:760px}
.tradeoff{padding-top:14px;border-top:1px solid var(--rule)}
.tradeoff h3{font-size:20px}
.front p{margin:12px 0 4px;font-size:14px;color:var(--muted)}
.front ol{margin:0;padding:0;list-style:none;columns:2;column-gap:40px}
.front li{padding:3px 0;break-inside:avoid}
.none{margin:0;padding:32px 16px;border:1px dashed var(--rule);color:var(--muted);text-align:center}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;line-height:1.4}
table.wide{width:100%}
th,td{padding:5px 20px 5px 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;font-size:14px;color:var(--muted);border-bottom-color:var(--muted);vertical-align:bottom}
tbody th{font-weight:400}
.wide tbody th{min-width:8em}
td.n,th.n{text-align:right;white-space:nowrap}
td.any{overflow-wrap:anywhere}
tr.sum td,tr.sum th{font-weight:600;border-bottom:0;border-top:1px solid var(--muted)}
.key{display:flex;flex-wrap:wrap;gap:2px 22px;margin:32px 0 -12px;padding:8px 0;background:var(--paper);font-size:14px;
border-bottom:1px solid var(--rule)}
.key span{display:inline-flex;align-items:center;gap:7px}
.mark{display:inline-flex;align-items:center;gap:7px;font-weight:700;margin-right:8px;white-space:nowrap}
.name{white-space:nowrap}
.swatch{width:26px;height:10px;flex:none}
.swatch.box{width:12px;height:12px}
.swatch.dot{width:16px;height:16px}
figcaption .phases{display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--ink)}
.phases span{display:inline-flex;align-items:center;gap:6px}
details{margin-top:16px}
summary{cursor:pointer;padding:6px 0;font-weight:600}
pre{margin:6px 0;padding:12px 14px;overflow-x:auto;border:1px solid var(--rule);font:13px/1.5 ui-monospace,SFMono-Regular,
Menlo,Consolas,monospace}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em}
footer{margin-top:40px;padding-top:12px;border-top:1px solid var(--rule);font-size:13px;color:var(--muted)}
@media (min-width:801px) and (min-height:600px){.key{position:sticky;top:0;z-index:1}}
@media (max-width:800px){.columns{grid-template-columns:minmax(0,1fr)}main{padding:20px 16px 32px}h1{font-size:24px}
.tiles{grid-template-columns:repeat(2,1fr)}.tiles dd.value{font-size:24px}.front ol{columns:1}}
@media print{body{font-size:11pt}main{max-width:none;padding:0}section{margin-top:20px}h2,h3{break-after:avoid}
.key{position:static}.broad svg.plot{min-width:0}}
"""


def section(title: str, parts: Sequence[str], *, columns: bool = True) -> str:
    """Return a section of figures in two columns, or of other parts below one another; nothing if there are none."""
    found = "\n".join(part for part in parts if part)
    if not found:
        return ""
    found = f'<div class="columns">\n{found}\n</div>' if columns else found
    return f"<section>\n<h2>{text(title)}</h2>\n{found}\n</section>"


def figure(title: str, caption: str, drawing: str, above: str = "", *, wide: bool = False) -> str:
    """Return a plot or a table under its title; without a drawing the caption says why there is none.

    A wide one takes the whole width of the page, and is scrolled where that is small.
    """
    if not drawing:
        return f'<figure><figcaption><h3>{text(title)}</h3></figcaption><p class="none">{text(caption)}</p></figure>'
    if drawing.startswith("<svg "):
        said = text(f"{title}. {caption}")
        drawing = f'<svg class="plot" role="img" aria-label="{said}" {drawing.removeprefix("<svg ")}'
    if wide:
        drawing = f'<div class="scroll broad">{drawing}</div>'
    return f"<figure><figcaption><h3>{text(title)}</h3><p>{text(caption)}</p>{above}</figcaption>{drawing}</figure>"


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, words: Sequence[int] = (0,), last_is_sum: bool = False) -> str:
    """Return a table of cells that are HTML already; columns not in `words` are numbers, aligned to the right."""
    kind = ["" if i in words else ' class="n"' for i in range(len(head))]
    lines = ["<tr>" + "".join(f'<th scope="col"{k}>{cell}</th>' for k, cell in zip(kind, head, strict=True)) + "</tr>"]
    for i, row in enumerate(body):
        total = ' class="sum"' if last_is_sum and i == len(body) - 1 else ""
        cells = "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind[1:], row[1:], strict=True))
        lines.append(f'<tr{total}><th scope="row">{row[0]}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="wide"><thead>{lines[0]}</thead><tbody>{"".join(lines[1:])}</tbody></table></div>'


def tiles(cells: Sequence[tuple[str, str, str, str]]) -> str:
    """Return figures to be seen at once: each a title, a value, its unit and a note."""
    each = "".join(
        f'<div><dt>{text(title)}</dt><dd class="value">{text(value)}{f" <small>{text(unit)}</small>" if unit else ""}</dd>'
        f'<dd class="note">{text(note)}</dd></div>'
        for title, value, unit, note in cells
    )
    return f'<dl class="tiles">{each}</dl>'


def pairs(cells: dict[str, Any]) -> str:
    """Return a table of keys and values."""
    lines = "".join(f'<tr><th scope="row">{text(k)}</th><td class="any">{text(show(v))}</td></tr>' for k, v in cells.items())
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'


def text(value: Any) -> str:
    """Return a value as text of a page, on one line."""
    return escape(printable(str(value)), quote=True)
