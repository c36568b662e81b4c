"""Stub results of stages 12 and 13 for a decoding."""

import json
from pathlib import Path

WORDS = 10_000


def score(
    decoding: Path,
    wer: float,
    cer: float | None = None,
    *,
    streaming: bool = False,
    interval: float | None = None,
) -> None:
    """Write the files of a test set that later stages read; `interval`: to either side."""
    decoding.mkdir(parents=True)
    errors = {"wer": round(wer * WORDS / 100), "cer": round((cer or 0) * WORDS / 100)}
    scores = {
        kind: {"utterances": 3, "words": WORDS, "corr": WORDS - min(errors[kind], WORDS)}
        | {"sub": min(errors[kind], WORDS), "del": 0, "ins": max(0, errors[kind] - WORDS)}
        | {"err": errors[kind], "s_err": 1, "missing": 0}
        | ({} if interval is None else {"interval": [rate - interval, rate + interval]})
        for kind, rate in (("wer", wer), ("cer", cer))
        if rate is not None
    }
    (decoding / "scores.json").write_text(json.dumps({"streaming": streaming, **scores}))


def score_as_asr_sh(decoding: Path, wer: float, *, streaming: bool = False) -> None:
    """Write the files of ESPnet's asr.sh."""
    result = decoding / "score_wer/result.txt"
    result.parent.mkdir(parents=True)
    result.write_text(f"| Sum/Avg |  3  9 |  97.0  2.0  1.0  0.5  {wer}  30.0 |\n")
    log = decoding / "logdir/asr_inference.1.log"
    log.parent.mkdir()
    command = f"asr_inference{'_streaming' if streaming else ''}"
    log.write_text(f"# python3 -m espnet_kv -m espnet2.bin.{command} --ngpu 0\n")
