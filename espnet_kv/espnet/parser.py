"""ESPnet's parsers of options, with errors of one line."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from espnet2.utils import config_argparse

from espnet_kv.cli import HelpFormatter
from espnet_kv.errors import UserError, one_line


class Parser(config_argparse.ArgumentParser):
    """ESPnet's parser with --config; it raises UserError with a message of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse options; an unreadable file in --config is a UserError."""
        try:
            return super().parse_args(args, namespace)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config: {one_line(error)}") from error


def extended(parser: argparse.ArgumentParser, description: str) -> Parser:
    """Extend ESPnet's parser of a decoding command by our errors and by paths with commas."""
    for action in parser._actions:
        # some of ESPnet's help texts have a bare %, at which --help would fail
        action.help = re.sub(r"%(?![(%])", "%%", action.help or "")
    ours = Parser(
        description=description,
        formatter_class=HelpFormatter,
        parents=[parser],
        conflict_handler="resolve",
    )
    ours.add_argument(
        "--data_path_and_name_and_type", type=path_name_type, required=True, action="append"
    )
    return ours


def path_name_type(text: str) -> tuple[str, str, str]:
    """Type of ESPnet's --data_path_and_name_and_type: PATH,NAME,TYPE; PATH may contain commas.

    A list in a YAML is passed as its text, with brackets and quotes.
    """
    words = text.strip()
    if words[:1] in tuple("([") and words[-1:] in tuple(")]"):
        words = words[1:-1]
    parts = [part.strip() for part in words.rsplit(",", 2)]
    parts = [p[1:-1] if len(p) > 1 and p[0] == p[-1] and p[0] in "'\"" else p for p in parts]
    if len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PATH,NAME,TYPE, e.g. wav.scp,speech,sound"
        )
    path, name, kind = parts
    return path, name, kind
