"""What an attention module was called with, kept to call others the same way.

Shape letters: B batch, Q queries, S keys, D model size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass through an attention module.

    query: (B, Q, D). key: (B, S, D), the frames that keys and values are projected from. context:
    what follows them: relative positions or chunks where there are any, then the mask.
    """

    query: Tensor
    key: Tensor
    context: tuple

    def run(self, attention: nn.Module) -> Tensor:
        """What `attention` makes of it, (B, Q, D), in the type of its weights."""
        dtype = next(attention.parameters()).dtype
        position = [_cast(part, dtype) for part in self.context[:-1]]
        query, key = self.query.to(dtype), self.key.to(dtype)
        return attention(query, key, key, *position, self.context[-1])

    @property
    def frames(self) -> Tensor:
        """(B, S) bool: the keys that are no padding."""
        mask = self.context[-1]
        if mask is None:
            return torch.ones(self.key.shape[:2], dtype=torch.bool, device=self.key.device)
        return mask.ne(0).any(dim=1)

    @property
    def queries(self) -> Tensor:
        """(B, Q) bool: the queries that are no padding, as far as the mask tells.

        In self-attention they are the frames. Cross-attention has no mask of its queries: all.
        """
        if self.query.shape == self.key.shape:
            return self.frames
        return torch.ones(self.query.shape[:2], dtype=torch.bool, device=self.query.device)


def _cast(part, dtype: torch.dtype):
    """Relative positions, or the chunks that carry them, in another type."""
    if isinstance(part, Tensor):
        return part.to(dtype)
    if part is None or part.pos_emb is None:
        return part
    return type(part)(part.pos_emb.to(dtype), part.size, part.left)


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Within it, every call of the modules is kept: name -> calls, in their order.

    Tensors are kept as they are, not copied: 4 D bytes per frame and layer.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def keeper(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple) -> None:
            query, key, _, *context = args
            calls[name].append(Call(query.detach(), key.detach(), tuple(context)))

        return keep

    hooks = [module.register_forward_pre_hook(keeper(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def rows(calls: Sequence[Call], kind: str, values: Callable[[Call], Tensor]) -> Tensor:
    """values(call) (B, T, n) of all calls without padding -> (N, n); kind: frames or queries."""
    return torch.cat([values(call)[getattr(call, kind)] for call in calls])
