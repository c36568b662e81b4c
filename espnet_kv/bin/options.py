"""What the commands that stream share: their parser, options and the recognizer made of them."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from espnet2.utils import config_argparse
from espnet2.utils.types import str_or_none

from espnet_kv.errors import UserError

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
    "token_type",
    "bpemodel",
    "dtype",
)
"""Options that a recognizer takes under their own name."""


class Parser(config_argparse.ArgumentParser):
    """ESPnet's parser with --config; what is wrong is told in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, also where --config names a broken file."""
        try:
            return super().parse_args(args, namespace)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config: {' '.join(str(error).split())}") from error


def add_streaming_options(
    parser: argparse.ArgumentParser, endpoint_silence_ms: float, max_segment_seconds: float
) -> None:
    """Add the options of the encoder's chunks and cache, and of endpoints.

    Args:
        endpoint_silence_ms, max_segment_seconds: their defaults.
    """
    group = parser.add_argument_group("Streaming related")
    add = group.add_argument
    add("--chunk_size", type=int, help="Encoder frames in a chunk; default: the model's own")
    add(
        "--left_chunks",
        type=int,
        help="Chunks before its own that a frame sees, -1 = all; default: the model's own",
    )
    add(
        "--cache_dtype",
        type=str_or_none,
        help="fp32, fp16, bf16, int8 or int4 for the encoder's cache; default: the model's type",
    )
    add(
        "--endpoint_silence_ms",
        type=float,
        default=endpoint_silence_ms,
        help="A pause of so many ms makes the words before it final; 0 = no pause does",
    )
    add(
        "--max_segment_seconds",
        type=float,
        default=max_segment_seconds,
        help="So many seconds without a pause do, too; 0 = any number",
    )


def build_recognizer(args: argparse.Namespace) -> Any:
    """The recognizer that `args` describe.

    Raises:
        UserError: the model or the options cannot be used, or there is no GPU.
    """
    import torch

    from espnet_kv.streaming.recognizer import StreamingRecognizer

    if args.ngpu > 1:
        raise UserError(f"--ngpu {args.ngpu}: a stream is decoded on one GPU at most")
    if args.ngpu and not torch.cuda.is_available():
        raise UserError(f"--ngpu {args.ngpu}: no GPU was found; leave it out to use the CPU")
    options = {name: getattr(args, name) for name in RECOGNIZER if hasattr(args, name)}
    return StreamingRecognizer(**options, device="cuda" if args.ngpu else "cpu")
