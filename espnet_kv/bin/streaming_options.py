"""Shared by decoding commands: streaming options, checks of options, building the recognizer."""

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espnet2.utils.types import str_or_none

from espnet_kv.errors import UserError

if TYPE_CHECKING:
    from espnet_kv.streaming.engine import EngineBuilder

RECOGNIZER = (
    "asr_train_config",
    "asr_model_file",
    "chunk_size",
    "left_chunks",
    "cache_dtype",
    "beam_size",
    "ctc_weight",
    "penalty",
    "nbest",
    "endpoint_silence_ms",
    "max_segment_seconds",
    "hotwords",
    "hotwords_score",
    "token_type",
    "bpemodel",
    "dtype",
)
"""Options with the name of an argument of StreamingRecognizer."""


def add_streaming_options(
    parser: argparse.ArgumentParser,
    endpoint_silence_ms: float,
    max_segment_seconds: float,
    cache_default: str = "the model's type",
) -> None:
    """Add the options of chunks, cache, endpoints and hotwords.

    Args:
        endpoint_silence_ms, max_segment_seconds: defaults of these options.
        cache_default: what the help says of --cache_dtype, whose default is None.
    """
    group = parser.add_argument_group("Streaming related")
    add = group.add_argument
    add("--chunk_size", type=int, help="Encoder frames in a chunk; default: the model's setting")
    add(
        "--left_chunks",
        type=int,
        help="Chunks of left context, -1 = all; default: the model's setting",
    )
    add(
        "--cache_dtype",
        type=str_or_none,
        help=f"fp32, fp16, bf16, int8 or int4 for the encoder's cache; default: {cache_default}",
    )
    add(
        "--endpoint_silence_ms",
        type=float,
        default=endpoint_silence_ms,
        help="Length of a pause that ends a segment, in ms; 0 = pauses do not",
    )
    add(
        "--max_segment_seconds",
        type=float,
        default=max_segment_seconds,
        help="Maximum length of a segment; 0 = no limit",
    )
    add(
        "--hotwords",
        type=str_or_none,
        help="File of phrases that the search prefers, one per line, optionally with a tab and a "
        "score per token",
    )
    add(
        "--hotwords_score",
        type=float,
        default=1.5,
        help="Score per token of a phrase without a score in the file",
    )
    add(
        "--engine",
        default="torch",
        choices=("torch", "onnx"),
        help="What runs encoder and CTC: PyTorch, or an exported graph in onnxruntime",
    )
    add(
        "--onnx_model",
        type=str_or_none,
        help="The graph of --engine onnx; default: onnx/model.onnx beside the model file",
    )


def add_live_options(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """Add the options of `stream` and `serve`: device, search, and `add_streaming_options`.

    Args:
        defaults: cache_default, see `add_streaming_options`.
    """
    add = parser.add_argument
    add("--ngpu", type=int, default=0, help="0 = CPU")
    add("--dtype", default="float32", help="float16, bfloat16, float32 or float64")
    add("--beam_size", type=int, default=10, help="Prefixes in the CTC beam; 1 = greedy")
    add("--ctc_weight", type=float, default=0.7, help="1.0 = CTC alone, without rescoring")
    add("--penalty", type=float, default=0.0, help="Added to the score for every token")
    add("--token_type", choices=["char", "bpe"], help="Default: the model's")
    add("--bpemodel", help="Sentencepiece model; default: the model's")
    # audio may be endless and without pauses, so the length of a segment is limited
    add_streaming_options(parser, endpoint_silence_ms=1000, max_segment_seconds=30, **defaults)


def build_recognizer(args: argparse.Namespace) -> Any:
    """Build the recognizer of the options `args`.

    Raises:
        UserError: the model or the options cannot be used, or there is no GPU.
    """
    from espnet_kv.streaming.recognizer import StreamingRecognizer

    engine = _engine(args)
    check_device(args.ngpu)
    options = {name: getattr(args, name) for name in RECOGNIZER if hasattr(args, name)}
    device = "cuda" if args.ngpu else "cpu"
    return StreamingRecognizer(**options, engine=engine, device=device)


def _engine(args: argparse.Namespace) -> "EngineBuilder":
    """What --engine names.

    Raises:
        UserError: another option does not go with it.
    """
    if args.engine == "torch":
        from espnet_kv.streaming.engine import TorchEngine

        if args.onnx_model is not None:
            raise UserError(f"--onnx_model {args.onnx_model}: goes with --engine onnx")
        return TorchEngine
    if args.ngpu:
        raise UserError(f"--ngpu {args.ngpu}: --engine onnx runs on the CPU; leave it out")
    from espnet_kv.export.onnx_engine import OnnxEngine

    graph = args.onnx_model or Path(args.asr_model_file).parent / "onnx/model.onnx"
    return functools.partial(OnnxEngine, Path(graph))


def check_device(ngpu: int) -> None:
    """Check the option --ngpu.

    Raises:
        UserError: it is not 0 or 1, or there is no GPU.
    """
    import torch

    if ngpu not in (0, 1):
        raise UserError(f"--ngpu {ngpu}: allowed: 0 (CPU) and 1; a model decodes on one GPU")
    if ngpu and not torch.cuda.is_available():
        raise UserError(f"--ngpu {ngpu}: no GPU was found; leave it out to use the CPU")
