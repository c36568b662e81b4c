"""Counts of the utterances in the recipe's data sets after each stage."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.train import MODES

HEADINGS = ("set", "in", "dropped", "kept", "hours", "speakers", "trained on", "decoded", "scored")


@dataclass
class SetCount:
    """Counts of one data set; None: the stage has not been run.

    name: name of the set.
    utterances: utterances after stage 2, including those that were dropped.
    dropped: reason -> number of utterances dropped in stages 2 to 4.
    kept: utterances for training or decoding.
    seconds: duration of the kept utterances.
    speakers: speakers of the kept utterances.
    trained_on: utterances in the statistics, which training uses.
    decoded, scored: utterances decoded and scored in this run's decoding.
    """

    name: str
    utterances: int
    dropped: Counter[str] = field(default_factory=Counter)
    kept: int | None = None
    seconds: float | None = None
    speakers: int | None = None
    trained_on: int | None = None
    decoded: int | None = None
    scored: int | None = None

    def cells(self) -> list[str]:
        """The columns of HEADINGS."""
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(self.dropped.items()))
        dropped = f"{self.dropped.total()}" + (f" ({reasons})" if reasons else "")
        hours = "" if self.seconds is None else f"{self.seconds / 3600:.2f}"
        return [
            self.name,
            str(self.utterances),
            dropped,
            _shown(self.kept),
            hours,
            _shown(self.speakers),
            _shown(self.trained_on),
            _shown(self.decoded),
            _shown(self.scored),
        ]


def count_sets(layout: Layout) -> list[SetCount]:
    """Counts of the training, validation and test sets after the stages that have been run."""
    args = layout.args
    names = dict.fromkeys([layout.train_set, args.valid_set, *args.test_sets])
    counts = [_count(layout, name) for name in names if (layout.data(name) / "wav.scp").is_file()]
    return counts


def _count(layout: Layout, name: str) -> SetCount:
    source, whole = layout.data(name), layout.formatted(name)
    is_test = name in layout.args.test_sets
    kept = whole if is_test else layout.dump(name)
    data = DataDir.read(source, allow_pipes=True, on_disk=True)
    dropped = [source / "dropped", whole / "dropped"]
    if not is_test:
        dropped.append(kept / "dropped")
    reasons = Counter(reason for file in dropped for reason in _reasons(file))
    # copies that stage 2 dropped are not in its output
    found = SetCount(name, len(data.wav_scp) + sum(1 for _ in _reasons(dropped[0])), reasons)
    if (kept / "utt2num_samples").is_file():
        left = DataDir.read(kept, on_disk=True)
        found.kept = len(left.wav_scp)
        with (kept / "utt2num_samples").open(encoding="utf-8") as lines:
            found.seconds = sum(int(line.split()[1]) for line in lines) / layout.args.fs
        found.speakers = len(set(left.utt2spk.values()))
    for mode in MODES:
        if name in (layout.train_set, layout.args.valid_set) and layout.set_of(mode).name == name:
            found.trained_on = _least(
                _lines(layout.stats(config) / mode / "speech_shape")
                for config in layout.source_configs
                if layout.args.convert_from is None
            )
    if is_test:
        outs = [layout.decoded(config, name) for config in layout.args.asr_config]
        found.decoded = _least(_lines(out / "text") for out in outs)
        found.scored = _least(_lines(out / "score_wer" / "ref.trn") for out in outs)
    return found


def table(counts: Sequence[SetCount]) -> str:
    """The counts in aligned columns."""
    rows = [HEADINGS, *(count.cells() for count in counts)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if n in (0, 2) else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(counts: Sequence[SetCount]) -> list[str]:
    """The counts as lines of a Markdown table."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(count.cells() for count in counts)]
    return ["## Utterances", "", *(f"|{'|'.join(row)}|" for row in rows)]


def _reasons(file: Path) -> Iterable[str]:
    """The reasons in a file of `UTTERANCE REASON[: DETAIL]` lines; empty if it is missing."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            _, _, reason = line.partition(" ")
            yield reason.partition(":")[0].strip()


def _lines(file: Path) -> int | None:
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def _least(numbers: Iterable[int | None]) -> int | None:
    """The minimum over models; None: no model has a number."""
    known = [number for number in numbers if number is not None]
    return min(known, default=None)


def _shown(number: int | None) -> str:
    return "" if number is None else str(number)
