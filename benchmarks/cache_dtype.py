"""Effect of cache_dtype on the encoder output of trained models and on the cache size."""

import argparse
import json
import sys
from pathlib import Path

import torch
from common import positive, settings
from torch import Tensor

from espnet_kv.cache.codec import FLOATS, INTEGERS
from espnet_kv.cli import command
from espnet_kv.errors import UserError

CACHE_DTYPES = (*FLOATS, *INTEGERS)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Stream utterances with the cache in every cache_dtype; compare the output.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="+", type=Path, help="experiments of stage 11")
    add("--wav_scp", type=Path, required=True, help="audio from the recipe's dump")
    add("--utterances", type=positive, default=40, help="number of utterances, from the first on")
    add("--model", default="valid.acc.ave.pth", help="the checkpoint in each directory")
    add("--chunk_size", type=positive, default=16, help="frames in a chunk")
    add("--left_chunks", type=positive, default=4, help="chunks of left context")
    return parser


def read_waveforms(wav_scp: Path, count: int) -> list[Tensor]:
    """The first `count` utterances, (N,) samples of 16 kHz each."""
    from espnet_kv.recipe.audio import read_audio_at

    if not wav_scp.is_file():
        raise UserError(f"--wav_scp {wav_scp} does not exist")
    entries = [line.split(maxsplit=1)[1] for line in wav_scp.read_text().splitlines()]
    samples = (read_audio_at(entry, 16000).samples for entry in entries[:count])
    return [torch.from_numpy(x).float() for x in samples]


@torch.inference_mode()
def measure(experiment: Path, waveforms: list[Tensor], args: argparse.Namespace) -> dict:
    """Per cache_dtype: relative error of the encoder output, and maximum bytes of the cache."""
    from espnet_kv.streaming.recognizer import StreamingRecognizer

    recognizer = StreamingRecognizer(
        experiment / "config.yaml",
        experiment / args.model,
        chunk_size=args.chunk_size,
        left_chunks=args.left_chunks,
    )
    encoder = recognizer.asr_model.encoder
    exact: list[Tensor] = []
    result = {}
    for cache_dtype in CACHE_DTYPES:
        outputs, most = [], 0
        options = {"left_chunks": args.left_chunks, "cache_dtype": cache_dtype}
        for waveform in waveforms:
            features = recognizer.frontend(waveform, is_final=True)[None]
            state = encoder.init_state(1, chunk_size=args.chunk_size, **options)
            ys, state = encoder.forward_chunk(features, state)
            most = max(most, state.nbytes_by_kind()["attention"] + state.nbytes_by_kind()["conv"])
            rest, _ = encoder.forward_chunk(features[:, :0], state, is_final=True)
            outputs.append(torch.cat([ys, rest], dim=1)[0])
        encoded = torch.cat(outputs)  # (frames of all, D)
        exact = exact or [encoded]  # fp32 comes first
        error = ((encoded - exact[0]).norm() / exact[0].norm()).item()
        result[cache_dtype] = {"error": error, "bytes": most}
    return result


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    waveforms = read_waveforms(args.wav_scp, args.utterances)
    print(f"{len(waveforms)} utterances, chunk {args.chunk_size}, left {args.left_chunks} chunks\n")
    print("relative error of the encoder output (and bytes of cache: attention, convolutions)\n")
    print("| model |", *(f"{cache_dtype} |" for cache_dtype in CACHE_DTYPES))
    print("|---" * (1 + len(CACHE_DTYPES)) + "|")
    results = {}
    for experiment in args.experiments:
        row = results[experiment.name] = measure(experiment, waveforms, args)
        cells = (f"{cell['error']:.1e} ({cell['bytes']}) |" for cell in row.values())
        print(f"| {experiment.name} |", *cells, flush=True)
    facts = {"benchmark": "cache_dtype", "settings": settings(args), "results": results}
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    sys.exit(main())
