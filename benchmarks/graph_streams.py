"""16 streams through an exported graph in one batch compared with 16 single streams."""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from common import MELS, by_side, positive, print_device, print_software, ratio, rounds
from espnet2.asr.ctc import CTC
from sides import ATTENTIONS, NEW, build_ours

from espnet_kv.cli import command
from espnet_kv.export.exporter import describe
from espnet_kv.export.graph import StreamingGraph
from espnet_kv.export.layouts import LAYOUTS
from espnet_kv.export.onnx_engine import OnnxEngine
from espnet_kv.export.onnx_file import quantize, write_onnx

STREAMS, VOCABULARY = 16, 500
CHUNK, LEFT_CHUNKS = 16, 4


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Time a chunk of {STREAMS} streams through a graph, in one run and in "
        "single runs, on one thread.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", type=positive, default=12, help="encoder blocks")
    add("--rounds", type=positive, default=20, help="chunks of every stream")
    add("--attentions", nargs="+", choices=ATTENTIONS, default=["mha", "mla", "linear"])
    return parser


def measure(engine: OnnxEngine, most: int) -> dict[str, list[float]]:
    """Seconds of a chunk of all streams, by side."""
    new = torch.randn(STREAMS, NEW, MELS)
    spread = torch.zeros(2 * STREAMS, NEW, MELS)
    spread[::2] = new  # every other row waits
    batch, half = engine.init_state(STREAMS), engine.init_state(2 * STREAMS)
    singles = [engine.init_state() for _ in range(STREAMS)]

    def single() -> None:
        for features, state in zip(new, singles, strict=True):
            engine.encode(features, state, False)

    runs = {
        "single": single,
        "batch": lambda: engine.encode_rows(new, batch, [False] * STREAMS, [NEW] * STREAMS),
        "half": lambda: engine.encode_rows(spread, half, [False] * 2 * STREAMS, [NEW, 0] * STREAMS),
    }
    warm = LEFT_CHUNKS + 2
    return by_side(list(rounds(runs, "cpu", warm + most))[warm:])


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)
    encoders = build_ours(args.blocks, "cpu")
    print_software()
    print_device("cpu")
    print(f"\n{STREAMS} streams, ms a chunk and stream; half: in a batch of {2 * STREAMS} rows\n")
    print("| model | weights | single | batch | half | single / batch | single / half |")
    print("|---" * 7 + "|")
    results = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name in args.attentions:
            encoder = encoders[name]
            model = SimpleNamespace(
                encoder=encoder,
                ctc=CTC(VOCABULARY, encoder.output_size()).eval(),
                normalize=None,
                token_list=["x"] * VOCABULARY,
            )
            graph = StreamingGraph(model, CHUNK, LEFT_CHUNKS).eval()
            files = {"fp32": Path(folder) / "fp32.onnx", "int8": Path(folder) / "int8.onnx"}
            about = describe(graph, VOCABULARY).model_dump_json()
            write_onnx(
                LAYOUTS["plain"](graph, VOCABULARY).eval(), files["fp32"], {"espnet_kv": about}
            )
            quantize(files["fp32"], files["int8"])
            for weights, path in files.items():
                seconds = measure(OnnxEngine(path, model), args.rounds)
                ms = {s: 1e3 * statistics.median(t) / STREAMS for s, t in seconds.items()}
                gains = [ratio(seconds["single"], seconds[side]) for side in ("batch", "half")]
                cells = [*(f"{value:.1f}" for value in ms.values()), *(f"{g:.2f}" for g in gains)]
                print("|", " | ".join([name, weights, *cells]), "|", flush=True)
                results[f"{name} {weights}"] = {"ms": ms, "gains": gains}
    print(json.dumps({"benchmark": "graph_streams", "settings": vars(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
