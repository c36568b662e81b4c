"""Results that appear whole or not at all, however a run ends."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espnet_kv.recipe.datadir import DataDir


@contextmanager
def new_directory(dst: Path) -> Iterator[Path]:
    """Yield an empty directory beside `dst` which replaces `dst` when the block succeeds.

    Paths stored inside the files must name `dst`, not the yielded directory.
    """
    partial = dst.with_name(f".{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if dst.exists():
            shutil.rmtree(dst)
        partial.rename(dst)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def add_data(data: DataDir, directory: Path) -> None:
    """Write the Kaldi files of `data` beside what `directory` holds already."""
    data.write(directory / "kaldi")  # DataDir.write replaces a whole directory
    for file in (directory / "kaldi").iterdir():
        file.replace(directory / file.name)
    (directory / "kaldi").rmdir()
