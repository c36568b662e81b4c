"""espnet2.bin.asr_inference with the plug-in registered: same options, same files."""

import sys
from collections.abc import Sequence

from espnet_kv.errors import command


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Decode as espnet2.bin.asr_inference does, after loading the model strictly.

    Args:
        cmd: ESPnet's options; sys.argv when None.
    """
    from espnet2.bin import asr_inference as espnet

    from espnet_kv.task import ASRTask

    espnet.ASRTask = ASRTask  # what its Speech2Text builds models with, in this process
    espnet.main(cmd)


if __name__ == "__main__":
    sys.exit(main())
