"""The card of a packed model: how to load it, and what was measured of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError, one_line
from espnet_kv.scores import read_scores

USE = """## Use

The encoder or the decoder of this model is part of espnet_kv, not of ESPnet. Without
`import espnet_kv`, loading ends with `--encoder must be one of (...)` or `--decoder must be one
of (...)`.

```sh
pip install espnet_kv
```

```python
import espnet_kv  # before a model is loaded
from espnet2.bin.asr_inference import Speech2Text

recognizer = Speech2Text.from_pretrained("{name}")
```

Audio as it arrives:

```python
from espnet_kv import StreamingRecognizer

chunks = {{"chunk_size": {chunk_size}, "left_chunks": {left_chunks}}}
recognizer = StreamingRecognizer.from_pretrained("{name}", **chunks)
```"""


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
    settings = _profile(exp).get("settings", {})
    chunk_size, left_chunks = settings.get("chunk_size") or 16, settings.get("left_chunks")
    return USE.format(
        name=name, chunk_size=chunk_size, left_chunks=4 if left_chunks is None else left_chunks
    )


def figures(exp: Path) -> str:
    """Cache and error rates as stages 13 and 14 measured them, with commands and commits.

    Raises:
        UserError: a file of these stages is damaged.
    """
    profile, run = _profile(exp), _json(exp / "run.json")
    parts = ["## Figures", *_cache(profile), *_error_rates(exp)]
    if len(parts) == 1:
        parts.append("Nothing of this model was measured.")
    origin = _json(exp / "conversion.json")
    for what, record in (
        ("Trained", run),
        ("Converted", origin),
        ("Profiled", profile.get("settings", {})),
    ):
        if record.get("command"):
            commit = f", commit {record['commit']}" if record.get("commit") else ""
            parts.append(f"{what} with `{record['command']}`{commit}.")
    return "\n\n".join(parts)


def _cache(profile: Mapping[str, Any]) -> list[str]:
    rows = []
    try:
        for cache_dtype, cache in profile.get("cache", {}).items():
            longest = max(cache["lengths"], key=lambda length: length["seconds"])
            held = longest["bounded"]["bytes"]["attention"]
            allocated = (longest["bounded"].get("allocated") or {}).get("attention")
            shown = "" if allocated is None else f"{allocated / 1000:.1f}"
            rows.append(f"| {cache_dtype} | {held / 1000:.1f} | {shown} |")
        settings = profile.get("settings", {})
        chunk, left = settings.get("chunk_size"), settings.get("left_chunks")
        seconds = max((length["seconds"] for length in cache["lengths"]), default=0) if rows else 0
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the profile of {profile.get('name')} is damaged ({one_line(error)}): profile again "
            "(stage 14)"
        ) from error
    if not rows:
        return []
    note = (
        f"Attention cache of one stream after {seconds:g} s of audio, chunks of "
        f"{chunk} frames, {left} chunks of left context."
    )
    head = "| cache_dtype | held, kB | allocated, kB |\n|---|---:|---:|\n"
    return [note, head + "\n".join(rows)]


def _error_rates(exp: Path) -> list[str]:
    rows = [
        f"| {name} | {mode} | {row['wer']:.1f} | {row['decoding']} |"
        for mode, sets in read_scores(exp).items()
        for name, row in sorted(sets.items())
        if row["wer"] is not None
    ]
    if not rows:
        return []
    head = "| test set | decoded | WER, % | decoding |\n|---|---|---:|---|\n"
    return [head + "\n".join(rows)]


def _profile(exp: Path) -> dict[str, Any]:
    return _json(exp / "profile/profile.json")


def _json(file: Path) -> dict[str, Any]:
    """The keys of a file of an experiment; none where there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: expected keys and values")
    return content
