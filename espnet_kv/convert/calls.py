"""Recording the calls of attention modules, to repeat them with other modules.

Shape letters: B batch, H heads, Q queries, S keys, D model size, d_k head size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.attention.whisper import WhisperAttention


@dataclass
class Call:
    """The arguments of one forward pass through an attention module.

    query: (B, Q, D).
    key: (B, S, D), the frames that keys and values are projected from.
    context: the further arguments: relative positions or chunks, if any, then the mask.
    gradient: (B, Q, H d_k), of the model's output with respect to the outputs of the heads; None:
        no backward pass followed.
    """

    query: Tensor
    key: Tensor
    context: tuple
    gradient: Tensor | None = None

    def run(self, attention: nn.Module) -> Tensor:
        """Output (B, Q, D) of `attention` for these arguments, in the dtype of its weights."""
        dtype = next(attention.parameters()).dtype
        position = [_cast(part, dtype) for part in self.context[:-1]]
        query, key = self.query.to(dtype), self.key.to(dtype)
        return attention(query, key, key, *position, self.context[-1])

    @property
    def frames(self) -> Tensor:
        """(B, S) bool: True for keys that are not padding."""
        mask = self.context[-1]
        if mask is None:
            return torch.ones(self.key.shape[:2], dtype=torch.bool, device=self.key.device)
        return mask.ne(0).any(dim=1)

    @property
    def queries(self) -> Tensor:
        """(B, Q) bool: True for queries that are not padding.

        In self-attention, queries are the frames. Cross-attention has no query mask: all True.
        """
        if self.query.shape == self.key.shape:
            return self.frames
        return torch.ones(self.query.shape[:2], dtype=torch.bool, device=self.query.device)


def _cast(part, dtype: torch.dtype):
    """Convert relative positions, or the chunks that contain them, to another dtype."""
    if isinstance(part, Tensor):
        return part.to(dtype)
    if part is None or part.pos_emb is None:
        return part
    return type(part)(part.pos_emb.to(dtype), part.size, part.left)


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Context manager that records every call of the modules: name -> calls, in order.

    Tensors are kept without a copy: 4 D bytes per frame and layer in float32. Where gradients are
    enabled, a backward pass adds those of the calls, even if no parameter requires a gradient.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def hook_of(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
            if isinstance(module, WhisperAttention):
                args = module.espnet_arguments(*args, **options)
            query, key, _, *context = args
            calls[name].append(Call(query.detach(), key.detach(), tuple(context)))

        return record

    def gradient_hook_of(name: str) -> Callable:
        def watch(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if not torch.is_grad_enabled():
                return None
            heads = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            heads.register_hook(partial(setattr, calls[name][-1], "gradient"))
            return (heads,)

        return watch

    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        out: Any = module.linear_out
        hooks.append(out.register_forward_pre_hook(gradient_hook_of(name)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def rows(calls: Sequence[Call], kind: str, values: Callable[[Call], Tensor]) -> Tensor:
    """Concatenate values(call) (B, T, n) without padding: (N, n); kind: frames or queries."""
    return torch.cat([values(call)[getattr(call, kind)] for call in calls])
