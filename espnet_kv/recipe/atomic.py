"""Data directories that appear whole or not at all, beside what `espnet_kv.atomic` has."""

from pathlib import Path

from espnet_kv.atomic import new_directory, write_text
from espnet_kv.recipe.datadir import DataDir

__all__ = ["add_data", "new_directory", "write_text"]


def add_data(data: DataDir, directory: Path) -> None:
    """Write the Kaldi files of `data` beside what `directory` holds already."""
    data.write(directory / "kaldi")  # DataDir.write replaces a whole directory
    for file in (directory / "kaldi").iterdir():
        file.replace(directory / file.name)
    (directory / "kaldi").rmdir()
