"""Statistics of the inputs of an attention module on the calibration audio.

Shape letters: B batch, H heads, Q queries, S keys, D model size, d_k head size.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.convert.calls import Call, recording
from espnet_kv.convert.modules import refuse_normed_keys
from espnet_kv.errors import UserError


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of the inputs, all in float64.

    frames, queries: their numbers, without padding.
    mean (D,), second_moment (D, D): E[x], E[x x'] of the frames x that keys and values are
        projected from.
    query_moment (H, d_k, d_k): E[q q'] of the queries, with pos_bias_u added.
    pooled_mean (H, D), pooled_moment (H, D, D): of the pooled frames sum_j a_ij x_j, with the
        attention weights a of each head; W_v is effectively applied to these.
    spread (H, D, D): E_i of the covariance of the frames under the weights a_i, i.e. variation
        among the frames that one query attends to.
    gradient_moment (H, d_k, d_k): E[g g'], g the gradient of the model's output with respect to
        the output of a head.
    logit_moment (H, D, D): E[z z'], z_i = sum_j (gradient by logit ij) x_j.
    calls: the calls that the moments were computed from.
    """

    frames: int
    queries: int
    mean: Tensor
    second_moment: Tensor
    query_moment: Tensor
    pooled_mean: Tensor
    pooled_moment: Tensor
    spread: Tensor
    gradient_moment: Tensor
    logit_moment: Tensor
    calls: Sequence[Call]

    @property
    def covariance(self) -> Tensor:
        """(D, D) of the frames."""
        return self.second_moment - torch.outer(self.mean, self.mean)

    @property
    def pooled_covariance(self) -> Tensor:
        """(H, D, D) of the pooled frames."""
        return self.pooled_moment - torch.einsum("hi,hj->hij", self.pooled_mean, self.pooled_mean)

    @classmethod
    @torch.no_grad()
    def of(cls, attention: MultiHeadAttention, calls: Sequence[Call]) -> "LayerStatistics":
        """Compute the statistics of recorded `calls` of `attention`.

        Calls without a gradient get one of Gaussian noise on the output of the layer: all errors
        of this output then count alike.

        Raises:
            UserError: there are no frames, or keys are normalised (qk_norm).
        """
        refuse_normed_keys(attention)
        h, d = attention.h, attention.linear_q.in_features
        weights_of = AttentionWeights(attention)
        zeros = attention.linear_q.weight.new_zeros(1, dtype=torch.float64)
        total, second, query_second = zeros.new_zeros(d), zeros.new_zeros(d, d), zeros
        pooled, pooled_second, weighted_second = zeros.new_zeros(h, d), zeros, zeros
        gradient_second, logit_second = zeros, zeros
        generator = torch.Generator().manual_seed(0)
        frames = queries = 0
        for _, group in itertools.groupby(calls, _storage):
            same = list(group)  # several decoder inputs for one utterance
            first = same[0]
            x = first.key[first.frames].double()  # (N, D)
            total += x.sum(dim=0)
            second += x.T @ x
            frames += len(x)
            keys = first.key.double()
            values = attention.linear_v(first.key.to(attention.linear_v.weight))
            values = values.unflatten(2, (h, -1)).transpose(1, 2)  # (B, H, S, d_k)
            received = zeros.new_zeros(len(keys), h, keys.size(1))  # (B, H, S), of all queries
            for call in same:
                q = attention.project_q(call.query.to(attention.linear_q.weight.dtype))
                q = (q + attention.pos_bias_u if attention.rel_pos else q)[call.queries].double()
                query_second = query_second + torch.einsum("nhi,nhj->hij", q, q)
                queries += len(q)
                weights = call.run(weights_of).unflatten(2, (h, -1))  # (B, Q, H, S)
                gradients = _gradients(call, attention, generator)  # (B, Q, H, d_k)
                for row, (valid, a) in enumerate(zip(call.queries, weights, strict=True)):
                    a = a[valid].transpose(0, 1)  # (H, N, S)
                    g = gradients[row, valid].transpose(0, 1)  # (H, N, d_k)
                    by_logit = a * (g @ values[row].transpose(1, 2))  # of softmax, next line too
                    by_logit -= a * by_logit.sum(dim=2, keepdim=True)
                    z = (by_logit @ first.key[row].to(by_logit)).double()  # (H, N, D)
                    logit_second = logit_second + z.transpose(1, 2) @ z
                    g, a = g.double(), a.double()
                    gradient_second = gradient_second + g.transpose(1, 2) @ g
                    means = a @ keys[row]  # (H, N, D)
                    pooled += means.sum(dim=1)
                    pooled_second = pooled_second + means.transpose(1, 2) @ means
                    received[row] += a.sum(dim=1)
            for row, of_heads in zip(keys, received, strict=True):
                weighted_second = weighted_second + row.T @ (of_heads[:, :, None] * row)
        if not frames or not queries:
            raise UserError("calibration: the attention layers processed no audio")
        return cls(
            frames=frames,
            queries=queries,
            mean=total / frames,
            second_moment=second / frames,
            query_moment=query_second / queries,
            pooled_mean=pooled / queries,
            pooled_moment=pooled_second / queries,
            spread=(weighted_second - pooled_second) / queries,
            gradient_moment=gradient_second / queries,
            logit_moment=logit_second / queries,
            calls=tuple(calls),
        )


def _gradients(call: Call, attention: MultiHeadAttention, generator: torch.Generator) -> Tensor:
    """(B, Q, H, d_k), those of the call or of noise on the output of the layer."""
    gradient, out = call.gradient, attention.linear_out.weight
    if gradient is None:
        shape = (*call.query.shape[:2], out.size(0))
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(out) @ out
    return gradient.to(out).unflatten(2, (attention.h, -1))


def _storage(call: Call) -> tuple[int, torch.Size]:
    """Equal for calls with the same keys."""
    return call.key.data_ptr(), call.key.shape


class AttentionWeights(MultiHeadAttention):
    """Returns the attention weights (B, Q, H S), as the attention output for one-hot values."""

    def __init__(self, attention: MultiHeadAttention):
        sizes = HeadSizes(attention.h, attention.linear_q.in_features)
        super().__init__(sizes, 0.0, attention.rel_pos, attention.zero_triu)
        self.to(attention.linear_q.weight)
        self.load_state_dict(attention.state_dict())
        self.linear_out = nn.Identity()  # type: ignore[assignment]

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = super().project_kv(key, value)
        one_hot = torch.eye(key.size(1), dtype=key.dtype, device=key.device)
        return k, one_hot.expand(len(key), self.h, -1, -1)


def gather(
    modules: Mapping[str, MultiHeadAttention], run: Callable[[], object]
) -> dict[str, LayerStatistics]:
    """Collect statistics of attention modules while `run` runs their model on calibration audio.

    The model should be in evaluation mode. Padding is excluded by the masks. Cross-attention has
    no mask for queries, so with a decoder `run` must process one utterance at a time. The inputs
    are kept: 4 D bytes per frame and layer in float32.

    Raises:
        UserError: a module was not called.
    """
    with recording(modules) as calls, torch.no_grad():
        run()
    return {name: LayerStatistics.of(modules[name], calls[name]) for name in modules}
