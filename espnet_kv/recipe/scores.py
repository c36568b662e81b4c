"""Error rates of a model, read back from what stage 13 wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.recipe.results import COLUMNS, figures

ERRORS = COLUMNS.index("Err")


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
        kind = scores["streaming" if "streaming" in decoding.name else "offline"]
        for result in sorted(decoding.glob("*/score_wer/result.txt")):
            row: dict[str, Any] = {"wer": _errors(result), "decoding": decoding.name}
            characters = result.parents[1] / "score_cer" / "result.txt"
            if characters.exists():
                row["cer"] = _errors(characters)
            kind.setdefault(result.parents[1].name, row)
    return scores


def _errors(result: Path) -> float:
    return float(figures(result)[ERRORS])
