"""Relative errors of a converted attention layer, for inputs that it was not fitted to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention.base import Attention
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.linear import LinearAttention
from espnet_kv.convert.calls import Call, rows


@torch.no_grad()
def output_error(source: Attention, converted: Attention, calls: Sequence[Call]) -> float:
    """Relative error of the attention output: sqrt(E |o' - o|^2 / E |o - E o|^2).

    0: no error; 1: no better than a constant output.
    """
    return relative_error(outputs(converted, calls), outputs(source, calls))


@torch.no_grad()
def outputs(attention: Attention, calls: Sequence[Call]) -> Tensor:
    """(N, D) attention outputs of all queries, in float64."""
    return rows(calls, "queries", lambda call: call.run(attention)).double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """sqrt(E |actual - expected|^2 / E |expected - E expected|^2) over rows (N, n)."""
    return _relative(actual - expected, expected)


@torch.no_grad()
def layer_errors(
    source: MultiHeadAttention, converted: Attention, inputs: Sequence[Call]
) -> dict[str, float]:
    """Relative errors of a converted layer, each sqrt(E |error|^2 / E |x - E x|^2).

    k, v: error of the source's keys and values after the best affine map from the converted ones.
        A change of basis, another order of heads and a constant added to all keys (which softmax
        cancels) therefore do not count as errors.
    output: error of the attention output.
    """
    x = rows(inputs, "frames", lambda call: call.key)
    expected = _keys_and_values(source, x)
    actual = _keys_and_values(converted, x)
    errors = {
        name: _relative(_unexplained(*pair), pair[0])
        for name, *pair in zip("kv", expected, actual, strict=True)
    }
    return errors | {"output": output_error(source, converted, inputs)}


def _keys_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (N, heads d_k), of frames x (N, D); without any feature map."""
    if isinstance(attention, LinearAttention):
        k, v = attention.linear_k(x), attention.linear_v(x)
    else:
        k, v = (
            part[0].transpose(0, 1).flatten(1) for part in attention.project_kv(x[None], x[None])
        )
    return k.double(), v.double()


def _unexplained(expected: Tensor, actual: Tensor) -> Tensor:
    """Residual of `expected` (N, n) after affine regression on `actual` (N, m)."""
    expected, actual = expected - expected.mean(dim=0), actual - actual.mean(dim=0)
    basis, singular, _ = torch.linalg.svd(actual, full_matrices=False)
    basis = basis[:, singular > 1e-6 * singular[0]]
    return expected - basis @ (basis.T @ expected)


def _relative(error: Tensor, expected: Tensor) -> float:
    spread = (expected - expected.mean(dim=0)).square().sum()
    return float((error.square().sum() / spread.clamp(min=torch.finfo(spread.dtype).tiny)).sqrt())
