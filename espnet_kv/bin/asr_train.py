"""espnet2.bin.asr_train with our classes, the same options and files, and atomic saving."""

import sys
from collections.abc import Sequence

from espnet_kv.cli import command


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Train as espnet2.bin.asr_train does.

    Args:
        cmd: ESPnet's options; None: sys.argv.
    """
    from espnet_kv.espnet.training import ASRTraining

    ASRTraining.main(cmd=cmd)


if __name__ == "__main__":
    sys.exit(main())
