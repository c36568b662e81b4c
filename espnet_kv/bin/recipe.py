"""Write the recipe's files to a new directory, to train models where there is no clone.

    python -m espnet_kv recipe my_experiments
    cd my_experiments/egs2/librispeech_100_kv/asr1 && ./run.sh --help

The directory has the folders of an ESPnet checkout: egs2/librispeech_100_kv/asr1 for ESPnet2 and
egs3/librispeech_100_kv/asr for ESPnet3. The scripts run this package, with this or any other Python
that has it: activate its environment, or set the variable python.
"""

import argparse
import glob
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.cli import Parser, command
from espnet_kv.errors import UserError
from espnet_kv.files import PACKAGE, check_writable, new_directory


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    p = Parser(
        prog="python -m espnet_kv recipe",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("dir", type=Path, metavar="DIR", help="Directory to write; new, or empty")
    return p


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the recipe's files below DIR, or nothing.

    Args:
        arguments: the options; None: sys.argv.

    Raises:
        UserError: DIR holds something, or is the current directory, which cannot be replaced.
    """
    directory = parser().parse_args(arguments).dir
    dst = directory.resolve()  # rmtree refuses a link to a directory
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory: name a new one")
    if dst == Path.cwd():
        raise UserError(f"{directory} is the current directory: name a new one in it")
    check_writable(dst)
    # setup.py packs the same files; glob also descends into links, as it does there
    patterns = (PACKAGE / "recipe_files.txt").read_text(encoding="utf-8").split()
    with new_directory(dst) as partial:
        for pattern in patterns:
            for name in glob.glob(pattern, root_dir=PACKAGE, recursive=True):
                file = partial / name
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PACKAGE / name, file)  # with the executable bit
    for name in sorted(glob.glob("egs*/*/*", root_dir=dst)):
        print(directory / name)


if __name__ == "__main__":
    sys.exit(main())
