"""Convolutions over time that see only the past."""

import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.cache import ConvState, StateSpec
from espnet_kv.step import running


class CausalConv1d(nn.Conv1d):
    """Conv1d padded on the left only: output t reads inputs t-k+1 to t.

    Parameters and state-dict keys are those of the convolution it replaces. While an encoder
    takes a `Step`, the inputs of earlier chunks stand where the padding would.
    """

    # which of a Step's states is this module's; given by the encoder that holds it
    state_index: int

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
        step = running.get()
        if step is not None:
            return super().forward(step.states[self.state_index].append(step, x))
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))

    def init_state(self, spec: StateSpec) -> ConvState:
        """An empty state of this module."""
        return ConvState(spec, self.in_channels, self.kernel_size[0] - 1)
