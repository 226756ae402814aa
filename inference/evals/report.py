"""Self-contained HTML pages of tables and plots, readable in light and dark; nothing in them is fetched."""

import hashlib
import html
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5f6670; --line: #d8dce1; --page: #ffffff; --row: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --soft: #9aa2ad; --line: #3a4048; --page: #16181b; --row: #1e2125; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
  max-width: 62rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.subtitle, figcaption, caption { color: var(--soft); } caption { text-align: left; padding-bottom: 0.4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.93rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
tbody tr:hover { background: var(--row); } .number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; color: var(--text); font-family: inherit; }
figure svg text { fill: currentColor; }
pre { overflow-x: auto; background: var(--row); padding: 0.8rem; } code { overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; }
"""


class Page:
    """An HTML page that grows from top to bottom.

    Args:
        title: Heading and window title.
        subtitle: A line under it.

    Examples:
        >>> page = Page("Scores", subtitle="one run")
        >>> page.table([{"task": "cloze", "acc": 0.5}], ["task", "acc"])
        >>> "<td>cloze</td>" in page.html()
        True
    """

    def __init__(self, title: str, *, subtitle: str | None = None) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{html.escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        """Add text whose spaces and line ends count."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(
        self,
        rows: Sequence[Mapping[str, Any] | Sequence[Any]],
        columns: Sequence[str] | Mapping[str, str],
        *,
        caption: str | None = None,
    ) -> None:
        """Add a table; see `table`."""
        self._parts.append(table(rows, columns, caption=caption))

    def plot(self, figure: "Figure", *, caption: str | None = None) -> None:
        """Add a matplotlib figure; see `plot`."""
        self._parts.append(plot(figure, caption=caption))

    def details(self, summary: str, content: str) -> None:
        """Add HTML (from `table` or `plot`) that is folded away under a line of text."""
        self._parts.append(f"<details><summary>{html.escape(summary)}</summary>{content}</details>")

    def html(self) -> str:
        """The whole page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style>"
        )
        body = "\n".join(self._parts)
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; an older one stays until the new one is whole."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(self.html(), encoding="utf-8")
        partial.replace(target)
        return target


def table(
    rows: Sequence[Mapping[str, Any] | Sequence[Any]],
    columns: Sequence[str] | Mapping[str, str],
    *,
    caption: str | None = None,
) -> str:
    """An HTML table.

    Args:
        rows: One mapping by column, or one sequence in the order of the columns, per row. Numbers are set right with
            four significant digits, None is a dash; give a string for any other form.
        columns: Column keys, or a mapping from keys to headings.
        caption: A line above the table.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {column: column for column in columns}
    cells = [[row.get(key) for key in headings] if isinstance(row, Mapping) else list(row) for row in rows]
    # a heading stands where its column's values stand
    numeric = [any(_is_number(row[i]) for row in cells) for i in range(len(headings))]
    head = "".join(
        f"<th{_class(right)}>{html.escape(str(text))}</th>"
        for text, right in zip(headings.values(), numeric, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(_is_number(cell))}>{_format(cell)}</td>" for cell in row) + "</tr>"
        for row in cells
    )
    line = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{line}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def plot(figure: "Figure", *, caption: str | None = None) -> str:
    """A matplotlib figure as inline SVG: its background is clear, and what is black takes the colour of the text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # text stays text: it is small, can be searched and takes the page's font
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tenfold"}):
        _clear_background(figure)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    line = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{_inline(buffer.getvalue())}{line}</figure>"


def _clear_background(figure: "Figure") -> None:
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0.0)


def _inline(svg: str) -> str:
    """Cut an SVG file down to what belongs inside HTML, with ids that no other figure of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"(stroke|fill): #000000", r"\1: currentColor", svg)
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _class(right: bool) -> str:
    return ' class="number"' if right else ""


def _format(cell: Any) -> str:
    if cell is None:
        return "\N{EN DASH}"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}" if not math.isfinite(cell) or abs(cell) < 1e4 else f"{cell:,.0f}"
    return html.escape(str(cell))
