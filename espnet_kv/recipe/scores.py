"""Error rates of a model, of its preferred decodings."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.scorefile import RECORD as RECORD
from espnet_kv.scorefile import Rates, decoding_of, scored_sets


def read_scores(experiment: Path, preferred: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{"offline", "streaming"} -> test set -> {"wer", "cer", "decoding"}, in per cent.

    Of several decodings of one kind the first of the preferred counts, else the one of the
    shortest name: options that were given lengthen it.

    Raises:
        UserError: a score file is damaged.
    """
    scores: dict[str, dict[str, Any]] = {"offline": {}, "streaming": {}}
    order = {name: rank for rank, name in enumerate(dict.fromkeys(preferred))}

    def rank(decoding: str) -> tuple[int, int, str]:
        return order.get(decoding, len(order)), len(decoding), decoding

    found = [
        (decoding_of(place).name, place.name, scored)
        for place, scored in scored_sets(experiment)
        if "wer" in scored.rates
    ]
    for decoding, name, scored in sorted(found, key=lambda one: (*rank(one[0]), one[1])):
        row: dict[str, Any] = {"wer": _known(scored.rates["wer"]), "decoding": decoding}
        if "cer" in scored.rates:
            row["cer"] = _known(scored.rates["cer"])
        scores["streaming" if scored.streaming else "offline"].setdefault(name, row)
    return scores


def _known(rates: Rates) -> float | None:
    """The error rate; None where there are errors in a reference without a word."""
    return rates.err if math.isfinite(rates.err) else None
