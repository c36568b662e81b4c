"""Error rates of a model, read back from what stage 13 wrote."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.recipe.results import read_rate

RECORD = "decoding.json"
"""What a decoding says of itself, beside its results."""


def read_scores(experiment: Path, preferred: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{"offline", "streaming"} -> test set -> {"wer", "cer", "decoding"}, in per cent.

    Of several decodings of one kind the first of the preferred counts, else the one of the
    shortest name: options that were given lengthen it.

    Raises:
        UserError: a score file is damaged.
    """
    scores: dict[str, dict[str, Any]] = {"offline": {}, "streaming": {}}
    order = {name: rank for rank, name in enumerate(dict.fromkeys(preferred))}
    ranked = sorted(
        (path for path in experiment.glob("decode_*") if path.is_dir()),
        key=lambda path: (order.get(path.name, len(order)), len(path.name), path.name),
    )
    for decoding in ranked:
        kind = scores["streaming" if is_streaming(decoding) else "offline"]
        for result in sorted(decoding.glob("*/score_wer/result.txt")):
            row: dict[str, Any] = {"wer": read_rate(result.parent), "decoding": decoding.name}
            characters = result.parents[1] / "score_cer"
            if (characters / "result.txt").exists():
                row["cer"] = read_rate(characters)
            kind.setdefault(result.parents[1].name, row)
    return scores


def is_streaming(decoding: Path) -> bool:
    """Whether the test sets below a decoding's directory were decoded as streams.

    That is read off its record or, where ESPnet's asr.sh decoded, off the command in its log.
    """
    for record in decoding.glob(f"*/{RECORD}"):
        try:
            return bool(json.loads(record.read_text(encoding="utf-8"))["streaming"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} is damaged: run stage 12 again") from error
    for log in decoding.glob("*/logdir/asr_inference.1.log"):
        with log.open(encoding="utf-8", errors="replace") as lines:
            head = "".join(line for line, _ in zip(lines, range(20), strict=False))
        return re.search(r"asr_inference_streaming\b", head) is not None
    return False
