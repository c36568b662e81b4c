"""Generated corpora as trees in LibriSpeech's layout, which are read like real data."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from espnet_kv.cli import progress
from espnet_kv.errors import UserError
from espnet_kv.recipe.audio import remove_unfinished, write_audio
from espnet_kv.recipe.pool import parallel_map

SAMPLE_RATE = 16000


class Utterance(Protocol):
    """One utterance to generate: id, words, and path of the audio relative to the tree."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def words(self) -> str: ...


def is_built(tree: Path, name: str, stamp: Mapping[str, Any]) -> bool:
    """Whether `tree` holds the corpus `name` with these options.

    Raises:
        UserError: `tree` has other contents, which must not be overwritten.
    """
    if not tree.is_dir():
        if tree.exists():
            raise UserError(f"{tree} is not a folder: move it away, or name another folder")
        return False
    if not any(tree.iterdir()):
        return False
    file = tree / f"{name}.json"
    if not file.is_file():
        raise UserError(f"{tree} is not a {name} corpus: move it away, or name another folder")
    try:
        return json.loads(file.read_text(encoding="utf-8")) == stamp
    except ValueError:  # truncated, e.g. by a full disk
        return False


def build_tree[Item: Utterance](
    tree: Path,
    name: str,
    stamp: Mapping[str, Any],
    utterances: Sequence[Item],
    render: Callable[[Item], np.ndarray],
    nj: int = 1,
) -> None:
    """Write the corpus `name` to the folder `tree` with `nj` processes, atomically.

    The output does not depend on `nj`. Existing contents are replaced (see `is_built`).

    Args:
        stamp: options and versions that affect the samples, written to `name`.json.
        render: utterance -> int16 samples (N,) at SAMPLE_RATE; picklable if nj > 1.

    Raises:
        UserError: a worker process was killed.
    """
    new = tree.with_name(f".{tree.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    transcripts: dict[Path, list[str]] = {}
    for utterance in utterances:
        chapter = new / utterance.path.parent
        file = chapter / f"{'-'.join(chapter.parts[-2:])}.trans.txt"
        transcripts.setdefault(file, []).append(f"{utterance.id} {utterance.words.upper()}\n")
    try:
        for file, lines in transcripts.items():
            file.parent.mkdir(parents=True)
            file.write_text("".join(lines), encoding="utf-8")
        with progress(name, len(utterances)) as counter:
            for _ in parallel_map(partial(_write, render, new), utterances, nj):
                counter.update()
        remove_unfinished(new)
        (new / f"{name}.json").write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        if tree.exists():
            shutil.rmtree(tree)
        os.replace(new, tree)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write[Item: Utterance](
    render: Callable[[Item], np.ndarray], tree: Path, utterance: Item
) -> None:
    write_audio(tree / utterance.path, render(utterance), SAMPLE_RATE)
