"""Time of a streaming chunk as an exported graph, compared with torch, ESPnet and bare products.

All sides run in every round, and a ratio is the median over rounds of the ratios within a round, so
that other load on the machine affects all sides.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import (
    MELS,
    by_side,
    positive,
    print_device,
    print_software,
    ratio,
    rounds,
    settings,
)
from sides import (
    ATTENTIONS,
    CHUNK,
    ESPNET,
    NEW,
    OVERLAP,
    STRIDE,
    Espnet,
    Ours,
    build_espnet,
    build_ours,
)
from streaming import noise
from torch import Tensor, nn

from espnet_kv.cli import command
from espnet_kv.packed import pack_weights

VOCABULARY = 500
TORCH, PACKED, FP32, INT8 = "torch", "torch packed", "onnx fp32", "onnx int8"
LIMIT = "products"
# (side, other side, highest ratio)
BARS = ((PACKED, TORCH, 0.90), (FP32, TORCH, 0.55), (INT8, TORCH, 0.40), (INT8, LIMIT, 1.5))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time a chunk of one stream through the encoder and CTC of the full size, in "
        "torch, as exported graphs in onnxruntime, as its bare matrix products, and through "
        "ESPnet's asr_transducer, with one thread.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", type=positive, default=12, help="encoder blocks")
    add("--attentions", nargs="+", choices=list(ATTENTIONS), default=["mha", "mla"])
    add("--left", type=positive, nargs="+", default=[64, 256], help=f"frames, in chunks of {CHUNK}")
    add("--chunks", type=positive, default=4, help="consecutive chunks per side and round")
    add("--rounds", type=positive, default=40)
    return parser


class Torch(Ours):
    """`forward_chunk` and CTC."""

    def __init__(self, encoder: Any, ctc: Any, left_chunks: int, features: Tensor):
        self._ctc = ctc
        super().__init__(encoder, left_chunks, features)

    def step(self, xs: Tensor) -> Tensor:
        ys = super().step(xs)
        return self._ctc.log_softmax(ys) if ys.size(1) else ys


class Graph:
    """An exported graph in onnxruntime, whose caches pass from chunk to chunk."""

    first = STRIDE
    window = NEW + OVERLAP

    def __init__(self, path: Path, inputs: tuple[Tensor, ...]):
        from espnet_kv.export.onnx_file import open_graph

        self._session = open_graph(path, threads=1)
        self._frames, self._lengths = torch.tensor([0]), torch.tensor([CHUNK])
        self._caches = [torch.zeros_like(cache[:1]) for cache in inputs[3:]]

    pieces = Ours.pieces
    run = Ours.run

    def step(self, xs: Tensor) -> Tensor:
        from espnet_kv.export.onnx_file import run_graph

        outputs = run_graph(self._session, [xs, self._frames, self._lengths, *self._caches])
        self._caches = outputs[2:]
        self._frames = self._frames + CHUNK
        return outputs[0]


class Products:
    """The matrix products of a chunk alone: each layer's weights once, of the given frames.

    Those of attention between queries and keys, the depthwise convolutions and everything that is
    no product are left out. So the time is a lower limit, at the rate at which torch multiplies
    matrices of these sizes and reads these weights from memory.
    """

    def __init__(self, encoder: Any, ctc: Any):
        self._products = []
        for module in [*encoder.modules(), *ctc.modules()]:
            rows = CHUNK
            if isinstance(module, nn.Conv2d):
                # of the two convolutions of stride 2, the first has twice the frames and bands
                is_first = module.in_channels == 1
                scale, overlap = (2, 1) if is_first else (1, 0)
                bands = (MELS - 1) // 2 if is_first else ((MELS - 1) // 2 - 1) // 2
                rows = (CHUNK * scale + overlap) * bands
            pointwise = isinstance(module, nn.Conv1d) and module.kernel_size == (1,)
            if isinstance(module, nn.Linear | nn.Conv2d) or pointwise:
                weight = module.weight.detach().flatten(1)
                self._products.append((torch.randn(rows, weight.size(1)), weight.t()))

    def run(self) -> None:
        for x, weight in self._products:
            torch.mm(x, weight)


def export(encoder: Any, ctc: Any, left_chunks: int, folder: Path) -> dict[str, Graph]:
    """The graphs in fp32 and int8."""
    from espnet_kv.export.graph import StreamingGraph
    from espnet_kv.export.layouts import LAYOUTS
    from espnet_kv.export.onnx_file import quantize, write_onnx

    model = SimpleNamespace(encoder=encoder, ctc=ctc, normalize=None)
    layout = LAYOUTS["plain"](StreamingGraph(model, CHUNK, left_chunks, None).eval(), VOCABULARY)
    files = {FP32: folder / "model.onnx", INT8: folder / "model.int8.onnx"}
    write_onnx(layout.eval(), files[FP32], {})
    quantize(files[FP32], files[INT8])
    return {name: Graph(file, layout.example(1)) for name, file in files.items()}


def measure(name: str, encoder: Any, left: int, args: argparse.Namespace) -> dict:
    """Time the sides with a full left context; print a row of each."""
    from espnet2.asr.ctc import CTC

    torch.manual_seed(0)
    ctc = CTC(VOCABULARY, encoder.output_size()).eval()
    left_chunks = left // CHUNK
    features = noise("cpu", left_chunks + 1 + args.chunks)
    packed = copy.deepcopy(encoder), copy.deepcopy(ctc)
    for module in packed:  # as TorchEngine does
        pack_weights(module)
    sides: dict[str, Any] = {
        TORCH: Torch(encoder, ctc, left_chunks, features),
        PACKED: Torch(*packed, left_chunks, features),
    }
    with tempfile.TemporaryDirectory() as folder:
        sides |= export(encoder, ctc, left_chunks, Path(folder))
    if name == "mha":
        sides[ESPNET] = Espnet(build_espnet(encoder), left_chunks, features)
    pieces = {side: stream.pieces(features) for side, stream in sides.items()}
    outputs = {side: [sides[side].step(x) for x in pieces[side]][-1] for side in (TORCH, FP32)}
    difference = float((outputs[TORCH] - outputs[FP32]).abs().max())
    for side in sides.keys() - outputs.keys():
        sides[side].run(pieces[side])
    runs = {side: partial(s.run, pieces[side][-args.chunks :]) for side, s in sides.items()}
    products = Products(encoder, ctc)
    runs[LIMIT] = lambda: [products.run() for _ in range(args.chunks)]
    spent = by_side(list(rounds(runs, "cpu", args.rounds)))
    ms = {
        side: round(1e3 * statistics.median(times) / args.chunks, 2)
        for side, times in spent.items()
    }
    for side in spent:
        ratios = [f"{ratio(spent[side], spent[other]):.3f}" for other in (TORCH, LIMIT)]
        print(f"| {name} | {left} | {side} | {ms[side]:.2f} | {' | '.join(ratios)} |", flush=True)
    bars = []
    for side, other, most in BARS:
        is_now = ratio(spent[side], spent[other])
        bars.append({"side": side, "other": other, "most": most, "is": is_now})
    return {
        "attention": name,
        "left": left,
        "ms": ms,
        "bars": bars,
        "difference": difference,
        "ratio_to_torch": {side: ratio(spent[side], spent[TORCH]) for side in spent},
    }


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)
    encoders = build_ours(args.blocks, "cpu")
    print(f"encoder   conformer of conf/, {args.blocks} blocks, chunks of {CHUNK} frames")
    print_software()
    print_device("cpu")
    print("\n| attention | left | side | median ms a chunk | x torch | x products |")
    print("|---" * 6 + "|")
    with torch.inference_mode():
        results = [
            measure(name, encoders[name], left, args)
            for name in args.attentions
            for left in args.left
        ]
    print()
    for row in results:
        for bar in row["bars"]:
            verdict = "met" if bar["is"] <= bar["most"] else "missed"
            print(
                f"bar: {row['attention']}, left {row['left']}: {bar['side']} at most "
                f"{bar['most']} x {bar['other']}, is {bar['is']:.3f}: {verdict}"
            )
    print(json.dumps({"benchmark": "serving", "settings": settings(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
