"""Decode a data directory in streaming, with the options and files of ESPnet's command."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.bin.model_options import MODEL, TAG_HELP, find_model
from espnet_kv.bin.streaming_options import add_streaming_options, build_recognizer
from espnet_kv.cli import command
from espnet_kv.errors import UserError
from espnet_kv.espnet.parser import check_data, check_search, extended
from espnet_kv.espnet.task import ASRTask
from espnet_kv.espnet.utterances import decoding_task
from espnet_kv.files import check_writable, new_entries

LONGEST_MS = 86_400_000  # a day
DTYPES = ("float16", "bfloat16", "float32", "float64")
# unsupported options of ESPnet's streaming command -> their only allowed value
UNUSED: dict[str, Any] = {
    "lm_train_config": None,
    "lm_file": None,
    "word_lm_train_config": None,
    "word_lm_file": None,
    "maxlenratio": 0.0,
    "minlenratio": 0.0,
    "batch_size": 1,
    "normalize_length": False,
    "disable_repetition_detection": False,
    "encoded_feat_length_limit": 0,
    "decoder_text_length_limit": 0,
}


def get_parser() -> argparse.ArgumentParser:
    """ESPnet's options of asr_inference_streaming, and options of chunks, cache and endpoints."""
    from espnet2.bin import asr_inference_streaming as espnet

    parser = extended(
        espnet.get_parser(),
        "Streaming ASR decoding: CTC prefix beam search with rescoring by the decoder",
    )
    for action in parser._actions:
        if action.dest in MODEL:  # a pack may take their place
            action.required = False
    parser.add_argument("--model_tag", help=TAG_HELP)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="Data type")
    add_streaming_options(parser, endpoint_silence_ms=0, max_segment_seconds=0)
    parser.add_argument(
        "--simulate_chunk_ms",
        type=float,
        default=0.0,
        help="Length of the pieces of audio in ms; 0 = whole utterances. The result is the same",
    )
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Decode, and write the result files of espnet2.bin.asr_inference_streaming.

    Args:
        cmd: the options; None: sys.argv.
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    _check(args)
    _decode(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse unsupported options instead of ignoring them."""
    for name, unset in UNUSED.items():
        if (value := getattr(args, name)) not in (unset, "none"):
            raise UserError(
                f"--{name} {value}: streaming does not use it (CTC search and attention "
                "rescoring, one stream at a time); leave it out"
            )
    check_search(args)
    check_data(args, ASRTask)
    if not 0 <= args.simulate_chunk_ms <= LONGEST_MS or args.sim_chunk_length < 0:
        raise UserError(
            "--simulate_chunk_ms, --sim_chunk_length: allowed: 0 (at once) or more, at "
            f"most {LONGEST_MS} ms"
        )
    if args.simulate_chunk_ms and args.sim_chunk_length:
        raise UserError("--simulate_chunk_ms and --sim_chunk_length exclude each other: give one")
    paths = [path for path, _, _ in args.data_path_and_name_and_type]
    for path in (*paths, args.key_file):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{path} does not exist")
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file; name a directory")
    check_writable(Path(args.output_dir))
    find_model(args)


def _decode(args: argparse.Namespace) -> None:
    from espnet2.fileio.datadir_writer import DatadirWriter
    from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

    from espnet_kv.streaming.frontend import TooShortError
    from espnet_kv.streaming.meter import Meter

    set_all_random_seed(args.seed)
    recognizer = build_recognizer(args)
    meter = Meter(recognizer)
    size = args.sim_chunk_length or round(args.simulate_chunk_ms / 1000 * recognizer.sample_rate)
    task = decoding_task(ASRTask)
    loader = task.build_streaming_iterator(
        args.data_path_and_name_and_type,
        dtype="float32",
        batch_size=1,
        key_file=args.key_file,
        num_workers=args.num_workers,
        preprocess_fn=task.build_preprocess_fn(recognizer.asr_train_args, False),
        collate_fn=task.build_collate_fn(recognizer.asr_train_args, False),
        allow_variable_data_keys=args.allow_variable_data_keys,
        inference=True,
    )
    with new_entries(Path(args.output_dir)) as partial, DatadirWriter(partial) as writer:
        for (key,), batch in loader:
            speech = batch["speech"][0]
            segments = []
            try:
                pieces = speech.split(size or max(1, len(speech)))
                for number, piece in enumerate(pieces, start=1):
                    segments += meter.accept(piece, is_final=number == len(pieces))
            except TooShortError as error:
                logging.warning(f"{key}: {error}; its text is left empty")
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
            results = recognizer.join(segments)
            _write(writer, key, results)
            logging.info(f"{key}: {results[0][0]}")
    logging.info(meter.summary())


def _write(writer: Any, key: str, results: list[tuple]) -> None:
    for n, (text, token, token_int, hypothesis) in enumerate(results, start=1):
        best = writer[f"{n}best_recog"]
        best["token"][key] = " ".join(token)
        best["token_int"][key] = " ".join(map(str, token_int))
        best["score"][key] = str(hypothesis.score)
        if text is not None:
            best["text"][key] = text


if __name__ == "__main__":
    sys.exit(main())
