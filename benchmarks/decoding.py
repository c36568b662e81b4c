"""Speed of our decoders compared with ESPnet's with the same weights.

kv_transformer and ESPnet's TransformerDecoder, or with --whisper kv_whisper and ESPnet's
OpenAIWhisperDecoder.

Both run in ESPnet's BatchBeamSearch. Both sides run in every round, and a ratio is the median over
rounds of the ratios within a round, so that other load on the machine affects both sides.

Shape letters: B utterances, K hypotheses of each, N = B K, T encoder frames, D model size,
L tokens.
"""

import argparse
import copy
import itertools
import json
import logging
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from torch import Tensor

from espnet_kv.cli import command
from espnet_kv.decoder.cached import CachedDecoder
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer
from espnet_kv.profile.memory import peak_bytes

SIZE = 256
SIZES = {"attention_heads": 4, "linear_units": 2048}
STOCK, OURS = "stock", "ours"
PLAIN = "ours, weights as trained"  # without `prepare_search`
TOLERANCE = 1e-4  # highest relative difference of two scores
NEVER = -1e4  # added to the score of <eos>, so that no hypothesis ends before the last token
DECODER, SEARCH = "decoder", "search"


@dataclass(frozen=True)
class Setting:
    """A row. ctc: weight of CTC; 0: no CTC."""

    case: str
    frames: int
    beam: int
    ctc: float
    batch: int

    @property
    def size(self) -> int:
        """N T, to which the time of the stock side is about proportional."""
        return self.batch * self.beam * self.frames


# required speed-up over stock; other settings must not be slower
BARS = {Setting(DECODER, 300, 10, 0.0, 1): 8.0, Setting(SEARCH, 300, 10, 0.3, 1): 4.0}
LEAST = 1.0


def bars(args: argparse.Namespace) -> dict[Setting, float]:
    if args.whisper is None:
        return BARS
    least = {5: 12.0, 10: 20.0 if "tiny" in args.whisper else 30.0}
    return {Setting(SEARCH, 1500, beam, 0.0, 1): bar for beam, bar in least.items()}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time kv_transformer or kv_whisper against ESPnet's decoder in beam search.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--whisper", metavar="NAME", help="kv_whisper in the sizes of a public model, or a file")
    add("--blocks", type=positive, default=6, help="decoder blocks")
    add("--vocabulary", type=positive, default=5000, help="tokens, <blank> and <eos> among them")
    add("--tokens", type=positive, default=60, help="tokens to decode")
    add("--rounds", type=positive, default=3, help="rounds of a setting at most")
    add("--row_seconds", type=positive, default=10, help="begin no third round after")
    add("--largest", type=positive, default=24000, help="leave out rows of a larger B x K x T")
    add("--fast_ctc", action="store_true", help="our side with the CTC scorer of asr_inference")
    add("--peak", action="store_true", help="measure peak memory in one more run of each side")
    add_machine_options(parser)
    cases = (DECODER, SEARCH)
    add("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE", help="of these")
    add("--frames", nargs="+", type=positive, default=[300, 800], metavar="T")
    add("--beams", nargs="+", type=positive, default=[1, 10, 20], metavar="K")
    add("--ctc", nargs="+", type=float, default=[0.0, 0.3], metavar="WEIGHT")
    add("--batch", nargs="+", type=positive, default=[1, 8], metavar="B")
    return parser


def build_sides(args: argparse.Namespace) -> tuple[dict[str, Any], CTC]:
    """ESPnet's decoder and ours with its weights, by name, and a CTC layer for both."""
    torch.manual_seed(0)
    args.size, args.sos = SIZE, args.vocabulary - 1
    if args.whisper is not None:
        from whisper_sides import build_decoders

        sides = dict(zip((STOCK, OURS, PLAIN), build_decoders(args.whisper, NEVER), strict=True))
        dims = sides[OURS].dims
        args.blocks, args.vocabulary = dims["n_text_layer"], dims["n_vocab"]
        args.size, args.sos = dims["n_text_state"], 0
        ctc = CTC(args.vocabulary, args.size).eval().to(args.device)
        return {name: side.eval().to(args.device) for name, side in sides.items()}, ctc
    conf: dict[str, Any] = SIZES | {"num_blocks": args.blocks}
    stock = TransformerDecoder(args.vocabulary, SIZE, **conf)
    stock.output_layer.bias.data[-1] += NEVER
    ours = KVTransformerDecoder(args.vocabulary, SIZE, **conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    plain = copy.deepcopy(ours)
    ours.prepare_search()
    ctc = CTC(args.vocabulary, SIZE).eval().to(args.device)
    sides = {STOCK: stock, OURS: ours, PLAIN: plain}
    return {name: side.eval().to(args.device) for name, side in sides.items()}, ctc


def noise(setting: Setting, args: argparse.Namespace) -> Tensor:
    """Encoder output (B, T, D), always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.frames, args.size)
    return torch.randn(shape, generator=generator).to(args.device)


class SearchSide:
    """A side's beam search, its scorers and weights as in ESPnet's asr_inference."""

    def __init__(
        self,
        decoder: Any,
        ctc: CTC,
        setting: Setting,
        args: argparse.Namespace,
        others: Mapping[str, tuple[Any, float]] | None = None,
    ):
        """others: further scorers and their weights, by name."""
        others = others or {}
        fast = args.fast_ctc and isinstance(decoder, CachedDecoder)
        scorer, eos = FastCTCPrefixScorer if fast else CTCPrefixScorer, args.vocabulary - 1
        self.search = BatchBeamSearch(
            scorers={"decoder": decoder, "ctc": scorer(ctc, eos)}
            | {name: other for name, (other, _) in others.items()},
            weights={"decoder": 1 - setting.ctc, "ctc": setting.ctc}
            | {name: weight for name, (_, weight) in others.items()},
            beam_size=setting.beam,
            vocab_size=args.vocabulary,
            sos=args.sos,
            eos=eos,
            pre_beam_score_key="full",
        ).eval()
        xs = noise(setting, args)
        self.x = xs if setting.batch > 1 else xs[0]
        self.tokens = args.tokens
        self.found: list[list] = []

    def warm_up(self) -> None:
        self.search(self.x, maxlenratio=-2)

    def run(self) -> None:
        found = self.search(self.x, maxlenratio=-self.tokens)
        self.found = found if self.x.dim() == 3 else [found]

    def check(self, stock: "SearchSide") -> tuple[bool, float]:
        """Whether both n-best lists are equal, and the largest relative difference of scores."""
        same, worst = True, 0.0
        for nbest, others in zip(self.found, stock.found, strict=True):
            same = same and len(nbest) == len(others) > 0
            for one, other in zip(nbest, others, strict=False):
                same = same and one.yseq.tolist() == other.yseq.tolist()
                same = same and len(one.yseq) == self.tokens + 2  # <sos> and <eos>
                pairs = [(one.score, other.score)]
                pairs += [(score, other.scores[name]) for name, score in one.scores.items()]
                worst = max(worst, *(abs(float(a) / float(b) - 1) for a, b in pairs))
        return same and worst <= TOLERANCE, worst

    def nbytes(self, scorer: str = "decoder") -> dict[str, int]:
        return nbytes(hyp.states[scorer] for nbest in self.found for hyp in nbest)


class DecoderSide:
    """A side's decoder without search; it scores hypotheses with random tokens and parents."""

    def __init__(self, decoder: Any, _: CTC, setting: Setting, args: argparse.Namespace):
        self.decoder = decoder
        self.x = noise(setting, args)
        # ESPnet's search expands one utterance to views, but copies several
        copies = self.x.unsqueeze(1).expand(-1, setting.beam, -1, -1)
        self.xs = copies[0] if setting.batch == 1 else copies.flatten(0, 1)
        generator = torch.Generator().manual_seed(0)
        shape = (args.tokens, setting.batch, setting.beam)
        first = torch.arange(setting.batch)[:, None] * setting.beam
        parents = (torch.randint(setting.beam, shape, generator=generator) + first).flatten(1)
        new = torch.randint(args.vocabulary, parents.shape, generator=generator)  # (L, N)
        ys = new[0][:, None]
        self.ys, self.parents = [ys.to(args.device)], parents.tolist()
        for these, tokens in zip(parents[1:], new[1:], strict=True):
            ys = torch.cat([ys[these], tokens[:, None]], dim=1)
            self.ys.append(ys.to(args.device))
        self.scores: list[Tensor] = []
        self.states: list = []

    def warm_up(self) -> None:
        self._score(self.ys[:2])

    def run(self) -> None:
        self._score(self.ys)

    def _score(self, steps: list[Tensor]) -> None:
        self.scores = []
        states = [self.decoder.batch_init_state(self.x)] * len(self.xs)
        for ys, parents in zip(steps, self.parents, strict=False):
            states = [states[parent] for parent in parents]
            scores, states = self.decoder.batch_score(ys, states, self.xs)
            self.scores.append(scores)
        self.states = states

    def check(self, stock: "DecoderSide") -> tuple[bool, float]:
        """Whether the scores of all calls are equal, and their largest relative difference."""
        pairs = zip(self.scores, stock.scores, strict=True)
        worst = max(float((one / other - 1).abs().max()) for one, other in pairs)
        return worst <= TOLERANCE, worst

    def nbytes(self) -> dict[str, int]:
        return nbytes(self.states)


SIDES: dict[str, type] = {DECODER: DecoderSide, SEARCH: SearchSide}


def nbytes(states: Iterable) -> dict[str, int]:
    """Bytes held after the last token, which is the maximum."""
    states = list(states)
    if states[0] is None:  # ESPnet's Whisper keeps nothing
        return {"self": 0, "cross": 0}
    if isinstance(states[0], list):  # ESPnet's: the outputs of each layer
        return {"self": sum(layer.nbytes for state in states for layer in state), "cross": 0}
    return states[0].search.nbytes_by_kind()


def chosen(args: argparse.Namespace) -> list[Setting]:
    """The rows: the decoder alone if it has a bar, then all searches, including the large ones."""
    rows = []
    if DECODER in args.cases:
        alone = [s for s in bars(args) if s.case == DECODER]
        rows += [Setting(DECODER, s.frames, s.beam, s.ctc, b) for s in alone for b in args.batch]
    if SEARCH in args.cases:
        grid = itertools.product(args.batch, args.frames, args.ctc, args.beams)
        rows += [Setting(SEARCH, t, beam, ctc, batch) for batch, t, ctc, beam in grid]
    return rows


def measure(decoders: dict, ctc: CTC, setting: Setting, args: argparse.Namespace) -> dict:
    """Measure one row and check the results of every round."""
    sides = {name: SIDES[setting.case](d, ctc, setting, args) for name, d in decoders.items()}
    for side in sides.values():
        side.warm_up()
    runs = {name: side.run for name, side in sides.items()}
    timings, same, worst = [], True, 0.0
    for spent in rounds(runs, args.device, args.rounds, args.row_seconds):
        timings.append({name: s / setting.batch for name, s in spent.items()})
        now, difference = sides[OURS].check(sides[STOCK])
        same, worst = same and now, max(worst, difference)
    seconds = by_side(timings)
    peaks = {name: peak_bytes(args.device, run) for name, run in runs.items() if args.peak}
    return {
        "rounds": len(seconds[STOCK]),
        "ms": {name: round(1e3 * statistics.median(s), 1) for name, s in seconds.items()},
        "faster": ratio(seconds[STOCK], seconds[OURS]),
        "prepared": ratio(seconds[PLAIN], seconds[OURS]),
        "identical": same,
        "difference": worst,
        "bytes": {name: side.nbytes() for name, side in sides.items()},
        "peak_bytes": peaks,
    }


def print_card(decoders: dict, args: argparse.Namespace) -> None:
    """The card: settings of the measurement."""
    sizes = f"{SIZES['attention_heads']} heads, {SIZES['linear_units']} linear units"
    if args.whisper is not None:
        sizes = f"Whisper {args.whisper}"
    parameters = sum(p.numel() for p in decoders[OURS].parameters())
    print(f"decoder   {args.blocks} blocks x {args.size}, {sizes}, vocabulary {args.vocabulary}")
    print(f"size      {parameters / 1e6:.2f} M parameters")
    print_software()
    print_device(args.device)
    scorer = FastCTCPrefixScorer if args.fast_ctc else CTCPrefixScorer
    print("input     noise as encoder output, no padding; random weights")
    stock, ours = (type(decoders[name]).__name__ for name in (STOCK, OURS))
    print(f"stock     ESPnet's {stock}, {CTCPrefixScorer.__name__}")
    print(f"ours      {ours}, mha, with its weights, {scorer.__name__}")
    print(f"length    {args.tokens} tokens: {NEVER:.0f} on the score of <eos>, ", end="")
    print(f"maxlenratio {-args.tokens}")
    large = sum(setting.size > args.largest for setting in chosen(args))
    if large:
        print(f"left out  {large} rows of more than {args.largest} hypotheses x frames (--largest)")
    print(flush=True)


def row_of(setting: Setting, result: dict) -> str:
    """A row of the table."""
    ms, held = result["ms"], result["bytes"]
    cells = [
        setting.case,
        str(setting.batch),
        str(setting.frames),
        f"{setting.ctc:g}" if setting.case == SEARCH else "",
        str(setting.beam),
        str(result["rounds"]),
        f"{ms[STOCK]:.1f}",
        f"{ms[OURS]:.1f}",
        f"{result['faster']:.2f}",
        f"{result['prepared']:.2f}",
        "yes" if result["identical"] else f"no ({result['difference']:.0e})",
        f"{held[STOCK]['self'] / 2**20:.2f}",
        f"{held[OURS]['self'] / 2**20:.2f} + {held[OURS]['cross'] / 2**20:.2f}",
        " / ".join(f"{peak / 2**20:.0f}" for peak in result["peak_bytes"].values()),
    ]
    return "| " + " | ".join(cells) + " |"


def judge(found: dict[Setting, dict], wanted: dict[Setting, float]) -> list[dict]:
    """Print the bars of the measured rows."""
    slowest = min(found, key=lambda setting: found[setting]["faster"])
    judged = []
    for setting, least in [*wanted.items(), (slowest, LEAST)]:
        if setting not in found:
            continue
        is_now = found[setting]["faster"]
        met = is_now >= least
        name = f"{setting.case}, T = {setting.frames}, beam {setting.beam}, batch {setting.batch}"
        if setting.case == SEARCH:
            name += f", CTC {setting.ctc:g}"
        if least == LEAST:
            name = f"no setting slower; least in {name}"
        print(f"bar: {name}: at least {least:g} x", end=", ")
        print(f"is {is_now:.2f}: {'met' if met else 'missed'}")
        judged.append({"setting": vars(setting), "least": least, "is": is_now, "met": met})
    return judged


def run(decoders: dict, ctc: CTC, args: argparse.Namespace) -> dict:
    """The table and its bars. Returns the numbers."""
    print("| case | batch | T | CTC | beam | rounds | stock: ms an utterance | ours: ms |", end="")
    print(" times faster | by layout of weights | identical | stock: MiB |", end="")
    print(" ours: MiB, self + cross | peak MiB |")
    print("|---" * 14 + "|", flush=True)
    found = {}
    for setting in chosen(args):
        if setting.size <= args.largest:
            found[setting] = measure(decoders, ctc, setting, args)
            print(row_of(setting, found[setting]), flush=True)
    print()
    judged = judge(found, bars(args))
    print(flush=True)
    return {"rows": [vars(s) | result for s, result in found.items()], "bars": judged}


@command
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not all(0 <= weight < 1 for weight in args.ctc):
        parser.error(f"--ctc {args.ctc}: weights lie in [0, 1); the decoder has the rest")
    if all(setting.size > args.largest for setting in chosen(args)):
        parser.error(f"--largest {args.largest} leaves no row")
    set_up_machine(parser, args)
    logging.getLogger("espnet2").setLevel(logging.ERROR)  # it warns of every maximum length
    decoders, ctc = build_sides(args)
    with torch.inference_mode():
        print_card(decoders, args)
        results = run(decoders, ctc, args)
    print(json.dumps({"benchmark": "decoding", "settings": settings(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
