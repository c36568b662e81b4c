"""Short hashes of file contents, stored between runs for files that do not change."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from espnet_kv.cli import progress
from espnet_kv.files import write_text
from espnet_kv.recipe.audio import file_of
from espnet_kv.recipe.datadir import DataDir

MISSING = "missing"
TICK_NS = 100_000_000


class Content:
    """Hashes of files and of the audio behind data directories.

    A hash is stored in `memory` with the file's size, times and inode, so that checking a large
    corpus costs one `stat` per file. A deleted file keeps its stored hash, because audio may be
    deleted after formatting.

    Args:
        memory: JSON file of stored hashes.
        threads: number of files to read in parallel.
        keep: whether to write `memory`.
    """

    def __init__(self, memory: Path, threads: int = 1, keep: bool = True) -> None:
        self._memory, self._threads, self._keep = memory, threads, keep
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        self._known: dict[str, list] = known if isinstance(known, dict) else {}
        self._audio: dict[Path, list] = {}

    def of_file(self, path: Path) -> str:
        """Hash of one file; MISSING if it does not exist."""
        return self._hashes([path], None)[0] if path.exists() else MISSING

    def of_audio(self, data_dir: Path) -> str:
        """Hash of all audio that a data directory names; MISSING without a wav.scp."""
        wav_scp = _status(data_dir / "wav.scp")
        if wav_scp is None:
            return MISSING
        # stages that change audio during a run also write a new wav.scp
        if self._audio.get(data_dir, [None])[0] != wav_scp:
            hashes = self._hashes(audio_files(data_dir), f"reading audio of {data_dir.name}")
            found = hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]
            self._audio[data_dir] = [wav_scp, found]
        return self._audio[data_dir][1]

    def _hashes(self, paths: Iterable[Path], label: str | None) -> list[str]:
        names = {path: os.path.abspath(path) for path in paths}
        status = {path: _status(path) for path in names}
        new = {
            path: seen
            for path, seen in status.items()
            if seen is not None and self._known.get(names[path], [None])[0] != seen
        }
        if label:
            _wait_until_settled(new.values())
        now = time.time_ns()
        counter = progress(label, len(new)) if label and len(new) > 1 else None
        with ThreadPoolExecutor(self._threads) as pool, counter or nullcontext():
            for (path, seen), found in zip(new.items(), pool.map(_hash, new), strict=True):
                # a very new file may change again within the resolution of its times
                settled = now - max(seen[1:3]) > TICK_NS
                self._known[names[path]] = [seen if settled else None, found]
                if counter is not None:
                    counter.update()
        # only hashes of audio are stored: hashing small files is faster than writing `memory`
        if new and label and self._keep:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._memory, json.dumps(self._known))
        return [self._known.get(name, [None, MISSING])[1] for name in names.values()]


def audio_files(data_dir: Path) -> list[Path]:
    """The sorted audio files in a data directory's wav.scp, without duplicates and commands."""
    data = DataDir.read(data_dir, allow_pipes=True)
    return sorted({Path(file) for entry in data.wav_scp.values() if (file := file_of(entry))})


def _wait_until_settled(seen: Iterable[list[int]]) -> None:
    """Wait until files written a moment ago are old enough for their hashes to be stored."""
    age = time.time_ns() - max((max(times[1:3]) for times in seen), default=0)
    # no wait for files dated in the future: their hashes are never stored
    if 0 <= age <= TICK_NS:
        time.sleep((TICK_NS - age) / 1e9 + 0.001)


def _status(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return MISSING
