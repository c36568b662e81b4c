"""The card of a packed model: how to load it, and what was measured of it."""

import re
from pathlib import Path
from typing import Any

from espnet_kv.config import read_json
from espnet_kv.profile.schema import Profile, read_profile
from espnet_kv.scores import MISSING, interval_text, read_scores

USE = """## Use

The encoder or the decoder of this model is part of espnet_kv, not of ESPnet. Without
`import espnet_kv`, loading ends with `--encoder must be one of (...)` or `--decoder must be one
of (...)`.

```sh
pip install {package}
```

```python
import espnet_kv  # before a model is loaded
from {module} import Speech2Text

recognizer = Speech2Text.from_pretrained("{name}")
```"""
STREAMING = """

Audio as it arrives:

```python
from espnet_kv import StreamingRecognizer

chunks = {{"chunk_size": {chunk_size}, "left_chunks": {left_chunks}}}
recognizer = StreamingRecognizer.from_pretrained("{name}", **chunks)
```"""

ENCODER_OF_WHISPER = re.compile(r"^encoder: \S*whisper", re.MULTILINE)
"""In a config.yaml; such models do not stream."""


def front_matter(lang: str, corpus: str) -> str:
    """What the Hugging Face Hub reads at the beginning of a README.md."""
    tags = ["espnet", "audio", "automatic-speech-recognition"]
    lines = ["library_name: espnet", "tags:", *(f"- {tag}" for tag in tags)]
    if lang not in ("", "noinfo"):
        lines.append(f"language: {lang}")
    if corpus != "kaldi":  # data of the user's own, whose names are no names of a corpus
        lines += ["datasets:", f"- {corpus}"]
    return "\n".join(["---", *lines, "---"])


def usage(exp: Path, name: str) -> str:
    """How the model is loaded.

    Args:
        name: what from_pretrained takes.
    """
    profile = _profile(exp)
    chunks = {"chunk_size": 16, "left_chunks": 4}
    if profile is not None and profile.settings.chunk_size and profile.settings.left_chunks:
        chunks = {key: getattr(profile.settings, key) for key in chunks}
    config = exp / "config.yaml"
    if config.is_file() and ENCODER_OF_WHISPER.search(config.read_text(encoding="utf-8")):
        # ESPnet's own class fails with the openai-whisper of PyPI
        names = {"package": "'espnet_kv[whisper]'", "module": "espnet_kv.bin.asr_inference"}
        return USE.format(name=name, **names)
    names = {"package": "espnet_kv", "module": "espnet2.bin.asr_inference"}
    return (USE + STREAMING).format(name=name, **names, **chunks)


def figures(exp: Path) -> str:
    """Cache and error rates as stages 13 and 14 measured them, with commands and commits.

    Raises:
        UserError: a file of these stages is damaged.
    """
    profile = _profile(exp)
    parts = ["## Figures", *([] if profile is None else _cache(profile)), *_error_rates(exp)]
    if len(parts) == 1:
        parts.append("Nothing of this model was measured.")
    origins: dict[str, dict[str, Any]] = {
        "Trained": read_json(exp / "run.json"),
        "Converted": read_json(exp / "conversion.json"),
        "Profiled": {} if profile is None else profile.settings.model_dump(),
    }
    for what, record in origins.items():
        if record.get("command"):
            commit = f", commit {record['commit']}" if record.get("commit") else ""
            parts.append(f"{what} with `{record['command']}`{commit}.")
    return "\n\n".join(parts)


def _cache(profile: Profile) -> list[str]:
    rows, seconds = [], 0.0
    for cache_dtype, cache in profile.cache.items():
        longest = cache.longest
        if longest is not None and longest.bounded is not None:
            held, allocated = longest.bounded.bytes, longest.bounded.allocated
            shown = "" if allocated is None else f"{allocated.attention / 1000:.1f}"
            rows.append(f"| {cache_dtype} | {held.attention / 1000:.1f} | {shown} |")
            seconds = longest.seconds
    if not rows:
        return []
    settings = profile.settings
    note = (
        f"Attention cache of one stream after {seconds:g} s of audio, chunks of "
        f"{settings.chunk_size} frames, {settings.left_chunks} chunks of left context."
    )
    head = "| cache_dtype | held, kB | allocated, kB |\n|---|---:|---:|\n"
    return [note, head + "\n".join(rows)]


def _error_rates(exp: Path) -> list[str]:
    rows = [
        f"| {name} | {mode} | {row['wer']:.1f} | "
        f"{interval_text(row.get('wer_interval')) or MISSING} | {row['decoding']} |"
        for mode, sets in read_scores(exp).items()
        for name, row in sorted(sets.items())
        if row["wer"] is not None
    ]
    if not rows:
        return []
    head = "| test set | decoded | WER, % | 95 % interval | decoding |\n|---|---|---:|---:|---|\n"
    return [head + "\n".join(rows)]


def _profile(exp: Path) -> Profile | None:
    file = exp / "profile/profile.json"
    return read_profile(file) if file.exists() else None
