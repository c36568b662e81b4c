"""Atomic saving of model files, safe against a training that is killed while saving."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from espnet_kv.errors import UserError
from espnet_kv.espnet.loading import TOO_LARGE_STEPS, not_finite
from espnet_kv.files import new_file

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"


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
