"""Reading checkpoints, and refusing those that do not fill the model they are loaded into."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.errors import UserError, is_out_of_memory, one_line


def read_checkpoint(file: Path | str) -> dict[str, Tensor]:
    """The parameters and buffers in a model file, on the CPU; code in it is never run.

    Files of torch before 1.6, which are no zip files, are read too.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    path = Path(file)
    if not path.exists():
        raise UserError(f"{file} does not exist")
    if path.is_dir():
        raise UserError(f"{file} is no model file but a directory: name a file in it")
    if not path.stat().st_size:
        raise UserError(f"{file} is no model file: it is empty; copy or train it again")
    with path.open("rb"):  # what the system says is said here; below, anything means damage
        pass
    try:
        # a zip file need not be read where only the shapes are of interest
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # damaged bytes lead an unpickler anywhere
        if is_out_of_memory(error):
            raise
        raise _damaged(file, error) from error
    for wrapper in ("module", "state_dict"):  # of DeepSpeed and Lightning
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(f"{file} is no model file: it holds a {type(state).__name__}")
    if isinstance(state.get("model"), Mapping) and "optimizers" in state:
        raise UserError(
            f"{file} is the state of a training, no model file: name a model beside it, e.g. "
            "valid.acc.ave.pth"
        )
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no model file: it holds other things than named parameters")
    return dict(state)


def _damaged(file: Path | str, error: Exception) -> UserError:
    first = next(iter(str(error).splitlines()), "").split(". ")[0].strip()
    return UserError(
        f"{file} is no model file, or it is damaged ({type(error).__name__}: {one_line(first)}): "
        "copy or train it again"
    )


def check_finite(model: nn.Module, file: Path | str) -> None:
    """Refuse a model that holds what is no number.

    Raises:
        UserError: names the file and the first such parameter or buffer.
    """
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise UserError(
                f"{file}: {key} holds NaN: the training diverged; use the model of an earlier "
                "epoch, or train again with a lower learning rate"
            )
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{file}: {key} holds infinity: the training diverged; train again")


class LoadGuard:
    """Makes every `load_state_dict` of a module strict, also where the caller asks for less.

    It judges the keys of that module alone: what else a load lacks is the business of others.

    Args:
        module: guarded from now on.
    """

    def __init__(self, module: nn.Module):
        self._prefix = ""
        self._hooks = [
            module.register_load_state_dict_pre_hook(self._before),
            module.register_load_state_dict_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the guard off."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._prefix = prefix  # of the module's keys in what is loaded

    def _after(self, module: nn.Module, keys: Any) -> None:
        missing, unexpected = (
            [key for key in listed if key.startswith(self._prefix)]
            for listed in (keys.missing_keys, keys.unexpected_keys)
        )
        if missing or unexpected:
            raise UserError(
                f"the checkpoint does not fit {type(module).__name__} (is it from another "
                f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; "
                f"unexpected keys: {', '.join(unexpected) or 'none'}"
            )


def refuse_partial_loads(module: nn.Module) -> LoadGuard:
    """Guard a module's loads.

    ESPnet loads trained models with strict=False: a checkpoint of another attention would leave
    random weights behind without a word.

    Returns:
        The guard, whose remove() takes the refusal back.

    Raises:
        UserError: (when loading) one message that lists missing and unexpected keys.
    """
    return LoadGuard(module)
