"""espnet2.bin.asr_inference with the plug-in registered: its options and two more, same files."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.bin.model_options import LANGUAGE_MODEL, MODEL, find_model
from espnet_kv.bin.streaming_options import check_device
from espnet_kv.cli import command
from espnet_kv.errors import UserError, one_line
from espnet_kv.espnet.parser import PAIRS, check_data, check_search, extended
from espnet_kv.files import check_writable, new_entries

FILES = ("asr_train_config", "asr_model_file", "lm_train_config", "lm_file", "ngram_file")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def get_parser() -> argparse.ArgumentParser:
    """ESPnet's options, --kv_decoder and --fast_ctc."""
    from espnet2.bin import asr_inference as espnet
    from espnet2.utils.types import str2bool

    parser = extended(espnet.get_parser(), "ASR decoding")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="Data type")
    parser.add_argument(
        "--kv_decoder",
        type=str2bool,
        default=True,
        help="Search with a true cache in place of a stock transformer or whisper decoder and a "
        "transformer language model: same hypotheses",
    )
    parser.add_argument(
        "--fast_ctc",
        type=str2bool,
        default=True,
        help="Compute CTC prefix scores of all frames at once: same scores",
    )
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Decode as espnet2.bin.asr_inference does, after loading the model strictly.

    The result files appear in --output_dir when everything is decoded.

    Args:
        cmd: the options; sys.argv when None.

    Raises:
        UserError: bad options or bad input, in one line.
    """
    args = get_parser().parse_args(cmd)
    _check(args)

    from typeguard import TypeCheckError

    options = vars(args)
    options.pop("config")
    output = Path(options.pop("output_dir"))
    ours = _ours(options.pop("kv_decoder"), options.pop("fast_ctc"), options["partial_ar"])
    with ours as espnet, new_entries(output) as partial:
        print(espnet.get_commandline_args(), file=sys.stderr)
        try:
            espnet.inference(output_dir=str(partial), **options)
        except (NotImplementedError, TypeCheckError) as error:  # options that do not go together
            raise UserError(one_line(error)) from error


def _check(args: argparse.Namespace) -> None:
    """Refuse what ESPnet would ignore, or end on long after the start."""
    from espnet2.tasks.asr import ASRTask

    check_search(args)
    check_data(args, ASRTask)
    check_device(args.ngpu)
    for name, other in PAIRS:
        if getattr(args, name) is not None and getattr(args, other) is None:
            raise UserError(f"--{name} needs --{other}")
    if args.word_lm_train_config is not None or args.word_lm_file is not None:
        raise UserError("--word_lm_train_config: ESPnet has no word language models; leave it out")
    for name in FILES:
        path = getattr(args, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name} {path} does not exist")
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file; name a directory")
    check_writable(Path(args.output_dir))
    find_model(args, (*MODEL, *LANGUAGE_MODEL))


def _ours(
    kv_decoder: bool, fast_ctc: bool, partial_ar: bool
) -> contextlib.AbstractContextManager[Any]:
    """ESPnet's inference module, which within the context works with our classes."""
    from espnet_kv.espnet import inference
    from espnet_kv.espnet.utterances import decoding_task

    class Speech2Text(inference.Speech2Text):
        def __init__(self, **options: Any):
            super().__init__(kv_decoder=kv_decoder, fast_ctc=fast_ctc, **options)

    return inference.replaced(
        inference.espnet,
        ASRTask=decoding_task(inference.search_task(kv_decoder, partial_ar)),
        Speech2Text=Speech2Text,
        _too_short_result=inference.too_short_result,
    )


def __getattr__(name: str) -> Any:
    """Import `Speech2Text` when it is used, because importing ESPnet takes seconds."""
    if name == "Speech2Text":
        from espnet_kv.espnet.inference import Speech2Text

        return Speech2Text
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
