"""Writing a report: CSV, Markdown, figures, page, TensorBoard."""

from collections.abc import Sequence
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.files import write_text
from espnet_kv.report.board import write_scalars
from espnet_kv.report.figures import PLOTS, save
from espnet_kv.report.looks import Entry, style
from espnet_kv.report.models import compare, names, ordered
from espnet_kv.report.page import page
from espnet_kv.report.profiles import Profile
from espnet_kv.report.tables import comparison_csv, markdown, placed, plain

TITLE = "KV caches compared"


def write_report(
    profiles: Sequence[Profile], output: Path, results: Path, title: str, command: str
) -> Path:
    """Write everything and print the table.

    Args:
        output: directory for report.html, comparison.csv, figures/ and tensorboard/.
        results: Markdown file that gets the table, between markers that name `title`.
        title: of the page.
        command: what made the report, stated in it.

    Returns:
        The page.

    Raises:
        UserError: a file cannot be written, or the markers in `results` are damaged.
    """
    profiles = ordered(profiles)
    called, notes = names(profiles), compare(profiles)
    entries = [Entry(*both) for both in zip(profiles, called, strict=True)]
    try:
        text = results.read_text(encoding="utf-8") if results.exists() else ""
        text = placed(text, title, markdown(profiles, called, notes, command), results)
        write_text(output / "comparison.csv", comparison_csv(profiles, called, notes))
        print(f"  drawing {len(profiles)} models", flush=True)
        drawn = []
        for plot in PLOTS:
            with style():
                wide, narrow = plot.draw(entries, False), plot.draw(entries, True)
            stem = output / "figures" / plot.stem
            if wide is None or narrow is None:
                for suffix in (".png", ".svg"):  # as an earlier report may have left it
                    stem.with_suffix(suffix).unlink(missing_ok=True)
                continue
            save(wide, stem)
            drawn.append((plot, wide, narrow))
        write_scalars(entries, output / "tensorboard")
        write_text(output / "report.html", page(title, entries, notes, drawn, command))
        write_text(results, text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the report cannot be written: {error}") from error
    print(plain(profiles, called, notes), flush=True)
    return output / "report.html"
