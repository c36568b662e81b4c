"""16 streams through an exported graph: in one batch, one by one, for each core and GiB.

How many streams a core carries in real time is the duration of a chunk divided by the time that
the batch takes for it. Features, search and network are not part of that time.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
CHUNK_MS = 10.0 * NEW
KIB, GIB = 1 << 10, 1 << 30
WEIGHTS = {"fp32": "model.onnx", "int8": "model.int8.onnx"}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Time a chunk of {STREAMS} streams through a graph, in one run and in "
        "single runs, on one thread.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", type=positive, default=12, help="encoder blocks")
    add("--rounds", type=positive, default=20, help="chunks of every stream")
    names = ["mha", "gqa", "mla", "linear"]
    add("--attentions", nargs="+", choices=ATTENTIONS, default=names)
    add("--cache_dtypes", nargs="+", default=["fp32", "int8"], help="types of the caches")
    return parser


def build_engines(encoder: Any, cache_dtype: str, folder: Path) -> dict[str, OnnxEngine]:
    """The graphs of an encoder with random CTC weights, by the type of their weights."""
    model = SimpleNamespace(
        encoder=encoder,
        ctc=CTC(VOCABULARY, encoder.output_size()).eval(),
        normalize=None,
        token_list=["x"] * VOCABULARY,
    )
    graph = StreamingGraph(model, CHUNK, LEFT_CHUNKS, cache_dtype).eval()
    about = describe(graph, VOCABULARY).model_dump_json()
    files = {weights: folder / name for weights, name in WEIGHTS.items()}
    layout = LAYOUTS["plain"](graph, VOCABULARY).eval()
    write_onnx(layout, files["fp32"], {"espnet_kv": about})
    quantize(files["fp32"], files["int8"])
    return {weights: OnnxEngine(file, model) for weights, file in files.items()}


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


def row_of(seconds: dict[str, list[float]], cache_bytes: int) -> dict[str, float]:
    """Numbers of one graph."""
    ms = {side: 1e3 * statistics.median(times) / STREAMS for side, times in seconds.items()}
    return {
        **{side: round(value, 2) for side, value in ms.items()},
        "single / batch": ratio(seconds["single"], seconds["batch"]),
        "single / half": ratio(seconds["single"], seconds["half"]),
        "streams a core": int(CHUNK_MS / ms["batch"]),
        "KiB a stream": round(cache_bytes / KIB, 1),
        "streams a GiB": GIB // cache_bytes,
    }


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)
    encoders = build_ours(args.blocks, "cpu")
    print_software()
    print_device("cpu")
    print(f"\n{STREAMS} streams, ms a chunk and stream; half: in a batch of {2 * STREAMS} rows\n")
    results = []
    for name in args.attentions:
        for cache_dtype in args.cache_dtypes:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                engines = build_engines(encoders[name], cache_dtype, Path(folder))
                for weights, engine in engines.items():
                    seconds = measure(engine, args.rounds)
                    settings = {"model": name, "weights": weights, "cache": cache_dtype}
                    row = settings | row_of(seconds, engine.description.cache_bytes)
                    if not results:
                        print("|", " | ".join(row), "|")
                        print("|---" * len(row) + "|")
                    print("|", " | ".join(map(str, row.values())), "|", flush=True)
                    results.append(row)
    print(json.dumps({"benchmark": "graph_streams", "settings": vars(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
