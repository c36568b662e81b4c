"""The scalars of a report for TensorBoard, a run for each model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.files import new_directory
from espnet_kv.report.columns import tables
from espnet_kv.report.looks import Entry


def write_scalars(entries: Sequence[Entry], directory: Path) -> None:
    """Replace `directory` by event files with every number of the tables, and the curves.

    The step of a number is 0, of a point of a curve the seconds of audio or the minute.
    """
    from torch.utils.tensorboard import SummaryWriter  # loads torch: seconds

    with new_directory(directory) as partial:
        for entry in entries:
            run = re.sub(r"[^\w.+-]+", "_", entry.name).strip("_")
            writer: Any = SummaryWriter(str(partial / run))
            for name, step, value in _scalars(entry):
                writer.add_scalar(name, value, step)
            writer.close()


def _scalars(entry: Entry) -> list[tuple[str, int, float]]:
    profile = entry.profile
    found = [
        (f"{table.title.lower().replace(' ', '_')}/{column.key}", 0, float(value))
        for table in tables([profile])[1:]
        if table.title != "Settings"
        for column in table.columns
        if isinstance(value := column.value(profile), int | float)
    ]
    for cache_dtype, cache in profile.cache.items():
        for length in cache.lengths:
            for side in ("bounded", "unbounded"):
                if held := getattr(length, side):
                    for what, kinds in (("bytes", held.bytes), ("allocated", held.allocated)):
                        name = f"growth/{side}_attention_{what}_{cache_dtype}"
                        if kinds is not None:
                            found.append((name, round(length.seconds), float(kinds.attention)))
    for time in profile.time.lengths:
        if time.encode_ms is not None:
            found.append(("growth/encode_ms", round(time.seconds), time.encode_ms))
    found += [("growth/hour_chunk_ms", m.minute, m.chunk_ms) for m in profile.time.hour]
    return found
