"""Convolutions over time that see only the past."""

import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.state import ConvState, StateSpec
from espnet_kv.cache.step import running

# For a chunk of one stream, the overhead of torch's convolution is most of its time. Up to this
# many products (measured on a CPU: 2^17 take half the time, 2^21 three times as much) the sum is
# computed directly.
FEW_PRODUCTS = 1 << 18


class CausalConv1d(nn.Conv1d):
    """Conv1d padded on the left only: output t reads inputs t-k+1 to t.

    Parameters and state-dict keys are those of the convolution it replaces. With a `Step` in the
    context, the inputs of earlier chunks take the place of the padding.

    Attributes:
        state_index: which of a Step's states is this module's; set by its encoder.
    """

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
        if step is None:
            return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))
        seen = step.states[self.state_index].append(step, x)
        depthwise = self.groups == self.in_channels == self.out_channels
        if depthwise and x.numel() * self.kernel_size[0] <= FEW_PRODUCTS:
            return self._written_out(seen)
        return super().forward(seen)

    def _written_out(self, seen: Tensor) -> Tensor:
        """The depthwise convolution of (B, channels, T+k-1) as products and sums."""
        products = seen.unfold(2, self.kernel_size[0], 1) * self.weight  # (B, channels, T, k)
        out = products.sum(dim=3)
        return out if self.bias is None else out + self.bias[:, None]

    def init_state(self, spec: StateSpec) -> ConvState:
        """An empty state of this module."""
        return ConvState(spec, self.in_channels, self.kernel_size[0] - 1)

    @property
    def footprint(self) -> Footprint:
        """What the state takes, from the configuration alone."""
        return Footprint(constant=[(self.kernel_size[0] - 1, self.in_channels)])
