"""espnet2.bin.lm_train, with the same options and files, and atomic saving."""

import sys
from collections.abc import Sequence

from espnet_kv.cli import command


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Train as espnet2.bin.lm_train does.

    Args:
        cmd: ESPnet's options; None: sys.argv.
    """
    from espnet_kv.espnet.training import LMTraining

    LMTraining.main(cmd=cmd)


if __name__ == "__main__":
    sys.exit(main())
