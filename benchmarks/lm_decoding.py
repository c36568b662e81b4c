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
import time
from typing import Any

import torch
from common import (
    add_machine_options,
    by_side,
    positive,
    print_device,
    print_software,
    ratio,
    set_up_machine,
    settings,
)
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from espnet2.lm.transformer_lm import TransformerLM

from espnet_kv.cli import command
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer
from espnet_kv.lm.transformer_lm import KVTransformerLM

SIZE = 256
DECODER = {"attention_heads": 4, "linear_units": 2048, "num_blocks": 6}
LM = {"embed_unit": 128, "att_unit": 512, "head": 8, "unit": 2048}
STOCK, OURS = "stock", "ours"
STOCK_LM = "ours, stock LM"  # our decoder and CTC scorer with ESPnet's language model
TOLERANCE = 1e-4  # highest relative difference of two scores
NEVER = -1e4  # added to the score of <eos>, so that no hypothesis ends before the last token
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


def build_sides(args: argparse.Namespace) -> dict[str, tuple[Any, Any, type]]:
    """(decoder, language model, class of the CTC scorer) of each side, with the same weights."""
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
    return {
        STOCK: (stock, stock_lm, CTCPrefixScorer),
        OURS: (ours, lm, FastCTCPrefixScorer),
        STOCK_LM: (ours, stock_lm, FastCTCPrefixScorer),
    }


class Side:
    """A side's beam search, its scorers and weights as in ESPnet's asr_inference."""

    def __init__(self, parts: tuple, ctc: CTC, beam: int, weight: float, args: argparse.Namespace):
        decoder, lm, scorer = parts
        eos = args.vocabulary - 1
        self.search = BatchBeamSearch(
            scorers={"decoder": decoder, "ctc": scorer(ctc, eos), "lm": lm},
            weights={"decoder": 1 - weight, "ctc": weight, "lm": 0.6},
            beam_size=beam,
            vocab_size=args.vocabulary,
            sos=eos,
            eos=eos,
            pre_beam_score_key="full",
        ).eval()
        self.x = torch.randn(args.frames, SIZE, generator=torch.Generator().manual_seed(0))
        self.x, self.tokens, self.found = self.x.to(args.device), args.tokens, []

    def seconds(self, tokens: int | None = None) -> float:
        """CPU time of a search."""
        begin = time.process_time()
        self.found = self.search(self.x, maxlenratio=-(tokens or self.tokens))
        return time.process_time() - begin

    def difference(self, stock: "Side") -> float:
        """Largest relative difference of two scores; infinity: the n-best tokens differ."""
        if [h.yseq.tolist() for h in self.found] != [h.yseq.tolist() for h in stock.found]:
            return float("inf")
        assert all(len(hyp.yseq) == self.tokens + 2 for hyp in self.found)  # <sos> and <eos>
        pairs = [
            (float(score), float((other.scores | {"total": other.score})[name]))
            for one, other in zip(self.found, stock.found, strict=True)
            for name, score in (one.scores | {"total": one.score}).items()
        ]
        return max(abs(a / b - 1) for a, b in pairs)

    def nbytes(self) -> int:
        """Bytes of the language model after the last token."""
        states = [hyp.states["lm"] for hyp in self.found]
        if isinstance(states[0], list):  # ESPnet's: the outputs of each layer
            return sum(layer.nbytes for state in states for layer in state)
        return states[0].search.nbytes_by_kind()["self"]


def measure(parts: dict, ctc: CTC, beam: int, weight: float, args: argparse.Namespace) -> dict:
    """Measure one row and check the results of every round."""
    sides = {name: Side(given, ctc, beam, weight, args) for name, given in parts.items()}
    for side in sides.values():
        side.seconds(2)
    timings, worst = [], 0.0
    for turn in range(args.rounds):
        names = list(sides)
        first = turn % len(names)
        timings.append({name: sides[name].seconds() for name in names[first:] + names[:first]})
        worst = max(worst, sides[OURS].difference(sides[STOCK]))
    seconds = by_side(timings)
    return {
        "beam": beam,
        "ctc": weight,
        "rounds": args.rounds,
        "seconds": {name: round(statistics.median(s), 2) for name, s in seconds.items()},
        "faster": ratio(seconds[STOCK], seconds[OURS]),
        "by_lm": ratio(seconds[STOCK_LM], seconds[OURS]),
        "identical": worst <= TOLERANCE,
        "difference": worst,
        "bytes": {name: sides[name].nbytes() for name in (STOCK, OURS)},
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
    print(f"LM        {LM | {'layer': args.layers}}, weight 0.6")
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
