"""What stages 12 and 13 leave of a decoding."""

import json
from pathlib import Path


def score(decoding: Path, wer: float, cer: float | None = None, *, streaming: bool = False) -> None:
    """What they leave of a test set, as far as later stages read it."""
    for kind, rate in (("wer", wer), ("cer", cer)):
        if rate is not None:
            file = decoding / f"score_{kind}/result.txt"
            file.parent.mkdir(parents=True)
            file.write_text(f"| Sum/Avg |  3  9 |  97.0  2.0  1.0  0.5  {rate}  30.0 |\n")
    (decoding / "decoding.json").write_text(json.dumps({"streaming": streaming}))
