"""The page of a report: one HTML file that holds tables, figures and settings and asks for nothing.

Styles, script and figures are in the file; a policy in it forbids the browser any request.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from matplotlib.figure import Figure

from espnet_kv.report.columns import MISSING, Column, Table, tables
from espnet_kv.report.figures import Plot, inline_svg
from espnet_kv.report.looks import Entry, size
from espnet_kv.report.models import Notes

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(
    title: str,
    entries: Sequence[Entry],
    notes: Notes,
    figures: Iterable[tuple[Plot, Figure, Figure]],
    command: str,
) -> str:
    """The whole HTML document.

    Args:
        figures: each with its wide and its narrow (for telephones) drawing.
        command: what made the report.
    """
    overview, *others = tables([entry.profile for entry in entries])
    drawn = list(figures)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n<body>",
        f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(_summary(entries))}</p>",
        _navigation(drawn, others),
        '</header>\n<main>\n<section id="overview">\n<h2>Overview</h2>',
        _shared(notes),
        _notes(notes),
        _table(overview, entries, notes),
        "</section>",
        *([_figures(drawn, overview, others, entries)] if drawn else []),
        '<section id="tables">\n<h2>Tables</h2>',
        *(
            f'<h3 id="{_anchor(table)}">{escape(table.title)}</h3>\n{_about(table)}'
            + _table(_without_commands(table), entries, notes)
            for table in others
        ),
        "</section>",
        _commands(entries, command),
        f"</main>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _file(name: str) -> str:
    return files("espnet_kv.report").joinpath(name).read_text(encoding="utf-8")


def _summary(entries: Sequence[Entry]) -> str:
    """How many models, and from where to where their caches reach."""
    count = f"{len(entries)} models" if len(entries) > 1 else "One model"
    sizes = sorted(
        ((kinds.attention, e.name) for e in entries if (kinds := e.profile.allocated())),
    )
    if not sizes:
        return f"{count}. No cache was measured."
    (least, small), (most, large) = sizes[0], sizes[-1]
    said = f"{count}. The attention cache of one stream, allocated, is {size(least)} with {small}"
    return said + (f" and {size(most)} with {large}." if len(sizes) > 1 else ".")


def _navigation(drawn: Sequence[tuple[Plot, Figure, Figure]], others: Sequence[Table]) -> str:
    links = [("overview", "Overview")]
    links += [("figures", "Figures")] if drawn else []
    links += [(_anchor(table), table.title) for table in others]
    links.append(("commands", "Commands"))
    inner = "\n".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    return f'<nav aria-label="Contents">\n{inner}\n</nav>'


def _anchor(table: Table) -> str:
    return table.title.lower().replace(" ", "-")


def _about(table: Table) -> str:
    return f'<p class="about">{escape(table.about)}</p>\n' if table.about else ""


def _shared(notes: Notes) -> str:
    pairs = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in notes.shared.items()
    )
    return f'<dl class="settings">\n{pairs}\n</dl>' if pairs else ""


def _notes(notes: Notes) -> str:
    items = "\n".join(
        f'<li id="note-{n}">{escape(text)}</li>' for n, text in enumerate(notes.texts, 1)
    )
    return f'<ol class="notes">\n{items}\n</ol>' if items else ""


def _table(table: Table, entries: Sequence[Entry], notes: Notes) -> str:
    profiles = [entry.profile for entry in entries]
    headings, cells = [_heading("model", "", "")], []
    for column in table.columns:
        kind = ' class="number"' if column.numeric(profiles) else ""
        headings.append(_heading(column.title, column.unit, kind))
        cells.append(_cells(column, entries, kind))
    rows = [
        f"<tr>{''.join([_name(entry, marks), *row])}</tr>"
        for entry, marks, *row in zip(entries, notes.marks, *cells, strict=True)
    ]
    label = escape(f"Table: {table.title}")
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{''.join(headings)}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>"
        "\n</table>\n</div>"
    )


def _heading(title: str, unit: str, kind: str) -> str:
    below = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<th scope="col" aria-sort="none"{kind}><button type="button">'
        f'<span class="title">{escape(title)}</span>{below}</button></th>'
    )


def _name(entry: Entry, marks: Sequence[int]) -> str:
    weights = entry.profile.model.weights
    tag = f'<span class="tag">{escape(weights)} weights</span>' if weights != "trained" else ""
    links = ",".join(f'<a href="#note-{mark}" title="note {mark}">{mark}</a>' for mark in marks)
    return (
        f'<th scope="row" data-value="{escape(entry.name)}"><span class="sign" '
        f'style="background:{entry.colour}"></span>{escape(entry.name)}'
        f"{f' <sup>{links}</sup>' if links else ''}{tag}</th>"
    )


def _cells(column: Column, entries: Sequence[Entry], kind: str) -> list[str]:
    profiles = [entry.profile for entry in entries]
    found = []
    for value, text in zip(map(column.value, profiles), column.shown(profiles), strict=True):
        if value is None:
            gone = kind.replace("number", "number missing") or ' class="missing"'
            found.append(f'<td{gone}><abbr title="missing">{MISSING}</abbr></td>')
        else:
            found.append(f'<td{kind} data-value="{escape(str(value))}">{escape(text)}</td>')
    return found


def _figures(
    drawn: Sequence[tuple[Plot, Figure, Figure]],
    overview: Table,
    others: Sequence[Table],
    entries: Sequence[Entry],
) -> str:
    columns = {c.key: c for table in (*others, overview) for c in table.columns}
    parts = []
    for plot, wide, narrow in drawn:
        alt = escape(f"{plot.title}. {_spoken(plot, columns, entries)}")
        parts.append(
            f'<figure class="card" id="{plot.stem}">\n<h3>{escape(plot.title)}</h3>\n'
            f"<figcaption>{escape(plot.about)}</figcaption>\n"
            + "\n".join(
                f'<div class="plot {which}" role="img" aria-label="{alt}">\n'
                f"{inline_svg(figure, f'{plot.stem}-{which}')}\n</div>"
                for which, figure in (("wide", wide), ("narrow", narrow))
            )
            + "\n</figure>"
        )
    inner = "\n".join(parts)
    heading = '<section id="figures">\n<h2>Figures</h2>'
    return f'{heading}\n<div class="figures">\n{inner}\n</div>\n</section>'


def _spoken(plot: Plot, columns: dict[str, Column], entries: Sequence[Entry]) -> str:
    """The figures that the plot is about, model by model, for those who do not see it."""
    profiles = [entry.profile for entry in entries]
    shown = [columns[key] for key in columns if key.startswith(plot.columns)]
    cells = [[f"{c.title} {text} {c.unit}".strip() for text in c.shown(profiles)] for c in shown]
    said = [f"{e.name}: {', '.join(row)}" for e, *row in zip(entries, *cells, strict=True)]
    return f"{plot.about} {'; '.join(said)}."


def _without_commands(table: Table) -> Table:
    return Table(table.title, [c for c in table.columns if c.key != "command"], table.about)


def _commands(entries: Sequence[Entry], command: str) -> str:
    made = [(entry.name, entry.profile.settings.command) for entry in entries]
    pairs = "\n".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>"
        for name, text in (*made, ("this page", command))
        if text
    )
    return (
        '<section id="commands">\n<h2>Commands</h2>\n<details class="card" open>\n'
        "<summary>Exactly what was run</summary>\n"
        f'<dl class="commands">\n{pairs}\n</dl>\n</details>\n</section>'
    )
