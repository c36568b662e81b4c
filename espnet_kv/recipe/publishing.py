"""Options of packing, upload and export, and names of the stages after those of ESPnet's asr.sh."""

import argparse
import re

from espnet_kv.errors import UserError

NAMES = {"profile": 14, "compare": 15, "pack": 16, "upload": 17, "export": 18}
"""Stages that asr.sh has not, or has under other numbers: there 14 packs and 15 uploads."""


def stage_number(text: str) -> int:
    """Type of --stage: a number, or one of NAMES."""
    if text not in NAMES and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor one of {', '.join(NAMES)}")
    return NAMES[text] if text in NAMES else int(text)


def repository(text: str) -> str:
    """Type of --hf_repo: USER/NAME, or nothing."""
    if text and not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no repository USER/NAME")
    return text


def check_publishing(args: argparse.Namespace) -> None:
    """Resolve which of packing, upload and export run: those asked for, or where the run begins.

    Args:
        args: with asr_config resolved, a list.

    Raises:
        UserError: options contradict each other, or the repository is not named.
    """
    skipping = {"pack": "skip_packing", "upload": "skip_upload_hf", "export": "skip_export"}
    for name, option in skipping.items():
        begins = args.stage == NAMES[name]
        if begins and getattr(args, option):
            raise UserError(f"--stage {name} --{option} true: one asks for what the other skips")
        if getattr(args, option) is None:
            setattr(args, option, not begins)
    if args.skip_upload_hf or args.stop_stage < NAMES["upload"]:
        return
    if len(args.asr_config) > 1:
        raise UserError(
            f"--hf_repo {args.hf_repo}: one repository, but there are {len(args.asr_config)} "
            "models: upload them one by one, --asr_config FILE --stage upload"
        )
    if not args.hf_repo:
        raise UserError("--skip_upload_hf false: name the repository with --hf_repo USER/NAME")
