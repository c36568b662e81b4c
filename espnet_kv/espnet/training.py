"""ESPnet's training tasks, made safe against kills, full disks and divergence."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.tasks.abs_task import AbsTask
from espnet2.tasks.lm import LMTask
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.reporter import Reporter
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump

from espnet_kv.cli import HelpFormatter
from espnet_kv.errors import UserError
from espnet_kv.espnet.loading import DamagedError, load_tensors
from espnet_kv.espnet.saving import CHECKPOINT, PREVIOUS, refuse_diverged, safe_saves
from espnet_kv.espnet.task import TrainingTask
from espnet_kv.files import PARTIAL, write_text
from espnet_kv.heap import keep_freed_memory


class SafeTraining(AbsTask):
    """Mixin for tasks of ESPnet: `safe_saves` in every process, `repair_training` on resuming."""

    @classmethod
    def get_parser(cls) -> argparse.ArgumentParser:
        """ESPnet's parser, without defaults of None in the help."""
        parser = super().get_parser()
        parser.formatter_class = HelpFormatter
        return parser

    @classmethod
    def main(cls, args: argparse.Namespace | None = None, cmd: Sequence[str] | None = None):
        """Train.

        Raises:
            UserError: a needed file of an earlier run is missing, a loss is not finite, or a file
                cannot be saved.
        """
        if args is None:
            args = cls.get_parser().parse_args(cmd)
        trains = not (args.print_config or args.collect_stats or args.dry_run)
        first = not args.dist_rank  # None or 0
        if trains and first and args.output_dir is not None:
            repair_training(Path(args.output_dir), args)
        super().main(args=args)
        if trains and first:
            (Path(args.output_dir) / PREVIOUS).unlink(missing_ok=True)

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        """Run one process of the training; ESPnet spawns one per GPU.

        With `max_epoch: 0`, for which ESPnet leaves no model, the first process saves the model as
        it is built, without reading data.
        """
        trains = not (args.collect_stats or args.dry_run)
        if args.ngpu == 0:
            keep_freed_memory()
        with safe_saves():
            if not trains or args.max_epoch != 0:
                super().main_worker(args)
            elif not args.dist_rank:  # None or 0
                cls._save_initial(args)

    @classmethod
    def _save_initial(cls, args: argparse.Namespace) -> None:
        """Write config.yaml and, under the names of averaged models, the untrained model."""
        set_all_random_seed(args.seed)
        model = cls.build_model(args)
        for file in args.init_param:
            load_pretrained_model(file, model, args.ignore_init_mismatch)
        directory = Path(args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        config = yaml_no_alias_safe_dump(vars(args), indent=4, sort_keys=False)
        write_text(directory / "config.yaml", config)
        for phase, name, *_ in args.best_model_criterion:
            torch.save(model.state_dict(), directory / f"{phase}.{name}.ave.pth")


class ASRTraining(SafeTraining, TrainingTask):
    """Training of speech recognition."""


class LMTraining(SafeTraining, LMTask):
    """Training of a language model."""


def repair_training(directory: Path, args: argparse.Namespace) -> None:
    """Repair the files of an interrupted training, so that ESPnet can resume it.

    Repairs are reported as lines `warning: ...` on standard error.

    Args:
        args: ESPnet's options of the training.

    Raises:
        UserError: the training diverged, or a needed model file is missing or truncated.
    """
    for partial in directory.glob(f"{PARTIAL}.*.pth"):
        partial.unlink()
    if not args.resume or args.use_deepspeed:
        return
    states = _whole_checkpoint(directory)
    if states is None:
        return
    refuse_diverged(states, directory / CHECKPOINT)
    reporter = Reporter()
    reporter.load_state_dict(states["reporter"])
    last = reporter.get_epoch()
    best = _best_epochs(reporter, args)
    for epoch in sorted({last, *best}):
        _mend_model(directory, epoch, last, states)
    _link(directory / "latest.pth", f"{last}epoch.pth")
    for phase, name, mode in args.best_model_criterion:
        if reporter.has(phase, name):
            epoch = reporter.get_best_epoch(phase, name, mode)
            _link(directory / f"{phase}.{name}.best.pth", f"{epoch}epoch.pth")


def _whole_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Load the newest readable checkpoint and make it checkpoint.pth; None: there is none."""
    checkpoint, previous = directory / CHECKPOINT, directory / PREVIOUS
    if not checkpoint.exists() and not previous.exists():
        return None
    try:
        return load_tensors(checkpoint)
    except DamagedError as error:
        damaged = error
    if checkpoint.exists():
        kept = directory / "checkpoint.damaged.pth"
        os.replace(checkpoint, kept)
        _warn(f"{checkpoint} cannot be read ({damaged}), it is kept as {kept.name}")
    try:
        states = load_tensors(previous)
    except DamagedError:
        _warn(f"{directory} has no other checkpoint: the training starts again from epoch 1")
        return None
    os.replace(previous, checkpoint)
    _warn(f"{directory}: the training goes on from epoch {states['reporter']['epoch']}")
    return states


def _best_epochs(reporter: Reporter, args: argparse.Namespace) -> set[int]:
    """The best epochs so far, whose models ESPnet keeps for averaging."""
    kept = args.keep_nbest_models
    most = max([1, *kept] if isinstance(kept, list | tuple) else [1, kept])
    return {
        epoch
        for phase, name, mode in args.best_model_criterion
        if reporter.has(phase, name)
        for epoch in reporter.sort_epochs(phase, name, mode)[:most]
    }


def _mend_model(directory: Path, epoch: int, last: int, states: dict[str, Any]) -> None:
    """Restore a missing or truncated model of an epoch from a checkpoint of that epoch."""
    file = directory / f"{epoch}epoch.pth"
    try:
        load_tensors(file)
        return
    except DamagedError as error:
        damaged = error
    sources = [states]
    with_previous = directory / PREVIOUS
    if epoch != last and with_previous.exists():
        try:
            sources.append(load_tensors(with_previous))
        except DamagedError as error:
            logging.info("%s: %s", with_previous, error)
    for source in sources:
        if source["reporter"]["epoch"] == epoch:
            with safe_saves():
                torch.save(source["model"], file)
            _warn(f"{file} was missing or cut, it is written again from the checkpoint")
            return
    what = "is missing" if not file.exists() else f"cannot be read ({damaged})"
    raise UserError(
        f"{file} {what}, and the average of the best epochs needs it: put it back, give a smaller "
        f"keep_nbest_models, or remove {directory} to train again"
    )


def _link(link: Path, target: str) -> None:
    """Restore a symbolic link; ESPnet may be killed between removing and creating it."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
