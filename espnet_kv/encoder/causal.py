"""Causal convolution over time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.state import ConvState, StateSpec
from espnet_kv.cache.step import current_step

# For a chunk of one stream, most of the time of torch's convolution is overhead. Up to this many
# products the sum is computed directly (measured on a CPU: 2^17 products take half the time of
# torch's convolution, 2^21 three times as much).
FEW_PRODUCTS = 1 << 18


class CausalConv1d(nn.Conv1d):
    """Conv1d padded on the left only: output t depends on inputs t-k+1 to t.

    Parameters and state-dict keys are those of the convolution it replaces. While a `CacheStep` is
    active, the inputs of earlier chunks replace the padding.

    Attributes:
        state_index: index of this module's state in `CacheStep.states`; set by the encoder.
    """

    state_index: int

    @classmethod
    def like(cls, conv: nn.Conv1d) -> "CausalConv1d":
        """Build a causal convolution with the sizes of `conv`; the padding of `conv` is ignored."""
        return cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            groups=conv.groups,
            bias=conv.bias is not None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)."""
        step = current_step.get()
        if step is None:
            return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))
        padded = step.states[self.state_index].append(step, x)
        if not self.groups == self.in_channels == self.out_channels:
            return super().forward(padded)
        if torch.jit.is_tracing():
            # onnxruntime's fast depthwise convolution is for images: this one has a single row
            image, weight = padded.unsqueeze(2), self.weight.unsqueeze(2)
            return F.conv2d(image, weight, self.bias, groups=self.groups).squeeze(2)
        few = x.numel() * self.kernel_size[0] <= FEW_PRODUCTS
        return self._depthwise_sum(padded) if few else super().forward(padded)

    def _depthwise_sum(self, padded: Tensor) -> Tensor:
        """Depthwise convolution of (B, channels, T+k-1) as products and sums."""
        products = padded.unfold(2, self.kernel_size[0], 1) * self.weight  # (B, channels, T, k)
        out = products.sum(dim=3)
        return out if self.bias is None else out + self.bias[:, None]

    def init_state(self, spec: StateSpec) -> ConvState:
        """Create an empty state of this module."""
        return ConvState(spec, self.in_channels, self.kernel_size[0] - 1)

    @property
    def footprint(self) -> Footprint:
        """Size of the state, computed from the configuration."""
        return Footprint(constant=[(self.kernel_size[0] - 1, self.in_channels)])
