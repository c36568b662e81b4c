"""Writing a report: table, figures, page, and scalars for TensorBoard."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, new_file, read_text, write_text
from espnet_kv.profile.schema import Profile
from espnet_kv.report.comparison import Entry, compare, entries
from espnet_kv.report.page import page
from espnet_kv.report.plots import PLOTS
from espnet_kv.report.style import style
from espnet_kv.report.table import Table, comparison_csv, joined, markdown, placed, plain, tables

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
    models = entries(profiles)
    parts = tables(models)
    notes = compare(models, joined(parts))
    try:
        text = read_text(results) if results.exists() else ""
        text = placed(text, title, markdown(models, parts[0], notes, command), results)
        write_text(output / "comparison.csv", comparison_csv(parts, notes))
        print(f"  drawing {len(models)} models", flush=True)
        drawn: dict[str, dict[str, Figure]] = {}
        for stem, draw in PLOTS.items():
            place = output / "figures" / stem
            with style():
                wide, narrow = draw(models, False), draw(models, True)
            if wide is None or narrow is None:
                for suffix in (".png", ".svg"):  # of an earlier report
                    place.with_suffix(suffix).unlink(missing_ok=True)
                continue
            save(wide, place)
            drawn[stem] = {"wide": wide, "narrow": narrow}
        write_scalars(models, parts, output / "tensorboard")
        write_text(output / "report.html", page(title, models, parts, notes, drawn, command))
        write_text(results, text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the report cannot be written: {error}") from error
    print(plain(parts[0], notes), flush=True)
    return output / "report.html"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `figure` as stem.png and stem.svg; the same figure gives the same files."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg")]
    for path in paths:
        with style(), matplotlib.rc_context({"svg.hashsalt": stem.name}), new_file(path) as partial:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(partial, dpi=180, metadata=metadata)
    return paths


def write_scalars(models: Sequence[Entry], parts: Sequence[Table], directory: Path) -> None:
    """Replace `directory` by event files with every number of the tables, and the curves.

    There is one run per model. The step of a number is 0, that of a point of a curve the seconds
    of audio or the minute.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds: it loads torch

    numbers = [part for part in parts if part.title not in ("Overview", "Settings")]
    with new_directory(directory) as partial:
        for entry in models:
            run = re.sub(r"[^\w.+-]+", "_", entry.name).strip("_")
            writer: Any = SummaryWriter(str(partial / run))
            for part in numbers:
                for key, value in part.values.loc[entry.name].items():
                    if isinstance(value, int | float):
                        writer.add_scalar(f"{part.anchor}/{key}", value, 0)
            for name, step, value in _curves(entry.profile):
                writer.add_scalar(f"growth/{name}", value, step)
            writer.close()


def _curves(profile: Profile) -> list[tuple[str, int, float]]:
    found: list[tuple[str, int, float]] = []
    for cache_dtype, cache in profile.cache.items():
        for length in cache.lengths:
            for side, held in (("bounded", length.bounded), ("unbounded", length.unbounded)):
                sizes = {"bytes": held.bytes, "allocated": held.allocated} if held else {}
                for what, kinds in sizes.items():
                    name = f"{side}_attention_{what}_{cache_dtype}"
                    found.append((name, round(length.seconds), kinds.attention))
    times = [(round(t.seconds), t.encode_ms) for t in profile.time.lengths]
    found += [("encode_ms", seconds, ms) for seconds, ms in times if ms is not None]
    return found + [("hour_chunk_ms", m.minute, m.chunk_ms) for m in profile.time.hour]
