"""What commands share that load a trained model: by its files, or packed."""

import argparse
from collections.abc import Sequence
from typing import Any

from espnet_kv.errors import UserError

MODEL = ("asr_train_config", "asr_model_file")
LANGUAGE_MODEL = ("lm_train_config", "lm_file")
TAG_HELP = "A packed model in their place: a zip, or a tag that espnet_model_zoo knows"


def add_model_options(add: Any, kind: type = str) -> None:
    """Add --asr_train_config, --asr_model_file and --model_tag.

    Args:
        add: `add_argument` of a parser. kind: type of paths.
    """
    add("--asr_train_config", type=kind, help="config.yaml of the experiment")
    add("--asr_model_file", type=kind, help="Its model")
    add("--model_tag", help=TAG_HELP)


def find_model(args: argparse.Namespace, names: Sequence[str] = MODEL, kind: type = str) -> None:
    """Put the files of --model_tag in the place of options that name files.

    Args:
        names: options that the command takes from a pack.
        kind: type of paths.

    Raises:
        UserError: neither files nor a pack, or both are given; or the pack cannot be used.
    """
    from espnet_kv.espnet.packs import unpacked

    if args.model_tag is None:
        if None in (args.asr_train_config, args.asr_model_file):
            raise UserError("give --asr_train_config and --asr_model_file, or --model_tag")
        return
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(
                f"--model_tag {args.model_tag}, --{name} {getattr(args, name)}: a packed model has "
                "files of its own; leave one of the two out"
            )
    try:
        files = unpacked(args.model_tag)
    except UserError as error:
        raise UserError(f"--model_tag: {error}") from error
    vars(args).update({name: kind(files[name]) for name in names if name in files})
    args.model_tag = None
