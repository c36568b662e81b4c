"""What stage 13 leaves of a decoding."""

from pathlib import Path


def score(decoding: Path, wer: float, cer: float | None = None) -> None:
    """What stage 13 leaves of a test set."""
    for kind, rate in (("wer", wer), ("cer", cer)):
        if rate is not None:
            file = decoding / f"score_{kind}/result.txt"
            file.parent.mkdir(parents=True)
            file.write_text(f"| Sum/Avg |  3  9 |  97.0  2.0  1.0  0.5  {rate}  30.0 |\n")
