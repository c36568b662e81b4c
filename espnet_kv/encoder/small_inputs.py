"""Modules of ESPnet's blocks that are computed in a cheaper way for the few frames of a chunk."""

import torch
from espnet2.asr.encoder.conformer_encoder import get_activation
from torch import Tensor, nn
from torch.nn import functional as F

from espnet_kv.cache.step import current_step
from espnet_kv.packed import Packable, PackedWeight, is_worth_packing

SWISH = type(get_activation("swish"))
"""ESPnet's activation."""


class PointwiseConv1d(Packable, nn.Conv1d):
    """A Conv1d of kernel size 1; while a `CacheStep` is active, it is computed as a matrix product.

    torch's convolution of a few frames takes twice the time of the product. Elsewhere the result
    is bit for bit that of the convolution it replaces, whose parameters it has.
    """

    packed: PackedWeight | None = None

    @classmethod
    def of(cls, conv: nn.Conv1d) -> "PointwiseConv1d":
        """The parameters of `conv`, which has kernel size 1, in this class."""
        made = cls(conv.in_channels, conv.out_channels, 1, bias=False, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)."""
        if current_step.get() is None:
            return super().forward(x)
        linear = F.linear if self.packed is None else self.packed.linear
        return linear(x.transpose(1, 2), self.weight[:, :, 0], self.bias).transpose(1, 2)

    def pack(self) -> None:
        """See Packable."""
        if is_worth_packing(self.weight):
            self.packed = self.packed or PackedWeight()
            self.packed.fill(self.weight[:, :, 0])


class ChunkSwish(nn.Module):
    """ESPnet's Swish; while a `CacheStep` is active, it is one kernel instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(x) if current_step.get() is None else F.silu(x)


def replace_for_chunks(blocks: nn.Module) -> None:
    """Replace the convolutions of kernel size 1 and the activations in `blocks`."""
    for owner in list(blocks.modules()):
        for name, module in list(owner.named_children()):
            if type(module) is nn.Conv1d and _is_pointwise(module):
                setattr(owner, name, PointwiseConv1d.of(module))
            elif type(module) is SWISH:
                setattr(owner, name, ChunkSwish())


def _is_pointwise(conv: nn.Conv1d) -> bool:
    plain = conv.stride == conv.dilation == (1,) and conv.padding == (0,) and conv.groups == 1
    return conv.kernel_size == (1,) and plain
