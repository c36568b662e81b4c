"""scores.json: the error rates of one decoded test set, written by stage 13 of the recipe.

    {"streaming": whether it was decoded with the streaming command,
     "wer": {"utterances", "words", "corr", "sub", "del", "ins", "err", "s_err", "missing"},
     "cer": {...}, "ter": {...}}

All values are counts; the words of cer and ter are characters and pieces. A test set that ESPnet's
asr.sh scored has no such file; its rates are read from score_*/result.txt.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError, one_line

FILE, RECORD = "scores.json", "decoding.json"
"""Files beside the results of a decoding, written by stage 13 and stage 12."""
KINDS = ("wer", "cer", "ter")
COUNTS = ("utterances", "words", "corr", "sub", "del", "ins", "err", "s_err")


@dataclass(frozen=True)
class Rates:
    """The rates of one kind.

    Attributes:
        utterances, words: their numbers in the reference.
        corr, sub, deleted, ins, err: per cent of the words.
        s_err: utterances with an error, per cent of the utterances.
    """

    utterances: int
    words: int
    corr: float
    sub: float
    deleted: float
    ins: float
    err: float
    s_err: float

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> "Rates":
        """Compute the rates from COUNTS."""
        utterances, words = counts["utterances"], counts["words"]
        return cls(
            utterances=utterances,
            words=words,
            corr=percent(counts["corr"], words),
            sub=percent(counts["sub"], words),
            deleted=percent(counts["del"], words),
            ins=percent(counts["ins"], words),
            err=percent(counts["err"], words),
            s_err=percent(counts["s_err"], utterances),
        )

    @property
    def percents(self) -> list[float]:
        """corr, sub, deleted, ins, err and s_err."""
        return [self.corr, self.sub, self.deleted, self.ins, self.err, self.s_err]


@dataclass(frozen=True)
class Scores:
    """The scores of one decoded test set.

    Attributes:
        streaming: whether it was decoded with the streaming command.
        rates: rates by kind, one of KINDS.
    """

    streaming: bool
    rates: Mapping[str, Rates]


def percent(count: int, total: int) -> float:
    """count in per cent of total; infinite if only total is 0."""
    if total:
        return 100 * count / total
    return 0.0 if count == 0 else float("inf")


def scored_sets(experiment: Path, decodings: str = "*") -> Iterator[tuple[Path, Scores]]:
    """Yield the directory and the scores of each scored test set in EXPERIMENT/DECODING.

    As in ESPnet's recipes, a test set that is the validation set too is below org/.

    Args:
        decodings: glob pattern of decoding names.

    Raises:
        UserError: see `read_scored_set`.
    """
    found = set[Path]()
    for sets in (f"{decodings}/*", f"{decodings}/org/*"):
        found |= {path.parent for path in experiment.glob(f"{sets}/{FILE}")}
        for kind in KINDS:
            results = experiment.glob(f"{sets}/score_{kind}/result.txt")
            found |= {result.parents[1] for result in results}
    for directory in sorted(found):
        yield directory, read_scored_set(directory)


def decoding_of(test_set: Path) -> Path:
    """Directory of the decoding that the directory of a test set belongs to."""
    parent = test_set.parent
    return parent.parent if parent.name == "org" else parent


def read_scored_set(directory: Path) -> Scores:
    """The scores of one decoded test set.

    Raises:
        UserError: scores.json, or a result.txt if there is no scores.json, is damaged.
    """
    file = directory / FILE
    if not file.exists():
        results = {kind: directory / f"score_{kind}" / "result.txt" for kind in KINDS}
        rates = {kind: _sclite(result) for kind, result in results.items() if result.exists()}
        return Scores(is_streaming(directory), rates)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        streaming = data["streaming"]
        rates = {kind: Rates.of(data[kind]) for kind in KINDS if kind in data}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(file, one_line(error)) from error
    if not isinstance(streaming, bool):
        raise _damaged(file, f"streaming is {streaming!r}, not true or false")
    for kind in rates:
        for name in COUNTS:
            if type(count := data[kind][name]) is not int or count < 0:
                raise _damaged(file, f"{kind}.{name} is {count!r}, not an integer of 0 or more")
    return Scores(streaming, rates)


def is_streaming(directory: Path) -> bool:
    """Whether a test set was decoded with the streaming command.

    This is in the record of stage 12, or in the log of the command if ESPnet's asr.sh decoded.

    Raises:
        UserError: the record is damaged.
    """
    record, log = directory / RECORD, directory / "logdir" / "asr_inference.1.log"
    if record.exists():
        try:
            return bool(json.loads(record.read_text(encoding="utf-8"))["streaming"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{record} is damaged: run stage 12 again") from error
    if not log.exists():
        return False
    with log.open(encoding="utf-8", errors="replace") as lines:
        head = "".join(line for line, _ in zip(lines, range(20), strict=False))
    return re.search(r"asr_inference_streaming\b", head) is not None


def _sclite(result: Path) -> Rates:
    """The rates in the line Sum/Avg of a result.txt in sclite's format."""
    try:
        for line in result.read_text(encoding="utf-8").splitlines():
            name, _, rest = line.strip("| ").partition("|")
            figures = rest.replace("|", " ").split()
            if name.strip() == "Sum/Avg" and len(figures) == len(COUNTS):
                return Rates(*map(int, figures[:2]), *map(float, figures[2:]))
    except (OSError, ValueError) as error:
        raise _damaged(result, one_line(error)) from error
    raise UserError(f"{result} has no line Sum/Avg: remove it and score again (stage 13)")


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}): remove it and score again (stage 13)")


def read_scores(experiment: Path, preferred: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{"offline", "streaming"} -> test set -> {"wer", "cer", "decoding"}, in per cent.

    If there are several decodings of one kind, the first of `preferred` is used, else the one with
    the shortest name, which has the fewest extra options.

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
    """The error rate; None if it is infinite (errors, but no words in the reference)."""
    return rates.err if math.isfinite(rates.err) else None
