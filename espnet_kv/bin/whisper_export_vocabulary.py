"""espnet2.bin.whisper_export_vocabulary with any openai-whisper: the same options and file."""

import sys
from collections.abc import Sequence

from espnet_kv.cli import command
from espnet_kv.errors import UserError


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Write the token list of a Whisper tokenizer.

    Args:
        cmd: ESPnet's options; None: sys.argv.

    Raises:
        UserError: openai-whisper is not installed, or ESPnet's does not know the language.
    """
    from espnet2.bin import whisper_export_vocabulary as espnet

    from espnet_kv.espnet.openai_whisper import whisper_for_espnet

    with whisper_for_espnet():
        try:
            espnet.main(cmd)
        except ValueError as error:
            raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
