"""Small recordings and contents of folders, for tests of the data stages."""

from pathlib import Path

import numpy as np

FS = 16000


def speech(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    """Noise within +-0.3: samples (seconds * FS,) in float32."""
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * FS)).astype("f4")


def content(directory: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files in `directory`."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
