"""Word error rates of converted models over seeds, with one directory of experiments per seed."""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from espnet_kv.cli import command
from espnet_kv.errors import UserError

SETS = ("test_clean", "test_other")


class Kind(NamedTuple):
    """The model of a row, the same for all seeds.

    part: what was converted; of the source and its control: "". target: attention type and size.
    """

    part: str
    target: str


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tabulate results of `run.sh --convert_from`, mean and range over the seeds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("expdirs", nargs="+", type=Path, help="one --expdir of run.sh for each seed")
    add("--decoding", required=True, help="name of a directory decode_* scored by stage 13")
    add("--sets", nargs="+", default=SETS, help="decoded data directories")
    return parser


def kind_of(experiment: Path) -> tuple[Kind, bool, float]:
    """Kind of the model, whether it was fine-tuned, and the remaining fraction of the cache."""
    from espnet_kv.convert.record import FILE, read_record

    if not (experiment / FILE).exists():
        run = json.loads((experiment / "run.json").read_text(encoding="utf-8"))
        return Kind("", "source"), "finetune" in run, 1.0
    record = read_record(experiment)
    options = record["options"]
    parts = options["parts"]
    sizes = ("kv_rank", "num_kv_heads", "feature_map", "target_compression")
    size = next(options[name] for name in sizes if options[name] is not None)
    cache = [record["cache"][part] for part in parts]
    kept = sum(c["after"]["bytes"] for c in cache) / sum(c["before"]["bytes"] for c in cache)
    plain = "" if record["calibration"] else ", weights alone"
    target = f"{options['attention_type']} {size}{plain}"
    return Kind(" + ".join(parts), target), "finetune" in record, kept


def rates(experiment: Path, args: argparse.Namespace) -> list[float] | None:
    """WER of each set in per cent; None: this decoding does not exist."""
    from espnet_kv.scores import read_scores

    scores = read_scores(experiment, [args.decoding])
    rows = scores["streaming" if "streaming" in args.decoding else "offline"]
    found = [rows[name] for name in args.sets if name in rows]
    if [row["decoding"] for row in found] != [args.decoding] * len(args.sets):
        return None
    return [row["wer"] for row in found]


def cell(seeds: Sequence[Sequence[float]]) -> str:
    """Mean of each set and, if seeds differ, the lowest and the highest."""
    if not seeds:
        return "-"
    shown = []
    for values in zip(*seeds, strict=True):
        low, high = min(values), max(values)
        spread = f" ({low:.1f} to {high:.1f})" if high > low else ""
        shown.append(f"{statistics.fmean(values):.1f}{spread}")
    return " / ".join(shown)


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    found: dict[Kind, dict[bool, list[list[float]]]] = defaultdict(lambda: {False: [], True: []})
    kept: dict[Kind, float] = {}
    for expdir in args.expdirs:
        for experiment in sorted(expdir.glob("asr_*")):
            if (experiment / "config.yaml").exists() and (wer := rates(experiment, args)):
                kind, tuned, part = kind_of(experiment)
                found[kind][tuned].append(wer)
                kept[kind] = part
    if not found:
        raise UserError(f"--decoding {args.decoding}: no experiment was decoded so (stages 12, 13)")
    print(f"| part | to | cache kept % | WER %, {' / '.join(args.sets)} | fine-tuned: WER % |")
    print("|---|---|---:|---|---|")
    for kind in sorted(found, key=lambda kind: (kind.part, -kept[kind], kind.target)):
        wers = (cell(found[kind][tuned]) for tuned in (False, True))
        row = (kind.part or "-", kind.target, f"{100 * kept[kind]:.2f}", *wers)
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
