"""ESPnet's parsers of options, with errors of one line."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from espnet2.utils import config_argparse

from espnet_kv.cli import HelpFormatter
from espnet_kv.errors import ArgumentError, UserError, one_line

PAIRS = (("lm_file", "lm_train_config"), ("lm_train_config", "lm_file"))
"""The first option of a pair has no effect without the second."""
COUNTS = {
    "beam_size": (1, 10_000),
    "nbest": (1, 10_000),
    "batch_size": (1, 100_000),
    "num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "ctc_window_margin": (0, 10**9),
}
"""Options that are integers -> their range."""
NUMBERS = {
    "ctc_weight": (0.0, 1.0),
    "lm_weight": (-math.inf, math.inf),
    "ngram_weight": (-math.inf, math.inf),
    "penalty": (-math.inf, math.inf),
    "maxlenratio": (-1e6, 1e6),
    "minlenratio": (-1e6, 1e6),
    "endpoint_silence_ms": (0.0, math.inf),
    "max_segment_seconds": (0.0, math.inf),
}
"""Options that are numbers -> their range."""


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


def check_data(args: argparse.Namespace, task: Any) -> None:
    """Check names and types in --data_path_and_name_and_type.

    Args:
        task: ESPnet's task, which knows the names of its data.

    Raises:
        ArgumentError: says which are allowed.
    """
    from espnet2.train.dataset import DATA_TYPES  # takes seconds

    option, given = "data_path_and_name_and_type", args.data_path_and_name_and_type
    names = [name for _, name, _ in given]
    required = task.required_data_names(False, True)
    allowed = {*required, *task.optional_data_names(False, True)}
    if missing := [name for name in required if name not in names]:
        raise ArgumentError(option, f"one must have the name {missing[0]}: PATH,{missing[0]},TYPE")
    for path, name, kind in given:
        text = f"{path},{name},{kind}"
        if name not in allowed and not args.allow_variable_data_keys:
            raise ArgumentError(option, f"{text}: allowed names: {', '.join(sorted(allowed))}")
        if names.count(name) > 1:
            raise ArgumentError(option, f"{text}: give {name} once")
        if not any(re.fullmatch(known, kind) for known in DATA_TYPES):
            raise ArgumentError(option, f"{text}: allowed types: {', '.join(DATA_TYPES)}")


def check_search(args: argparse.Namespace) -> None:
    """Check the numbers in the options of a decoding command, including those from a YAML.

    Raises:
        ArgumentError: names the argument and the allowed values.
    """
    given = vars(args)
    check_numbers(**{name: given[name] for name in (*COUNTS, *NUMBERS) if name in given})
    if args.nbest > args.beam_size:
        raise ArgumentError(
            "nbest",
            f"{args.nbest} is more than beam_size {args.beam_size}: a search keeps no more "
            "hypotheses than that",
        )


def check_numbers(**values: Any) -> None:
    """Check values of COUNTS and NUMBERS.

    Raises:
        ArgumentError: names the argument and the allowed values.
    """
    for name, value in values.items():
        if name in COUNTS:
            least, most = COUNTS[name]
            if type(value) is not int or not least <= value <= most:
                raise ArgumentError(name, f"{value}: allowed: whole numbers from {least} to {most}")
            continue
        low, high = NUMBERS[name]
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ArgumentError(name, f"{value}: a finite number is needed")
        if not low <= value <= high:
            allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise ArgumentError(name, f"{value}: allowed: {allowed}")
