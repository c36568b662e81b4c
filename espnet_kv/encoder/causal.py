"""Convolutions over time that see only the past."""

import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv1d(nn.Conv1d):
    """Conv1d padded on the left only: output t reads inputs t-k+1 to t.

    Parameters and state-dict keys are those of the convolution it replaces.
    """

    @classmethod
    def like(cls, conv: nn.Conv1d) -> "CausalConv1d":
        """A causal convolution of the same sizes as `conv`, whose own padding is dropped."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            groups=conv.groups,
            bias=conv.bias is not None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)."""
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))
