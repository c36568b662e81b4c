"""The comparison as text: CSV for programs, Markdown for RESULTS.md, columns for a terminal."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.report.columns import tables
from espnet_kv.report.models import Notes
from espnet_kv.report.profiles import Profile


def comparison_csv(profiles: Sequence[Profile], names: Sequence[str], notes: Notes) -> str:
    """Every column, values in base units (bytes, ms, per cent), unknown ones empty."""
    columns = {column.key: column for table in tables(profiles) for column in table.columns}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *columns, "notes"])
    for profile, name, marks in zip(profiles, names, notes.marks, strict=True):
        values = [column.value(profile) for column in columns.values()]
        said = "; ".join(notes.texts[mark - 1] for mark in marks)
        writer.writerow([name, *("" if value is None else value for value in values), said])
    return text.getvalue()


def markdown(profiles: Sequence[Profile], names: Sequence[str], notes: Notes, command: str) -> str:
    """The overview in Markdown: what all rows share, the table, the notes, the commands."""
    columns = tables(profiles)[0].columns
    marked = [
        _escaped(name) + (f" <sup>{','.join(map(str, marks))}</sup>" if marks else "")
        for name, marks in zip(names, notes.marks, strict=True)
    ]
    cells = [marked, *([_escaped(cell) for cell in c.shown(profiles)] for c in columns)]
    lines = [
        f"|{'|'.join(['model', *(_escaped(c.heading) for c in columns)])}|",
        f"|---|{'---:|' * len(columns)}",
        *(f"|{'|'.join(row)}|" for row in zip(*cells, strict=True)),
    ]
    numbered = [f"{n}. {_escaped(text)}" for n, text in enumerate(notes.texts, 1)]
    commands = [
        f"- {_escaped(name)}: {_code(said)}"
        for name, said in (
            *((name, p.settings.command) for name, p in zip(names, profiles, strict=True)),
            ("this table", command),
        )
        if said
    ]
    made = "<details><summary>Commands</summary>\n\n" + "\n".join(commands) + "\n\n</details>"
    parts = [_escaped(shared(notes)), "\n".join(lines), "\n".join(numbered), made]
    return "\n\n".join(part for part in parts if part)


def plain(profiles: Sequence[Profile], names: Sequence[str], notes: Notes) -> str:
    """The overview for a terminal, headings turned into a list so that the rows stay short."""
    columns = tables(profiles)[0].columns
    marked = [
        name + "".join(f" [{mark}]" for mark in marks)
        for name, marks in zip(names, notes.marks, strict=True)
    ]
    headings = ["", *(f"({n})" for n in range(1, len(columns) + 1))]
    cells = zip(marked, *(c.shown(profiles) for c in columns), strict=True)
    rows = [headings, *map(list, cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"({n}) {column.heading}" for n, column in enumerate(columns, 1)]
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
    return "\n".join([*lines, *(f"[{n}] {text}" for n, text in enumerate(notes.texts, 1))])


def shared(notes: Notes) -> str:
    """The settings that all rows have in common, in one line."""
    return ", ".join(f"{name} {value}" for name, value in notes.shared.items())


def placed(text: str, title: str, block: str, path: Path) -> str:
    """`text`, of the file `path`, with `block` between the markers of `title`; added at the end.

    Raises:
        UserError: a marker stands there twice or without the other.
    """
    name = title.replace("--", "-").replace(">", "")
    begin, end = f"<!-- comparison: {name} -->", f"<!-- /comparison: {name} -->"
    whole = f"{begin}\n{block}\n{end}"
    if (text.count(begin), text.count(end)) == (0, 0):
        return f"{text.rstrip()}\n\n{whole}\n".lstrip()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or not found:
        raise UserError(f"{path}: keep one line {begin} and below it one line {end}, or neither")
    return before + whole + after


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{' '.join(text.split())}{fence}"


def _escaped(text: str) -> str:
    """`text` as it is, in a cell of a Markdown table."""
    text = " ".join(text.split(" ")).replace("\n", " ").replace("&", "&amp;")
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
