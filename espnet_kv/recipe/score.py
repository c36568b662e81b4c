"""Stage 13: word, character and token error rates, with alignments."""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jiwer

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text
from espnet_kv.recipe.tokens import SPACE
from espnet_kv.scores import KINDS, RESAMPLES, SEED, Rates, error_interval, percent


@dataclass(frozen=True)
class Score:
    """The alignment of a test set in tokens of `kind`: words, characters or pieces.

    alignment: hits, substitutions, deletions and insertions.
    missing: number of utterances without hypothesis.
    """

    kind: str
    utterances: list[str]
    alignment: jiwer.WordOutput
    missing: int

    @property
    def words(self) -> int:
        """Tokens of the reference."""
        return self.alignment.hits + self.alignment.substitutions + self.alignment.deletions

    @property
    def errors(self) -> int:
        counts = self.alignment
        return counts.substitutions + counts.deletions + counts.insertions

    @property
    def error_rate(self) -> float:
        """Errors in per cent of the reference tokens; infinite if the reference has no tokens."""
        return percent(self.errors, self.words)

    @property
    def sentence_errors(self) -> int:
        """Utterances with at least one error."""
        return sum(
            any(chunk.type != "equal" for chunk in chunks) for chunks in self.alignment.alignments
        )

    @functools.cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the error rate, see `error_interval`."""
        return error_interval(self.utterance_errors, self.utterance_words)

    @property
    def utterance_errors(self) -> list[int]:
        """Errors of each utterance."""
        return [sum(map(_errors, chunks)) for chunks in self.alignment.alignments]

    @property
    def utterance_words(self) -> list[int]:
        """Tokens of each utterance's reference."""
        return [len(reference) for reference in self.alignment.references]

    @property
    def counts(self) -> dict[str, int]:
        """The counts for scores.json, see `espnet_kv.scores`."""
        found = self.alignment
        return {
            "utterances": len(self.utterances),
            "words": self.words,
            "corr": found.hits,
            "sub": found.substitutions,
            "del": found.deletions,
            "ins": found.insertions,
            "err": self.errors,
            "s_err": self.sentence_errors,
            "missing": self.missing,
        }

    def summary(self) -> str:
        """The lines of result.txt: Snt Wrd Corr Sub Del Ins Err S.Err, in the format of sclite."""
        rates = Rates.of(self.counts)
        columns = "".join(f"{rate:7.1f}" for rate in rates.percents)
        table = (
            "|         |  # Snt   # Wrd |   Corr    Sub    Del    Ins    Err  S.Err |\n"
            f"| Sum/Avg | {rates.utterances:6d} {rates.words:7d} |{columns} |\n"
        )
        if self.interval:
            low, high = self.interval
            table += (
                f"95 % interval of Err (utterances resampled {RESAMPLES} times, seed {SEED}): "
                f"{low:.1f} to {high:.1f}\n"
            )
        return table + (f"Missing hypotheses: {self.missing}\n" if self.missing else "")


def score(
    ref: Mapping[str, str],
    hyp: Mapping[str, str],
    kind: str,
    tokenizer: Callable[[str], list[str]] | None = None,
) -> Score:
    """Align hypotheses with references, utterance by utterance.

    A missing hypothesis counts as all deletions, with a warning.

    Args:
        ref: utterance -> reference transcript; may be empty text.
        hyp: utterance -> recognised text.
        kind: wer (words), cer (characters including spaces) or ter (pieces).
        tokenizer: text -> tokens; needed for ter, see `tokens.piece_tokenizer`.

    Raises:
        UserError: there is no reference, or a hypothesis has no reference.
    """
    if kind not in KINDS or (kind == "ter" and tokenizer is None):
        raise ValueError(f"kind must be wer, cer, or ter with a tokenizer, not {kind!r}")
    if not ref:
        raise UserError(f"{kind}: there are no reference transcripts to score against")
    if unknown := sorted(hyp.keys() - ref.keys()):
        raise UserError(
            f"{kind}: {len(unknown)} hypotheses have no reference (the first: {unknown[0]}); "
            "decode and score the same test set"
        )
    utterances = sorted(ref)
    if missing := [utt for utt in utterances if utt not in hyp]:
        print(
            f"warning: {kind}: {len(missing)} of {len(ref)} utterances have no hypothesis "
            f"(the first: {missing[0]}); counted as deletions",
            file=sys.stderr,
        )
    split = _Split(tokenizer or (str.split if kind == "wer" else _characters))
    alignment = jiwer.process_words(
        [ref[utt] for utt in utterances],
        [hyp.get(utt, "") for utt in utterances],
        reference_transform=split,
        hypothesis_transform=split,
    )
    return Score(kind, utterances, alignment, len(missing))


def write_score(result: Score, out_dir: Path) -> None:
    """Write ref.trn, hyp.trn, result.txt and alignments.txt to `out_dir` (`.../score_wer`)."""
    aligned = jiwer.visualize_alignment(result.alignment, show_measures=False, skip_correct=False)
    heading = re.compile(r"^=== SENTENCE (\d+) ===\n\n", re.MULTILINE)
    aligned = heading.sub(lambda found: f"{result.utterances[int(found[1]) - 1]}\n", aligned)
    with new_directory(out_dir) as partial:
        for name, sides in (
            ("ref.trn", result.alignment.references),
            ("hyp.trn", result.alignment.hypotheses),
        ):
            lines = [
                " ".join([*tokens, f"({utt})\n"])
                for utt, tokens in zip(result.utterances, sides, strict=True)
            ]
            write_text(partial / name, "".join(lines))
        write_text(partial / "result.txt", result.summary())
        write_text(partial / "alignments.txt", aligned.rstrip("\n") + "\n")


def _errors(chunk: jiwer.AlignmentChunk) -> int:
    """Number of errors in one stretch of an alignment."""
    if chunk.type == "equal":
        return 0
    reference = chunk.ref_end_idx - chunk.ref_start_idx
    return max(reference, chunk.hyp_end_idx - chunk.hyp_start_idx)


class _Split(jiwer.AbstractTransform):
    """Text -> tokens, as a transform of jiwer."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        self._split = split

    def process_list(self, inp: list[str]) -> list[list[str]]:
        return [self._split(" ".join(text.split())) for text in inp]


def _characters(text: str) -> list[str]:
    return [SPACE if character == " " else character for character in text]
