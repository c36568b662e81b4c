"""The page of a report: one HTML file with tables, figures and settings, and no network access.

Styles, script and figures are within the file; its policy forbids the browser any request.
"""

import io
import re
from collections.abc import Mapping, Sequence

import jinja2
import matplotlib
from matplotlib.figure import Figure

from espnet_kv.report.comparison import Entry, Notes
from espnet_kv.report.style import GRID, INK, MUTED, PAPER, size, style
from espnet_kv.report.table import Table


def page(
    title: str,
    models: Sequence[Entry],
    parts: Sequence[Table],
    notes: Notes,
    figures: Mapping[str, Mapping[str, Figure]],
    command: str,
) -> str:
    """The whole HTML document.

    Args:
        parts: the tables, the overview first.
        figures: by the keys of PLOTS, each drawn "wide" and, for phones, "narrow".
        command: what made the report.
    """
    loader = jinja2.PackageLoader("espnet_kv", "report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawn = {
        stem: {width: inline_svg(drawing, f"{stem}-{width}") for width, drawing in both.items()}
        for stem, both in figures.items()
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        summary=_summary(models),
        models=models,
        parts=parts,
        notes=notes,
        figures=drawn,
        command=command,
    )


def _summary(models: Sequence[Entry]) -> str:
    """The number of models, and the smallest and largest cache."""
    count = f"{len(models)} models" if len(models) > 1 else "One model"
    held = [(e.profile.bounded(), e.name) for e in models]
    sizes = sorted((one.allocated.attention, name) for one, name in held if one)
    if not sizes:
        return f"{count}. No cache was measured."
    (least, small), (most, large) = sizes[0], sizes[-1]
    said = (
        f"{count}. The attention cache of one stream, allocated, takes {size(least)} with {small}"
    )
    return said + (f" and {size(most)} with {large}." if len(sizes) > 1 else ".")


def inline_svg(figure: Figure, prefix: str) -> str:
    """`figure` as an <svg> element that takes neutral colours and fonts from the page.

    Args:
        prefix: of every id, so that ids of two figures in a page differ.
    """
    text = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", svg)
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
