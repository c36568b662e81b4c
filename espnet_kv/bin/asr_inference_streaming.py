"""Decode a data directory piece by piece, with the options and files of ESPnet's command."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from espnet_kv.bin.options import Parser, add_streaming_options, build_recognizer
from espnet_kv.errors import UserError, command

# option of ESPnet's streaming command -> the value that leaves it out
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
    """ESPnet's options of asr_inference_streaming, and those of chunks, cache and endpoints."""
    from espnet2.bin import asr_inference_streaming as espnet

    parser = Parser(
        description="Streaming ASR decoding: CTC prefix beam search, rescored by the decoder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[espnet.get_parser()],
        conflict_handler="resolve",
    )
    add_streaming_options(parser, endpoint_silence_ms=0, max_segment_seconds=0)
    parser.add_argument(
        "--simulate_chunk_ms",
        type=float,
        default=0.0,
        help="Feed the audio in pieces of so many ms; 0 = at once. The result is the same",
    )
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Decode, and write the result files of espnet2.bin.asr_inference_streaming.

    Args:
        cmd: the options; sys.argv when None.
    """
    args = get_parser().parse_args(cmd)
    logging.basicConfig(
        level=args.log_level,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    _check(args)
    _decode(args)


def _check(args: argparse.Namespace) -> None:
    """Refuse what the search here does not do, rather than ignore it."""
    for name, unset in UNUSED.items():
        if (value := getattr(args, name)) not in (unset, "none"):
            raise UserError(
                f"--{name} {value}: streaming does not use it (CTC search and attention "
                "rescoring, one stream at a time); leave it out"
            )
    if args.simulate_chunk_ms < 0 or args.sim_chunk_length < 0:
        raise UserError("--simulate_chunk_ms, --sim_chunk_length: allowed are 0 (at once) or more")
    if args.simulate_chunk_ms and args.sim_chunk_length:
        raise UserError("--simulate_chunk_ms and --sim_chunk_length say the same: give one of them")
    paths = [path for path, _, _ in args.data_path_and_name_and_type]
    for path in (*paths, args.key_file):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{path} does not exist")


def _decode(args: argparse.Namespace) -> None:
    from espnet2.fileio.datadir_writer import DatadirWriter
    from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

    from espnet_kv.streaming.frontend import TooShortError
    from espnet_kv.streaming.meter import Meter

    set_all_random_seed(args.seed)
    recognizer = build_recognizer(args)
    meter = Meter(recognizer)
    size = args.sim_chunk_length or round(args.simulate_chunk_ms / 1000 * recognizer.sample_rate)
    with DatadirWriter(args.output_dir) as writer:
        for key, speech in _utterances(args, recognizer.asr_train_args):
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


def _utterances(args: argparse.Namespace, train_args: argparse.Namespace) -> Iterator[tuple]:
    """(key, (N,) samples) of every utterance, read as ESPnet's commands read them."""
    from espnet_kv.task import ASRTask

    key = "the beginning"
    try:
        loader = ASRTask.build_streaming_iterator(
            args.data_path_and_name_and_type,
            dtype="float32",
            batch_size=1,
            key_file=args.key_file,
            num_workers=args.num_workers,
            preprocess_fn=ASRTask.build_preprocess_fn(train_args, False),
            collate_fn=ASRTask.build_collate_fn(train_args, False),
            allow_variable_data_keys=args.allow_variable_data_keys,
            inference=True,
        )
        batches = iter(loader)
    except Exception as error:
        raise _unreadable(key, error) from error
    while True:
        try:
            (key,), batch = next(batches)
        except StopIteration:
            return
        except Exception as error:  # of libsndfile, of Kaldi archives, from worker processes
            raise _unreadable(key, error) from error
        yield key, batch["speech"][0]


def _unreadable(key: str, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(f"audio after {key} cannot be read: {lines[-1] if lines else repr(error)}")


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
