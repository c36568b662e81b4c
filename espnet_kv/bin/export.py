"""Export a trained model as an ONNX graph of streaming, whose caches are inputs and outputs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.bin.model_options import add_model_options, find_model
from espnet_kv.cli import HelpFormatter, Parser, command, true_or_false, whole
from espnet_kv.errors import UserError


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = Parser(
        description="Export encoder and CTC of a trained model as an ONNX graph: features and "
        "caches in, log-probabilities and caches out. The graph is compared with the model on "
        "recordings, and only a graph that agrees is kept.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(add, Path)
    add("--output_dir", type=Path, required=True, help="directory to write")
    add(
        "--check_scp",
        type=Path,
        required=True,
        help="wav.scp of recordings to compare graph and model on, e.g. of a test set",
    )
    add(
        "--check_type",
        choices=("sound", "kaldi_ark"),
        help="type of audio; default: kaldi_ark for archive.ark:offset, else sound",
    )
    add("--check_utterances", type=whole(1), default=20, help="recordings to compare on")
    add("--chunk_size", type=whole(1), help="encoder frames in a chunk; default: the model's")
    add("--left_chunks", type=whole(-1), help="chunks of left context; default: the model's")
    add(
        "--cache_dtype",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="type of the caches; default: fp32",
    )
    add(
        "--layout",
        default="plain",
        choices=("plain", "nemo", "wenet"),
        help="inputs and outputs: of this package, or of nemo_ctc or wenet_ctc of sherpa-onnx",
    )
    add(
        "--features",
        default="model",
        choices=("model", "fitted"),
        help="features that the graph takes: the model's own, or those of sherpa-onnx, from which "
        "a map fitted on --check_scp gives the model's",
    )
    add("--int8", type=true_or_false, default=True, help="write a graph with weights in int8, too")
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Export.

    Args:
        cmd: the options; None: sys.argv.

    Raises:
        UserError: a model or an option cannot be used, or a graph disagrees with the model.
    """
    args = get_parser().parse_args(cmd)
    find_model(args, kind=Path)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Export as given by the options."""
    from espnet_kv.espnet.task import ASRTask
    from espnet_kv.export.exporter import export, read_recordings
    from espnet_kv.export.onnx_file import require_packages
    from espnet_kv.files import new_directory
    from espnet_kv.streaming.requirements import check_streams

    require_packages("onnx", "onnxruntime")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists: remove it, or give another one")
    print(f"  loading {args.asr_model_file}", flush=True)
    model, train_args = ASRTask.build_model_from_file(
        args.asr_train_config, args.asr_model_file, "cpu"
    )
    model.eval()
    check_streams(model, train_args, 1.0)
    recordings = read_recordings(model, args.check_scp, args.check_type, args.check_utterances)
    with new_directory(args.output_dir) as directory:
        export(
            model,
            recordings,
            directory,
            layout=args.layout,
            features=args.features,
            chunk_size=args.chunk_size,
            left_chunks=args.left_chunks,
            cache_dtype=args.cache_dtype,
            int8=args.int8,
        )
    print(f"  wrote {args.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
