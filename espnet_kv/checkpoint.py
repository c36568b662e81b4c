"""Refusing checkpoints that do not fill the model they are loaded into."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from espnet_kv.errors import UserError


def refuse_partial_loads(module: nn.Module) -> RemovableHandle:
    """Make every `load_state_dict` of `module` strict, also where the caller asks for less.

    ESPnet loads trained models with strict=False: a checkpoint of another attention would leave
    random weights behind without a word.

    Returns:
        A handle whose remove() takes the refusal back.

    Raises:
        UserError: (when loading) one message that lists missing and unexpected keys.
    """
    return module.register_load_state_dict_post_hook(_refuse)


def _refuse(module: nn.Module, keys: Any) -> None:
    if keys.missing_keys or keys.unexpected_keys:
        raise UserError(
            f"the checkpoint does not fit {type(module).__name__} (is it from another "
            f"attention_type or config?): missing keys: {', '.join(keys.missing_keys) or 'none'}; "
            f"unexpected keys: {', '.join(keys.unexpected_keys) or 'none'}"
        )
