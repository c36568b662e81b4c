"""Draw what conversions cost: WER over bytes, from the tables of the recipe's RESULTS.md."""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from espnet_kv.cli import command
from espnet_kv.errors import UserError

RESULTS = Path(__file__).parents[1] / "egs2/librispeech_100_kv/asr1/RESULTS.md"
PARTS = ("encoder", "decoder_self", "decoder_cross")
MEDIUM = ("part", "to", "cache kept %", "WER %, test_clean / test_other", "fine-tuned: WER %")
WHISPER = ("attention", "cut %", "plain SVD", "second moment", "`bin.convert`")
HIGHEST = 100.0  # where nothing is recognized; lines leave the figure there


class Rate(NamedTuple):
    """A WER and its interval, per cent."""

    wer: float
    low: float
    high: float


Points = dict[tuple[str, str], dict[float, Rate]]
"""(part, method) -> per cent of the bytes that are kept -> WER."""


def rows(text: str, head: tuple[str, ...]) -> list[list[str]]:
    """The cells of the first table with these headings.

    Raises:
        UserError: there is no such table.
    """
    _, found, rest = text.partition(f"| {' | '.join(head)} |\n")
    if not found:
        raise UserError(f"{RESULTS} has no table with the headings {', '.join(head)}")
    lines = rest.splitlines()[1:]
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), None)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def rate(cell: str) -> Rate | None:
    """`9.9 (9.6 to 10.2)` or `9.9`; None if the cell has no number."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
    if not numbers:
        return None
    return Rate(numbers[0], *(numbers[1:3] or numbers * 2))


def medium(text: str) -> tuple[Rate, Points]:
    """The source's WER, and those of its conversions, on test_clean."""
    points: Points = {}
    source = None
    for part, to, kept, converted, tuned in rows(text, MEDIUM):
        found = [rate(cell.split("/")[0]) for cell in (converted, tuned)]
        if part == "-":
            source = found[0]
            continue
        plain = "weights alone" in to
        methods = ("plain SVD" if plain else "bin.convert", "bin.convert, fine-tuned")
        for method, one in zip(methods, found, strict=True):
            if one:
                points.setdefault((part, method), {})[float(kept)] = one
    assert source is not None
    return source, points


def whisper(text: str) -> tuple[Rate, Points]:
    """The released model's WER, and those of its conversions."""
    points: Points = {}
    for part, cut, *cells in rows(text, WHISPER):
        for method, cell in zip(WHISPER[2:], cells, strict=True):
            if part in PARTS and (found := rate(cell)):
                points.setdefault((part, method.strip("`")), {})[100 - float(cut)] = found
    released = re.search(r"As released: ([^.]*\.\d+ \([^)]*\))", text)
    found = rate(released[1]) if released else None
    if found is None:
        raise UserError(f"{RESULTS} does not say what the released Whisper model has")
    return found, points


def draw(panels: Iterable[tuple[str, Rate, Points]], output: Path) -> None:
    """A row for each model, and in it a panel for each part."""
    from matplotlib.figure import Figure

    looks = {
        "plain SVD": ("#a6761d", ":", "v"),
        "second moment": ("#0072b2", "--", "s"),
        "bin.convert": ("#d55e00", "-", "o"),
        "bin.convert, fine-tuned": ("#009e73", "-", "D"),
    }
    panels = list(panels)
    figure = Figure(figsize=(9, 2.9 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), len(PARTS), sharex=True, sharey="row", squeeze=False)
    named = {}
    for line, (model, source, points) in zip(axes, panels, strict=True):
        for axis, part in zip(line, PARTS, strict=True):
            axis.axhspan(source.low, source.high, color="#888888", alpha=0.25, lw=0)
            axis.axhline(source.wer, color="#555555", lw=1)
            for method, (colour, dashes, marker) in looks.items():
                if not (found := points.get((part, method))):
                    continue
                xs, rates = list(found), list(found.values())
                (named[method],) = axis.plot(
                    xs, [r.wer for r in rates], dashes, color=colour, marker=marker, ms=4
                )
                lows, highs = [r.low for r in rates], [r.high for r in rates]
                axis.vlines(xs, lows, highs, color=colour, lw=1, alpha=0.6)
            axis.set(xscale="log", yscale="log", ylim=(0.7 * source.low, HIGHEST))
            axis.set_xticks([50, 25, 12.5, 6.25], ["50", "25", "12.5", "6.25"], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
            axis.set_title(f"{model}: {part.replace('_', ', ')}", fontsize=9, loc="left")
        line[0].set_ylabel("WER (%)")
    for axis in axes[-1]:
        axis.set_xlabel("bytes of the cache that are kept (%)")
        axis.set_xlim(60, 5)
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(output, dpi=150, metadata={"Software": None})


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the figure, PNG or SVG")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    text = RESULTS.read_text(encoding="utf-8")
    draw([("Conformer, 6 x 144", *medium(text)), ("Whisper tiny.en", *whisper(text))], args.output)


if __name__ == "__main__":
    sys.exit(main())
