"""espnet2.bin.asr_inference with the plug-in registered: its options and two more, same files."""

import argparse
import sys
from collections.abc import Sequence

from espnet_kv.errors import command


def get_parser() -> argparse.ArgumentParser:
    """ESPnet's options, --kv_decoder and --fast_ctc."""
    from espnet2.bin import asr_inference as espnet
    from espnet2.utils.types import str2bool

    parser = espnet.get_parser()
    parser.add_argument(
        "--kv_decoder",
        type=str2bool,
        default=True,
        help="Search with a true cache in place of a stock transformer decoder: same hypotheses",
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

    Args:
        cmd: the options; sys.argv when None.
    """
    from espnet2.bin import asr_inference as espnet

    from espnet_kv.decoder.ctc_prefix import FastCTCPrefixScorer
    from espnet_kv.task import ASRTask, CachedDecodingTask

    print(espnet.get_commandline_args(), file=sys.stderr)
    options = vars(get_parser().parse_args(cmd))
    options.pop("config")
    # what its Speech2Text builds models with, in this process
    cached = options.pop("kv_decoder") and not options["partial_ar"]  # a search of another kind
    espnet.ASRTask = CachedDecodingTask if cached else ASRTask
    stock_scorer = espnet.CTCPrefixScorer
    if options.pop("fast_ctc"):
        espnet.CTCPrefixScorer = FastCTCPrefixScorer
    try:
        espnet.inference(**options)
    finally:
        espnet.CTCPrefixScorer = stock_scorer


if __name__ == "__main__":
    sys.exit(main())
