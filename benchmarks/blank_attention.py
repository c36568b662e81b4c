"""Disable an attention of a trained model, to measure its contribution by the error rates."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from espnet_kv.bin.convert import PARTS
from espnet_kv.cli import command


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write an experiment whose attention in one part is uniform, or blank.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--asr_train_config", type=Path, required=True, help="config.yaml of a trained mha model")
    add("--asr_model_file", type=Path, required=True, help="its checkpoint")
    add("--part", choices=PARTS, required=True, help="which attention")
    add("--how", choices=CHANGES, required=True, help="equal weights; or no output at all")
    add("--output_dir", type=Path, required=True, help="the experiment directory to write")
    return parser


def make_uniform(attention: Any) -> None:
    """Scores of 0 for every pair: each query gets the mean of the visible values."""
    weights: list[Tensor] = list(attention.linear_q.parameters())
    weights += [p for name, p in attention.named_parameters() if name.startswith("pos_bias_")]
    for weight in weights:
        weight.zero_()


def make_blank(attention: Any) -> None:
    """Attention output of 0."""
    for weight in attention.linear_out.parameters():
        weight.zero_()


CHANGES = {"uniform": make_uniform, "blank": make_blank}


@command
def main(argv: list[str] | None = None) -> None:
    from espnet_kv.convert.experiment import check_new
    from espnet_kv.convert.source import PARTS as SLOTS
    from espnet_kv.convert.source import load_source
    from espnet_kv.files import new_directory

    args = get_parser().parse_args(argv)
    check_new(args.output_dir)
    model, config = load_source(args.asr_train_config, args.asr_model_file, (args.part,))
    with torch.no_grad():
        for attention in SLOTS[args.part].attentions(model).values():
            CHANGES[args.how](attention)
    with new_directory(args.output_dir) as new:
        torch.save(model.state_dict(), new / args.asr_model_file.name)
        (new / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    print(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
