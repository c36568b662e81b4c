"""Compare profiled models: tables, figures and a page from files of espnet_kv.bin.profile.

    python -m espnet_kv.bin.report --expdir exp
    python -m espnet_kv.bin.report --output report a/profile.json b/profile.json

The last line on standard output is the path of the page.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.cli import Parser, command
from espnet_kv.errors import UserError
from espnet_kv.files import check_writable
from espnet_kv.profile.schema import read_profiles
from espnet_kv.report.write import TITLE, write_report


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    p = Parser(
        prog="python -m espnet_kv.bin.report",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("profiles", nargs="*", type=Path, metavar="PROFILE", help="a profile.json")
    p.add_argument("--expdir", type=Path, help="Take EXPDIR/*/profile/profile.json as well")
    p.add_argument("--output", type=Path, help="Directory to write to; default: EXPDIR/report")
    p.add_argument(
        "--results",
        type=Path,
        help="Markdown file for the table; its other text is kept; "
        "default: EXPDIR/RESULTS.md, or OUTPUT/RESULTS.md",
    )
    p.add_argument("--title", default=TITLE, help="Title of page and table; default: %(default)s")
    return p


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report.

    Args:
        arguments: the options; None: sys.argv.

    Raises:
        UserError: there is no profile, one is damaged, or an output cannot be written.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(arguments)
    paths, output, results = list(args.profiles), args.output, args.results
    if args.expdir is not None:
        found = sorted(args.expdir.glob("*/profile/profile.json"))
        if not found and not paths:
            raise UserError(
                f"{args.expdir} holds no */profile/profile.json: profile a model first (stage 14)"
            )
        paths += found
        output = output or args.expdir / "report"
        results = results or args.expdir / "RESULTS.md"
    if output is None:
        raise UserError("--output is missing: name a directory, or give --expdir")
    check_writable(output)
    command_line = shlex.join(["python", "-m", "espnet_kv.bin.report", *arguments])
    page = write_report(
        read_profiles(paths), output, results or output / "RESULTS.md", args.title, command_line
    )
    print(page)


if __name__ == "__main__":
    sys.exit(main())
