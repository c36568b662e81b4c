"""What calibration saw of an attention module, summed up as a conversion needs it.

Shape letters: H heads, D model size, d_k head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.mha import MultiHeadAttention
from espnet_kv.convert.calls import Call, recording
from espnet_kv.errors import UserError


@dataclass(frozen=True)
class LayerStatistics:
    """Moments, all in float64, and the calls that they are of.

    frames, queries: how many were seen, padding excluded.
    mean (D,), second_moment (D, D): E[x], E[x x'] of the frames x that keys and values are
        projected from.
    query_moment (H, d_k, d_k): E[q q'] of the queries that meet the keys, pos_bias_u included.
    pooled_mean (H, D), pooled_moment (H, D, D): of sum_j a_ij x_j, the frames as the attention
        weights of each head average them: what W_v is in truth applied to.
    calls: the inputs themselves.
    """

    frames: int
    queries: int
    mean: Tensor
    second_moment: Tensor
    query_moment: Tensor
    pooled_mean: Tensor
    pooled_moment: Tensor
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
        """Sum up what `attention` was called with.

        Raises:
            UserError: no frames.
        """
        h, d = attention.h, attention.linear_q.in_features
        pooling = PooledInputs(attention)
        empty = attention.linear_q.weight.new_zeros(0, dtype=torch.float64)
        total, second = empty.new_zeros(d), empty.new_zeros(d, d)
        query_second = empty.new_zeros(h, attention.d_k, attention.d_k)
        pooled, pooled_second = empty.new_zeros(h, d), empty.new_zeros(h, d, d)
        frames = queries = 0
        for call in calls:
            x = call.key[call.frames].double()
            total += x.sum(dim=0)
            second += x.T @ x
            frames += len(x)
            q = attention.project_q(call.query.to(attention.linear_q.weight.dtype))
            q = (q + attention.pos_bias_u if attention.rel_pos else q)[call.queries].double()
            query_second += torch.einsum("nhi,nhj->hij", q, q)
            queries += len(q)
            means = call.run(pooling)[call.queries].double().view(-1, h, d).transpose(0, 1)
            pooled += means.sum(dim=1)
            pooled_second += means.transpose(1, 2) @ means  # (H, D, D)
        if not frames or not queries:
            raise UserError("calibration: no audio has reached the attention layers")
        return cls(
            frames=frames,
            queries=queries,
            mean=total / frames,
            second_moment=second / frames,
            query_moment=query_second / queries,
            pooled_mean=pooled / queries,
            pooled_moment=pooled_second / queries,
            calls=tuple(calls),
        )


class PooledInputs(MultiHeadAttention):
    """An attention's weights applied to its inputs: (B, Q, H D), sum_j a_ij x_j of each head."""

    def __init__(self, attention: MultiHeadAttention):
        super().__init__(
            HeadSizes(attention.h, attention.linear_q.in_features),
            0.0,
            attention.rel_pos,
            attention.zero_triu,
        )
        self.load_state_dict(attention.state_dict())
        self.to(attention.linear_q.weight)
        self.linear_out = nn.Identity()  # type: ignore[assignment]

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = super().project_kv(key, value)
        return k, value[:, None].expand(-1, self.h, -1, -1)


def gather(
    modules: Mapping[str, MultiHeadAttention], run: Callable[[], object]
) -> dict[str, LayerStatistics]:
    """Watch attention modules while `run` pushes calibration audio through their model.

    The model should be in evaluation mode. Padding is left out where masks tell of it; the queries
    of cross-attention have none, so let `run` go utterance by utterance for a decoder.

    Raises:
        UserError: a module was not reached.
    """
    with recording(modules) as calls, torch.no_grad():
        run()
    return {name: LayerStatistics.of(modules[name], calls[name]) for name in modules}
