"""espnet2.bin.lm_calc_perplexity with paths that may hold commas: same options, same files."""

import argparse
import sys
from collections.abc import Sequence

from espnet_kv.errors import command


def get_parser() -> argparse.ArgumentParser:
    """ESPnet's options."""
    from espnet2.bin import lm_calc_perplexity as espnet

    from espnet_kv.bin.options import Parser
    from espnet_kv.bin.utterances import path_name_type

    parser = Parser(
        description="Perplexity of a language model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[espnet.get_parser()],
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--data_path_and_name_and_type", type=path_name_type, required=True, action="append"
    )
    return parser


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Compute perplexities as espnet2.bin.lm_calc_perplexity does.

    Args:
        cmd: the options; sys.argv when None.
    """
    from espnet2.bin import lm_calc_perplexity as espnet

    options = vars(get_parser().parse_args(cmd))
    options.pop("config")
    espnet.calc_perplexity(**options)


if __name__ == "__main__":
    sys.exit(main())
