"""Speed and bytes of one latent for the cross-attention of all layers of a Whisper decoder.

All sides search in ESPnet's BatchBeamSearch with the same weights in every round, and a ratio is
the median over rounds of the ratios within a round.

Shape letters: K hypotheses, T encoder frames, D model size.
"""

import argparse
import copy
import json
import logging
import statistics
import sys
from types import SimpleNamespace
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
from decoding import NEVER, SEARCH, SearchSide, Setting
from espnet2.asr.ctc import CTC
from whisper_sides import build_decoders

from espnet_kv.cli import command
from espnet_kv.convert.factorize import to_mla, to_shared_mla
from espnet_kv.convert.modules import plain_attention, put_in_place
from espnet_kv.convert.source import PARTS

KEYS, EACH, ONE = "mha", "mla, a latent for each layer", "mla, one latent for all layers"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time searches with one latent of the model's size for cross-attention of all "
        "layers, with latents of each layer that have as many numbers together, and with mha.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--whisper", default="tiny", metavar="NAME", help="sizes of a public model, or a file")
    add("--tokens", type=positive, default=40, help="tokens to decode")
    add("--rounds", type=positive, default=5)
    add("--frames", nargs="+", type=positive, default=[1500], metavar="T")
    add("--beams", nargs="+", type=positive, default=[1, 5, 10], metavar="K")
    add_machine_options(parser)
    return parser


def build_sides(args: argparse.Namespace) -> dict[str, Any]:
    """Decoders by name; the first two have the same outputs."""
    torch.manual_seed(0)
    _, _, plain = build_decoders(args.whisper, NEVER)
    args.size, args.sos, args.vocabulary = plain.dims["n_text_state"], 0, plain.dims["n_vocab"]
    part, sides = PARTS["decoder_cross"], {}
    for name in (KEYS, ONE, EACH):
        model: Any = SimpleNamespace(decoder=copy.deepcopy(plain))
        named = {n: plain_attention(a) for n, a in part.attentions(model).items()}
        if name == ONE:
            made = to_shared_mla(list(named.values()), args.size)
        else:
            made = [to_mla(attention, args.size // len(named)) for attention in named.values()]
        if name != KEYS:
            put_in_place(part.slots(model), dict(zip(named, made, strict=True)))
        model.decoder.prepare_search()
        sides[name] = model.decoder.eval().to(args.device)
    return sides


def measure(decoders: dict, ctc: CTC, setting: Setting, args: argparse.Namespace) -> dict:
    """Measure one row."""
    sides = {name: SearchSide(decoder, ctc, setting, args) for name, decoder in decoders.items()}
    for side in sides.values():
        side.warm_up()
    timings = list(rounds({n: side.run for n, side in sides.items()}, args.device, args.rounds))
    seconds = by_side(timings)
    same, difference = sides[ONE].check(sides[KEYS])
    return {
        "ms": {name: round(1e3 * statistics.median(s), 1) for name, s in seconds.items()},
        "slower": {name: ratio(s, seconds[KEYS]) for name, s in seconds.items()},
        "bytes": {name: side.nbytes()["cross"] for name, side in sides.items()},
        "identical": same,
        "difference": difference,
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    set_up_machine(parser, args)
    args.fast_ctc = False
    logging.getLogger("espnet2").setLevel(logging.ERROR)  # it warns of every maximum length
    decoders = build_sides(args)
    print(f"decoder   Whisper {args.whisper}, {args.tokens} tokens, noise as encoder output")
    print_software()
    print_device(args.device)
    print("\n| T | beam | cross-attention | bytes | ms | time / mha | same texts as mha |")
    print("|---:|---:|---|---:|---:|---:|---|", flush=True)
    rows = []
    with torch.inference_mode():
        ctc = CTC(args.vocabulary, args.size).eval().to(args.device)
        for frames in args.frames:
            for beam in args.beams:
                found = measure(decoders, ctc, Setting(SEARCH, frames, beam, 0.0, 1), args)
                rows.append({"frames": frames, "beam": beam} | found)
                for name, ms in found["ms"].items():
                    cells = [frames, beam, name, found["bytes"][name], ms, found["slower"][name]]
                    same = ("yes" if found["identical"] else "no") if name == ONE else ""
                    print(f"| {' | '.join(map(str, cells))} | {same} |", flush=True)
    print(json.dumps({"benchmark": "cross_latent", "settings": settings(args), "results": rows}))


if __name__ == "__main__":
    sys.exit(main())
