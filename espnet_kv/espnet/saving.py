"""Atomic saving of model files, safe against a training that is killed while saving."""

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from espnet_kv.errors import UserError
from espnet_kv.files import new_file

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"
TOO_LARGE_STEPS = "lower lr in optim_conf or set use_amp: false"


class DamagedError(Exception):
    """A model file cannot be read: it is truncated or damaged."""


@contextlib.contextmanager
def safe_saves() -> Iterator[None]:
    """Make `torch.save` atomic: it writes to another name and renames the complete file.

    ESPnet overwrites its only checkpoint.pth; here the previous one is kept beside it. The
    checkpoint of a training that diverged is refused, to keep the last good one.

    Raises:
        UserError: (in torch.save) the disk is full or not writable, or the training diverged.
    """
    save = torch.save

    def safely(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, str | os.PathLike):
            save(obj, f, *args, **kwargs)
            return
        path = Path(f)
        if path.name == CHECKPOINT:
            refuse_diverged(obj, path)
        try:
            with new_file(path) as partial:
                with partial.open("wb") as file:
                    save(obj, file, *args, **kwargs)
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == CHECKPOINT:
                    _keep_previous(path)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be saved: {_cause(error)}: make room there and run the same "
                "command again; the training goes on from the last epoch that was saved"
            ) from error

    torch.save = safely
    try:
        yield
    finally:
        torch.save = save


def _keep_previous(checkpoint: Path) -> None:
    if not checkpoint.exists():
        return
    previous = checkpoint.with_name(PREVIOUS)
    try:  # a hard link: checkpoint.pth exists at every moment
        with new_file(previous) as partial:
            partial.unlink(missing_ok=True)
            os.link(checkpoint, partial)
    except OSError:  # a file system without hard links
        os.replace(checkpoint, previous)


def _cause(error: BaseException | None) -> str:
    """The message of the system error behind an error of torch's writer."""
    message = str(error).split("\n")[0]
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return message


def refuse_diverged(states: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError if a loss of the last epoch or a weight in `states` is not finite."""
    epoch = states["reporter"]["epoch"]
    results = states["reporter"]["stats"].get(epoch, {})
    wrong = [
        f"{part} loss is {loss}"
        for part in ("train", "valid")
        if not _is_finite(loss := results.get(part, {}).get("loss", 0.0))
    ]
    wrong += [f"{key} holds nan or inf" for key in not_finite(states["model"])[:1]]
    if wrong:
        raise UserError(
            f"{path.parent}: the training diverged: {wrong[0]} in epoch {epoch}: "
            f"{TOO_LARGE_STEPS}, then remove {path.parent} or give the experiment another name"
        )


def _is_finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Keys of a state dict with nan or inf in their tensors."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return [key for key, value in tensors.items() if not torch.isfinite(value).all()]


def read(path: Path) -> Any:
    """Load a file of `torch.save` on the CPU, memory-mapped if possible.

    Raises:
        DamagedError: the file is missing, truncated or damaged.
    """
    try:
        is_zip = zipfile.is_zipfile(path)  # torch < 1.6 wrote another format
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{path} is damaged or holds more than tensors: {error}") from error


def check_finite(path: Path) -> None:
    """Check that a model file can be read and its weights are finite.

    Raises:
        UserError: the file is missing or damaged, or has nan or inf in its weights.
    """
    try:
        state = read(path)
    except DamagedError as error:
        raise UserError(f"{path} is missing or damaged: train it again") from error
    state = state.get("model", state) if isinstance(state, Mapping) else {}
    if wrong := not_finite(state):
        raise UserError(
            f"{path} holds weights that are nan or inf ({wrong[0]} and {len(wrong) - 1} others): "
            f"{TOO_LARGE_STEPS}, remove {path.parent} and train again"
        )
