"""Doing a step once: skipped while its inputs and settings stay the same, else redone."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from espnet_kv.recipe.atomic import write_text

STAMP = ".done.json"


def once(
    out: Path, build: Callable[[], object], inputs: Iterable[Path] = (), **settings: Any
) -> bool:
    """Call `build`, which makes the directory `out`, unless it has been made from the same.

    The stamp is written after `build` returns, so a step that was cut off is redone.

    Args:
        out: directory that holds the stamp.
        inputs: files, and data directories, that the result depends on.
        settings: options that it depends on (JSON types).

    Returns:
        Whether `build` ran.
    """
    made_from = {"settings": settings, "inputs": {str(path): digest(path) for path in inputs}}
    stamp = out / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        print(f"  {out} is up to date")
        return False
    stamp.unlink(missing_ok=True)
    build()
    write_text(stamp, json.dumps(made_from, indent=1) + "\n")
    return True


def digest(path: Path) -> str:
    """Hash of a file, or of the text files that make a data directory what it is."""
    sha = hashlib.sha256()
    if path.is_dir():
        files = [path / name for name in ("wav.scp", "text", "utt2spk", "tokens.txt", "bpe.model")]
    else:
        files = [path]
    for file in files:
        if file.exists():
            sha.update(file.read_bytes())
    return sha.hexdigest()[:16]
