"""Speed of a search with kv_transformer as decoder and language model, compared with ESPnet's.

Both sides have the same weights and run in ESPnet's BatchBeamSearch. All sides run in every round,
and a ratio is the median over rounds of the ratios within a round. Times are CPU time of this
process, on which other load of the machine has less influence than on elapsed time.

Shape letters: K hypotheses, T encoder frames, L tokens.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
from typing import Any

import torch
from common import (
    add_machine_options,
    by_side,
    positive,
    print_device,
    print_software,
    ratio,
    rounds,
    set_up_machine,
    settings,
)
from decoding import NEVER, OURS, SEARCH, SIZE, SIZES, STOCK, SearchSide, Setting
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from espnet2.lm.transformer_lm import TransformerLM

from espnet_kv.cli import command
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer
from espnet_kv.lm.transformer_lm import KVTransformerLM

DECODER = SIZES | {"num_blocks": 6}
LM = {"embed_unit": 128, "att_unit": 512, "head": 8, "unit": 2048}
LM_WEIGHT = 0.6
STOCK_LM = "ours, stock LM"  # our decoder and CTC scorer with ESPnet's language model
BAR_BEAM, BAR, LEAST = 10, 3.0, 1.0  # required speed-up at this beam, and at every other


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time a beam search with decoder and language model against ESPnet's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=positive, default=16, help="layers of the language model")
    add("--vocabulary", type=positive, default=5000, help="tokens, <blank> and <eos> among them")
    add("--tokens", type=positive, default=60, help="tokens to decode")
    add("--rounds", type=positive, default=3)
    add("--frames", type=positive, default=300, metavar="T")
    add("--beams", nargs="+", type=positive, default=[1, 10, 20], metavar="K")
    add("--ctc", nargs="+", type=float, default=[0.0, 0.3], metavar="WEIGHT")
    add_machine_options(parser)
    return parser


def build_sides(args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """(decoder, language model) of each side, with the same weights."""
    torch.manual_seed(0)
    stock = TransformerDecoder(args.vocabulary, SIZE, **DECODER)
    stock.output_layer.bias.data[-1] += NEVER
    ours = KVTransformerDecoder(args.vocabulary, SIZE, **DECODER)
    ours.load_state_dict(stock.state_dict(), strict=True)
    conf: dict[str, Any] = LM | {"layer": args.layers}
    stock_lm, lm = (cls(args.vocabulary, **conf) for cls in (TransformerLM, KVTransformerLM))
    lm.load_state_dict(stock_lm.state_dict(), strict=True)
    ours.prepare_search()
    lm.prepare_search()
    for module in (stock, ours, stock_lm, lm):
        module.eval().to(args.device)
    return {STOCK: (stock, stock_lm), OURS: (ours, lm), STOCK_LM: (ours, stock_lm)}


def measure(parts: dict, ctc: CTC, beam: int, weight: float, args: argparse.Namespace) -> dict:
    """Measure one row and check the results of every round."""
    setting = Setting(SEARCH, args.frames, beam, weight, batch=1)
    sides = {
        name: SearchSide(decoder, ctc, setting, args, {"lm": (lm, LM_WEIGHT)})
        for name, (decoder, lm) in parts.items()
    }
    for side in sides.values():
        side.warm_up()
    runs = {name: side.run for name, side in sides.items()}
    timings, same, worst = [], True, 0.0
    for spent in rounds(runs, args.device, args.rounds):
        timings.append(spent)
        now, difference = sides[OURS].check(sides[STOCK])
        same, worst = same and now, max(worst, difference)
    seconds = by_side(timings)
    return {
        "beam": beam,
        "ctc": weight,
        "rounds": args.rounds,
        "seconds": {name: round(statistics.median(s), 2) for name, s in seconds.items()},
        "faster": ratio(seconds[STOCK], seconds[OURS]),
        "by_lm": ratio(seconds[STOCK_LM], seconds[OURS]),
        "identical": same,
        "difference": worst,
        "bytes": {name: sides[name].nbytes("lm")["self"] for name in (STOCK, OURS)},
    }


def row_of(row: dict) -> str:
    """A row of the table."""
    seconds, held = row["seconds"], row["bytes"]
    cells = [
        f"{row['beam']}",
        f"{row['ctc']:g}",
        f"{row['rounds']}",
        *(f"{seconds[name]:.2f}" for name in (STOCK, STOCK_LM, OURS)),
        f"{row['faster']:.2f}",
        f"{row['by_lm']:.2f}",
        "yes" if row["identical"] else f"no ({row['difference']:.0e})",
        f"{held[STOCK] / 2**20:.1f} / {held[OURS] / 2**20:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def judge(rows: list[dict]) -> list[dict]:
    """Print and return the bars."""
    bars = []
    for row in rows:
        least = BAR if row["beam"] == BAR_BEAM else LEAST
        met = row["faster"] >= least
        print(f"bar: beam {row['beam']}, CTC {row['ctc']:g}: at least {least:g} x", end=", ")
        print(f"is {row['faster']:.2f}: {'met' if met else 'missed'}")
        bars.append({"beam": row["beam"], "ctc": row["ctc"], "least": least, "met": met})
    return bars


def print_card(args: argparse.Namespace) -> None:
    """The card: settings of the measurement."""
    print(f"decoder   {DECODER}, size {SIZE}, vocabulary {args.vocabulary}")
    print(f"LM        {LM | {'layer': args.layers}}, weight {LM_WEIGHT}")
    print_software()
    print_device(args.device)
    print(f"input     {args.frames} frames of noise as encoder output; random weights")
    print(f"stock     ESPnet's TransformerDecoder, TransformerLM and {CTCPrefixScorer.__name__}")
    print(f"ours      kv_transformer twice, mha, same weights, {FastCTCPrefixScorer.__name__}")
    print(f"length    {args.tokens} tokens: {NEVER:.0f} on the decoder's score of <eos>\n")


@command
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not all(0 <= weight < 1 for weight in args.ctc):
        parser.error(f"--ctc {args.ctc}: weights lie in [0, 1); the decoder has the rest")
    set_up_machine(parser, args)
    args.size, args.sos, args.fast_ctc = SIZE, args.vocabulary - 1, True
    logging.getLogger("espnet2").setLevel(logging.ERROR)  # it warns of every maximum length
    rows = []
    with torch.inference_mode():
        parts = build_sides(args)
        ctc = CTC(args.vocabulary, SIZE).eval().to(args.device)
        print_card(args)
        print("| beam | CTC | rounds | stock: CPU s | ours, stock LM: s | ours: s |", end="")
        print(" times faster | by the LM | identical | LM: MiB, stock / ours |")
        print("|---" * 10 + "|", flush=True)
        for weight, beam in itertools.product(args.ctc, args.beams):
            rows.append(measure(parts, ctc, beam, weight, args))
            print(row_of(rows[-1]), flush=True)
    print()
    results = {"rows": rows, "bars": judge(rows)}
    print(json.dumps({"benchmark": "lm_decoding", "settings": settings(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
