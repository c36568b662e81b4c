"""Attention layers and inputs with structure, to convert in tests.

Shape letters: B batch, T frames, H heads, D model size.
"""

from typing import Any

import naive
import torch
from torch import Tensor

from espnet_kv.attention import build_attention
from espnet_kv.attention.chunks import Chunks
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.convert.calls import Call

HEADS, SIZE = 4, 16
CHUNKS = (4, 1)


def layer(rel_pos: bool = True, size: int = SIZE, **options: Any) -> MultiHeadAttention:
    """A layer in float64 with weights and biases far from their start, in evaluation mode."""
    module = build_attention("mha", {}, HEADS, size, 0.1, rel_pos, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert isinstance(module, MultiHeadAttention)
    return module


class Source:
    """Realistic frames: a mean, a few strong directions, many weak ones, and a drift.

    Args:
        rng: generator of the structure and of the frames.
    """

    def __init__(self, rng: torch.Generator, size: int = SIZE):
        self.rng, self.size = rng, size
        self.mean = 2 * self._randn(size)
        self.mix = self._randn(size, size) * torch.logspace(0.3, -1.5, size)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.rng)

    def frames(self, batch: int, frames: int) -> Tensor:
        """(B, T, D) with similar neighbours."""
        z = self._randn(batch, frames + 2, self.size)
        z = (z[:, 2:] + z[:, 1:-1] + z[:, :-2]) / 3**0.5
        return z @ self.mix.T + self.mean

    def calls(
        self, count: int, rel_pos: bool = True, chunked: bool = False, cross: bool = False
    ) -> list[Call]:
        """Batches of a full and a half utterance; cross: queries from another source."""
        calls = []
        for number in range(count):
            frames = 17 + number % 5
            x = self.frames(2, frames)
            mask = torch.ones(2, 1, frames, dtype=torch.bool)
            mask[1, :, frames // 2 :] = False
            pos_emb = naive.position_table(frames, self.size) if rel_pos else None
            position = (pos_emb,) if rel_pos else ()
            if chunked:
                position = (Chunks(pos_emb, *CHUNKS),)
            query = self.frames(2, 7).flip(-1) if cross else x
            calls.append(Call(query, x, (*position, mask)))
        return calls


def outputs(module: torch.nn.Module, calls: list[Call]) -> Tensor:
    """(N, D) of all queries without padding."""
    with torch.no_grad():
        return torch.cat([call.run(module)[call.queries] for call in calls])


def permuted(module: MultiHeadAttention, order: list[int]) -> MultiHeadAttention:
    """The same function with its heads in another order."""
    rows = torch.arange(module.h * module.d_k).view(module.h, -1)[order].flatten()
    new = build_attention("mha", {}, module.h, len(rows), 0.1, module.rel_pos).double().eval()
    state = module.state_dict()
    for name in ("q", "k", "v", "pos"):
        for key in (f"linear_{name}.weight", f"linear_{name}.bias"):
            if key in state:
                state[key] = state[key][rows]
    for key in ("pos_bias_u", "pos_bias_v"):
        if key in state:
            state[key] = state[key][order]
    state["linear_out.weight"] = state["linear_out.weight"][:, rows]
    new.load_state_dict(state)
    assert isinstance(new, MultiHeadAttention)
    return new
