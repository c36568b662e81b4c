"""Weighted norms for key and value errors, from their first-order effect on the attention output.

With weights a, values v and output o of head h, and errors E_k x of keys and E_v x of values, the
error of the output is, to first order,

    W_out (E_v p_i + sum_j a_ij (v_j - o_i) (q_i . E_k (x_j - p_i)) / sqrt(d_k)),

    p_i = sum_j a_ij x_j.

E_v is therefore applied to pooled frames p_i, not to single frames. E_k is applied to differences
of the frames that one query attends to (softmax cancels the rest), is multiplied by the query,
and is scaled by how much the values differ. The attention weights sum to one, so the bias of the
values can compensate their mean error.

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

# share of the covariance of all frames in both norms, for directions that the queries do not cover
SHRINK = 0.05


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
    def of(
        cls, attention: MultiHeadAttention, statistics: LayerStatistics, shrink: float = SHRINK
    ) -> "OutputMetric":
        """The metric of an attention layer.

        For keys it is an estimate: the variance of the logit errors under the attention weights
        is multiplied by the variance of the values (to first order an upper bound by
        Cauchy-Schwarz), each averaged over queries.

        Args:
            shrink: share of the covariance of all frames in both norms.
        """
        h, d_k = attention.h, attention.d_k
        out = head_rows(attention.linear_out.weight.T, h).transpose(1, 2)  # (H, D, d_k)
        left_v = symmetric_root(out.transpose(1, 2) @ out)
        right_k = symmetric_root(statistics.spread + shrink * statistics.covariance)
        values = left_v @ head_rows(attention.linear_v.weight, h) @ right_k
        value_std = values.square().sum(dim=(1, 2)).sqrt()[:, None, None]  # of each head
        left_k = symmetric_root(statistics.query_moment) * value_std / math.sqrt(d_k)
        right_v = symmetric_root(statistics.pooled_covariance + shrink * statistics.covariance)
        return cls(left_k, left_v, right_k, right_v)

    def with_keys_scaled(self, factor: float) -> "OutputMetric":
        """The metric with key errors multiplied by `factor`."""
        return replace(self, left_k=factor * self.left_k)

    @classmethod
    def frobenius(cls, attention: MultiHeadAttention) -> "OutputMetric":
        """The Frobenius norm of the weight errors."""
        weight = attention.linear_k.weight
        left = torch.eye(attention.d_k, dtype=torch.float64, device=weight.device)
        right = torch.eye(weight.size(1), dtype=torch.float64, device=weight.device)
        left, right = left.expand(attention.h, -1, -1), right.expand(attention.h, -1, -1)
        return cls(left, left, right, right)

    def weigh(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply weights (H, d_k, D) of keys and values by the metric's square roots."""
        return self.left_k @ keys @ self.right_k, self.left_v @ values @ self.right_v
