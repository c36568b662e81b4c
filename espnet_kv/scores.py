"""scores.json: the error rates of one decoded test set, written by stage 13 of the recipe.

    {"streaming": whether it was decoded with the streaming command,
     "cache_dtype": of its caches, null for the model's own type,
     "wer": {"utterances", "words", "corr", "sub", "del", "ins", "err", "s_err", "missing",
             "interval"},
     "cer": {...}, "ter": {...}}

All values of a kind but its interval are counts; the words of cer and ter are characters and
pieces. The interval is [low, high] of the error rate in per cent, see `error_interval`. A test set
that ESPnet's asr.sh scored has no such file; its rates are read from score_*/result.txt.
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
RESAMPLES, SEED = 2000, 0
"""Of the bootstrap behind every interval."""
MISSING = "–"  # noqa: RUF001  (an en dash)
"""Stands in tables where a figure is not known."""
MOST = 10**12
COUNTS = ("utterances", "words", "corr", "sub", "del", "ins", "err", "s_err")


@dataclass(frozen=True)
class Rates:
    """The rates of one kind.

    Attributes:
        utterances, words: their numbers in the reference.
        corr, sub, deleted, ins, err: per cent of the words.
        s_err: utterances with an error, per cent of the utterances.
        interval: 95 % interval of err, see `error_interval`; None: not known.
    """

    utterances: int
    words: int
    corr: float
    sub: float
    deleted: float
    ins: float
    err: float
    s_err: float
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, counts: Mapping[str, int], interval: tuple[float, float] | None = None) -> "Rates":
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
            interval=interval,
        )

    @property
    def percents(self) -> list[float]:
        """corr, sub, deleted, ins, err and s_err."""
        return [self.corr, self.sub, self.deleted, self.ins, self.err, self.s_err]


@dataclass(frozen=True)
class Scores:
    """The scores of one decoded test set.

    Attributes:
        how: the command and the type of its caches.
        rates: rates by kind, one of KINDS.
    """

    how: "Decoding"
    rates: Mapping[str, Rates]

    @property
    def mode(self) -> str:
        """offline, streaming, or streaming with another type of cache: streaming, int8 cache."""
        if not self.how.streaming:
            return "offline"
        return f"streaming, {dtype} cache" if (dtype := self.how.cache_dtype) else "streaming"


@dataclass(frozen=True)
class Decoding:
    """How a test set was decoded.

    streaming: with the streaming command. cache_dtype: None: the model's own type.
    """

    streaming: bool
    cache_dtype: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Decoding":
        """From a record with these keys.

        Raises:
            ValueError, LookupError: a value is missing or wrong.
        """
        streaming, cache_dtype = record["streaming"], record.get("cache_dtype")
        if not isinstance(streaming, bool):
            raise ValueError(f"streaming is {streaming!r}, not true or false")
        if cache_dtype is not None and not isinstance(cache_dtype, str):
            raise ValueError(f"cache_dtype is {cache_dtype!r}, not a name")
        return cls(streaming, cache_dtype)


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
        return Scores(decoded_how(directory), rates)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        how = Decoding.of(data)
        rates = {kind: _rates(data[kind], kind) for kind in KINDS if kind in data}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(file, one_line(error)) from error
    return Scores(how, rates)


def _rates(found: Mapping[str, Any], kind: str) -> Rates:
    """The rates of one kind in scores.json.

    Raises:
        ValueError, LookupError, TypeError: a value is missing or wrong.
    """
    for name in COUNTS:
        if type(count := found[name]) is not int or not 0 <= count <= MOST:
            raise ValueError(f"{kind}.{name} is {count!r:.40}, not an integer from 0 to {MOST}")
    if found["corr"] + found["sub"] + found["del"] != found["words"]:
        raise ValueError(f"{kind}: corr, sub and del do not add up to words")
    if found["sub"] + found["del"] + found["ins"] != found["err"]:
        raise ValueError(f"{kind}: sub, del and ins do not add up to err")
    if found["s_err"] > found["utterances"]:
        raise ValueError(f"{kind}: s_err is more than utterances")
    if (interval := found.get("interval")) is not None:  # absent in files of earlier versions
        low, high = map(float, interval)
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"{kind}.interval is {interval!r}, not two rates in ascending order")
        interval = low, high
    return Rates.of(found, interval)


def decoded_how(directory: Path) -> Decoding:
    """How a test set was decoded.

    This is in the record of stage 12, or in the log of the command if ESPnet's asr.sh decoded.

    Raises:
        UserError: the record is damaged.
    """
    record, log = directory / RECORD, directory / "logdir" / "asr_inference.1.log"
    if record.exists():
        try:
            return Decoding.of(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{record} is damaged: run stage 12 again") from error
    if not log.exists():
        return Decoding(streaming=False)
    with log.open(encoding="utf-8", errors="replace") as lines:
        head = "".join(line for line, _ in zip(lines, range(20), strict=False))
    if re.search(r"asr_inference_streaming\b", head) is None:
        return Decoding(streaming=False)
    given = re.findall(r"--cache_dtype[ =]['\"]?(\w+)", head)
    return Decoding(True, other_cache(given[-1] if given else None))


def other_cache(cache_dtype: str | None) -> str | None:
    """`cache_dtype` if it is another type than that of the models that the recipe trains."""
    return None if cache_dtype in (None, "fp32") else cache_dtype


def error_interval(errors: Sequence[int], words: Sequence[int]) -> tuple[float, float] | None:
    """95 % interval of an error rate in per cent, by bootstrap over utterances.

    The utterances are drawn RESAMPLES times with replacement; the interval holds the middle 95 %
    of the rates. Errors within an utterance depend on each other, so words are not drawn.

    Args:
        errors, words: numbers of each utterance.

    Returns:
        Lower and upper bound; None with fewer than two utterances or without words.
    """
    if len(errors) < 2 or not any(words):
        return None

    import numpy
    from scipy.stats import bootstrap  # takes half a second

    def rate(errors: Any, words: Any, axis: int) -> Any:
        return 100 * errors.sum(axis=axis) / numpy.maximum(words.sum(axis=axis), 1)

    found = bootstrap(
        (errors, words),
        rate,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        paired=True,
        method="percentile",
        rng=numpy.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def interval_text(interval: Sequence[float] | None) -> str:
    """5.1 to 9.0; empty if the interval is not known."""
    return f"{interval[0]:z.1f} to {interval[1]:z.1f}" if interval else ""


def rate_text(rate: float, interval: Sequence[float] | None) -> str:
    """7.0 (5.1 to 9.0), or 7.0 if the interval is not known."""
    return f"{rate:z.1f} ({said})" if (said := interval_text(interval)) else f"{rate:z.1f}"


def _sclite(result: Path) -> Rates:
    """The rates in the line Sum/Avg of a result.txt in sclite's format.

    The interval is made from the counts of each utterance, which are below the table if sclite
    was asked for its alignments.
    """
    try:
        text = result.read_text(encoding="utf-8")
        for line in text.splitlines():
            name, _, rest = line.strip("| ").partition("|")
            figures = rest.replace("|", " ").split()
            if name.strip() == "Sum/Avg" and len(figures) == len(COUNTS):
                utterances, words = map(int, figures[:2])
                corr, sub, deleted, ins, err, s_err = map(float, figures[2:])
                interval = _sclite_interval(text)
                return Rates(utterances, words, corr, sub, deleted, ins, err, s_err, interval)
    except (OSError, ValueError) as error:
        raise _damaged(result, one_line(error)) from error
    raise UserError(f"{result} has no line Sum/Avg: remove it and score again (stage 13)")


def _sclite_interval(text: str) -> tuple[float, float] | None:
    lines = re.findall(r"^Scores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)$", text, re.MULTILINE)
    aligned = [tuple(map(int, counts)) for counts in lines]
    words = [hits + subs + dels for hits, subs, dels, _ in aligned]
    return error_interval([sum(wrong) for _, *wrong in aligned], words)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}): remove it and score again (stage 13)")


def read_scores(experiment: Path, preferred: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Mode -> test set -> {"wer", "wer_interval", "cer", "cer_interval", "decoding"}, in per cent.

    The modes are those of `Scores.mode`; what is not known is absent. If there are several
    decodings of one mode, the first of `preferred` is used, else the one with the shortest name,
    which has the fewest extra options.

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
        row: dict[str, Any] = {"decoding": decoding}
        for kind in ("wer", "cer"):
            if kind in scored.rates:
                row[kind] = _known(scored.rates[kind])
                if interval := scored.rates[kind].interval:
                    row[f"{kind}_interval"] = list(interval)
        scores.setdefault(scored.mode, {}).setdefault(name, row)
    return scores


def _known(rates: Rates) -> float | None:
    """The error rate; None if it is infinite (errors, but no words in the reference)."""
    return rates.err if math.isfinite(rates.err) else None
