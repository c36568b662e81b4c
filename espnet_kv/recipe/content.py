"""Short hashes of file contents, stored between runs for files that do not change."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

from espnet_kv.cli import progress
from espnet_kv.files import new_file
from espnet_kv.recipe.audio import file_of
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.disk_table import Table

MISSING = "missing"
TICK_NS = 100_000_000
BATCH = 1024
"""Files that are hashed at a time."""


class Content:
    """Hashes of files and of the audio behind data directories.

    A hash is stored in `memory` with the file's size, times and inode, so that checking a large
    corpus costs one `stat` per file. A deleted file keeps its stored hash, because audio may be
    deleted after formatting.

    Args:
        memory: file of the stored hashes, a JSON list in each line.
        threads: number of files to read in parallel.
        keep: whether to write `memory`.
    """

    def __init__(self, memory: Path, threads: int = 1, keep: bool = True) -> None:
        self._memory, self._threads, self._keep = memory, threads, keep
        self._known: Table[list] | None = None
        self._files: dict[Path, list] = {}
        self._audio: dict[Path, list] = {}

    def of_file(self, path: Path) -> str:
        """Hash of one file; MISSING if it does not exist."""
        seen, now = _status(path), time.time_ns()
        if seen is None:
            return MISSING
        if self._files.get(path, [None])[0] != seen:
            self._files[path] = [seen if _is_settled(seen, now) else None, _hash(path)]
        return self._files[path][1]

    def of_audio(self, data_dir: Path) -> str:
        """Hash of all audio that a data directory names; MISSING without a wav.scp."""
        wav_scp = _status(data_dir / "wav.scp")
        if wav_scp is None:
            return MISSING
        # stages that change audio during a run also write a new wav.scp
        if self._audio.get(data_dir, [None])[0] != wav_scp:
            found = self._hash_all(_audio(data_dir), f"reading audio of {data_dir.name}")
            self._audio[data_dir] = [wav_scp, found]
        return self._audio[data_dir][1]

    def _hash_all(self, audio: Table[None], label: str) -> str:
        known, new = self._stored(), Table[list[int]]()
        for path in _paths(audio):
            name = os.path.abspath(path)
            seen = _status(name)
            if seen is not None and known.get(name, [None])[0] != seen:
                new[name] = seen
        number = len(new)
        counter = progress(label, number) if number > 1 else None
        with ThreadPoolExecutor(self._threads) as pool, counter or nullcontext():
            for batch in itertools.batched(new.items(), BATCH):
                _wait_until_settled(seen for _, seen in batch)
                now = time.time_ns()
                names = [name for name, _ in batch]
                for (name, seen), found in zip(batch, pool.map(_hash, names), strict=True):
                    known[name] = [seen if _is_settled(seen, now) else None, found]
                    if counter is not None:
                        counter.update()
        if number and self._keep:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._memory) as file, file.open("w", encoding="utf-8") as out:
                for name, hashed in known.items():
                    out.write(json.dumps([name, *hashed]) + "\n")
        digest, separator = hashlib.sha256(), ""
        for path in _paths(audio):
            hashed = known.get(os.path.abspath(path), [None, MISSING])
            digest.update(f"{separator}{hashed[1]}".encode())
            separator = "\n"
        return digest.hexdigest()[:16]

    def _stored(self) -> Table[list]:
        if self._known is None:
            self._known = Table()
            with suppress(OSError, ValueError), self._memory.open(encoding="utf-8") as lines:
                for line in lines:
                    found = json.loads(line)
                    # older versions wrote one object
                    self._known.update(found if isinstance(found, dict) else {found[0]: found[1:]})
        return self._known


def audio_files(data_dir: Path) -> Iterator[Path]:
    """The sorted audio files in a data directory's wav.scp, without duplicates and commands."""
    return _paths(_audio(data_dir))


def _audio(data_dir: Path) -> Table[None]:
    data = DataDir.read(data_dir, allow_pipes=True, on_disk=True)
    files = Table[None]()
    for entry in data.wav_scp.values():
        if file := file_of(entry):
            # so that they are sorted folder by folder, as paths are
            files[str(Path(file)).replace("/", "\0")] = None
    return files


def _paths(audio: Table[None]) -> Iterator[Path]:
    return (Path(key.replace("\0", "/")) for key in audio)


def _is_settled(seen: list[int], now: int) -> bool:
    """Whether a file cannot change any more within the resolution of its times."""
    return now - max(seen[1:3]) > TICK_NS


def _wait_until_settled(seen: Iterable[list[int]]) -> None:
    """Wait until files written a moment ago are old enough for their hashes to be stored."""
    age = time.time_ns() - max((max(times[1:3]) for times in seen), default=0)
    # no wait for files dated in the future: their hashes are never stored
    if 0 <= age <= TICK_NS:
        time.sleep((TICK_NS - age) / 1e9 + 0.001)


def _status(path: Path | str) -> list[int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hash(path: Path | str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return MISSING
