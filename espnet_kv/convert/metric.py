"""Weighted norms for key and value errors, from their first-order effect on the model's output.

With weights a, values v and output o of head h, and errors E_k x of keys and E_v x of values, the
change of the model's output is, to first order,

    sum_i g_i . E_v p_i + sum_i q_i . E_k z_i / sqrt(d_k),

    p_i = sum_j a_ij x_j,    z_i = sum_j a_ij (g_i . (v_j - o_i)) x_j,

where g_i is the gradient of the model's output with respect to o_i. E_v is therefore applied to
pooled frames p_i, and E_k to differences of the frames that one query attends to (softmax cancels
the rest). The attention weights sum to one, so the bias of the values can compensate their mean
error.

The mean square of this change is that of a layer with weights E_v and inputs p_i, and with weights
E_k and inputs z_i. It is approximated by the product of the second moments of inputs and gradients,
as in K-FAC (arXiv 1503.05671), here of each head. Weighting a low-rank approximation by Fisher
information goes back to arXiv 2207.00112.

Shape letters: H heads, D model size, d_k head size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.modules import head_rows
from espnet_kv.convert.statistics import LayerStatistics

# share of the covariance of all frames in the norms, for directions that the queries do not cover
SHRINK = 0.01
# Shares of moments that do not depend on gradients, relative to those that do. z has D directions
# and is known from as many queries as the audio has tokens; g has only d_k.
SPREAD_SHARE, OUTPUT_SHARE = 1.0, 0.05


@dataclass(frozen=True)
class OutputMetric:
    """Squared output error: sum over heads of |left_k E_k right_k|^2 + |left_v E_v right_v|^2.

    left_k, left_v: (H, d_k, d_k). right_k, right_v: (H, D, D).
    """

    left_k: Tensor
    left_v: Tensor
    right_k: Tensor
    right_v: Tensor

    @classmethod
    def of(cls, attention: MultiHeadAttention, statistics: LayerStatistics) -> "OutputMetric":
        """The metric of an attention layer."""
        h, d_k = attention.h, attention.d_k
        out = head_rows(attention.linear_out.weight.T, h).transpose(1, 2)  # (H, D, d_k)
        spread = statistics.spread + SHRINK * statistics.covariance
        return cls(
            left_k=symmetric_root(statistics.query_moment) / math.sqrt(d_k),
            left_v=symmetric_root(
                _plus(statistics.gradient_moment, OUTPUT_SHARE, out.transpose(1, 2) @ out)
            ),
            right_k=symmetric_root(_plus(statistics.logit_moment, SPREAD_SHARE, spread)),
            right_v=symmetric_root(statistics.pooled_covariance + SHRINK * statistics.covariance),
        )

    @classmethod
    def frobenius(cls, attention: MultiHeadAttention) -> "OutputMetric":
        """The Frobenius norm of the weight errors."""
        weight = attention.linear_k.weight
        left = torch.eye(attention.d_k, dtype=torch.float64, device=weight.device)
        right = torch.eye(weight.size(1), dtype=torch.float64, device=weight.device)
        left, right = left.expand(attention.h, -1, -1), right.expand(attention.h, -1, -1)
        return cls(left, left, right, right)

    def with_keys_scaled(self, factor: float) -> "OutputMetric":
        """The metric with key errors times `factor`: first-order effects hold for small errors."""
        return replace(self, left_k=factor * self.left_k)

    def with_common_inputs(self) -> "OutputMetric":
        """The metric with the mean input moments of all heads, in which equal maps stay equal."""
        right = [symmetric_root((r @ r).mean(dim=0)) for r in (self.right_k, self.right_v)]
        return replace(self, right_k=right[0], right_v=right[1])

    def weigh(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply weights (H, d_k, D) of keys and values by the metric's square roots."""
        return self.left_k @ keys @ self.right_k, self.left_v @ values @ self.right_v


def _plus(moment: Tensor, share: float, other: Tensor) -> Tensor:
    """`moment` (H, n, n) and `other`, scaled to have `share` of its trace."""
    traces = [part.diagonal(dim1=1, dim2=2).sum(dim=1) for part in (moment, other)]
    scale = traces[0] / traces[1].clamp(min=torch.finfo(moment.dtype).tiny)
    return moment + share * scale[:, None, None] * other
