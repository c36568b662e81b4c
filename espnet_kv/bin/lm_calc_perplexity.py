"""espnet2.bin.lm_calc_perplexity, with the same options and files, and strict loading."""

import argparse
import sys
from collections.abc import Sequence

from espnet_kv.cli import command


def get_parser() -> argparse.ArgumentParser:
    """ESPnet's options."""
    from espnet2.bin import lm_calc_perplexity as espnet

    from espnet_kv.espnet.parser import extended

    return extended(espnet.get_parser(), "Perplexity of a language model")


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Compute perplexities as espnet2.bin.lm_calc_perplexity does.

    Args:
        cmd: the options; None: sys.argv.
    """
    from espnet2.bin import lm_calc_perplexity as espnet

    from espnet_kv.espnet.inference import language_model_task
    from espnet_kv.espnet.parser import check_data
    from espnet_kv.espnet.replacing import replaced

    args = get_parser().parse_args(cmd)
    check_data(args, espnet.LMTask)
    options = vars(args)
    options.pop("config")
    with replaced(espnet, LMTask=language_model_task(espnet.LMTask, cached=False)):
        espnet.calc_perplexity(**options)


if __name__ == "__main__":
    sys.exit(main())
