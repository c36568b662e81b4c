"""How far a converted attention is from its source, on inputs that it was not fitted to."""

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

    0: none; 1: no better than a constant.
    """
    wanted = rows(calls, "queries", lambda call: call.run(source)).double()
    given = rows(calls, "queries", lambda call: call.run(converted)).double()
    return _relative(given - wanted, wanted)


@torch.no_grad()
def layer_errors(
    source: MultiHeadAttention, converted: Attention, inputs: Sequence[Call]
) -> dict[str, float]:
    """Relative errors of a converted layer, each sqrt(E |error|^2 / E |x - E x|^2).

    k, v: of the source's keys and values as the best affine map reads them back from the converted
    ones. (A basis of its own and another order of heads are no error, and a constant added to all
    keys is none either: softmax cancels it.)
    output: of the attention output.
    """
    x = rows(inputs, "frames", lambda call: call.key)
    wanted = _keys_and_values(source, x)
    given = _keys_and_values(converted, x)
    errors = {
        name: _relative(_unexplained(*pair), pair[0])
        for name, *pair in zip("kv", wanted, given, strict=True)
    }
    return errors | {"output": output_error(source, converted, inputs)}


def _keys_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of frames x (N, D), each (N, heads d_k); linear attention's before its feature map."""
    if isinstance(attention, LinearAttention):
        k, v = attention.linear_k(x), attention.linear_v(x)
    else:
        k, v = (
            part[0].transpose(0, 1).flatten(1) for part in attention.project_kv(x[None], x[None])
        )
    return k.double(), v.double()


def _unexplained(wanted: Tensor, given: Tensor) -> Tensor:
    """What is left of (N, n) when the best affine map of (N, m) is taken away."""
    wanted, given = wanted - wanted.mean(dim=0), given - given.mean(dim=0)
    basis, singular, _ = torch.linalg.svd(given, full_matrices=False)
    basis = basis[:, singular > 1e-6 * singular[0]]
    return wanted - basis @ (basis.T @ wanted)


def _relative(error: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean(dim=0)).square().sum()
    return float((error.square().sum() / spread.clamp(min=torch.finfo(spread.dtype).tiny)).sqrt())
