"""Fitting a converted attention to what its source puts out, on the same inputs."""

from collections.abc import Sequence

import torch
from torch import nn

from espnet_kv.attention.base import Attention
from espnet_kv.convert.calls import Call


def fit_output(
    source: Attention,
    converted: Attention,
    calls: Sequence[Call],
    parameters: Sequence[nn.Parameter],
    steps: int,
) -> float:
    """Change `parameters` of `converted` so that E |o' - o|^2 falls: L-BFGS, deterministic.

    Returns:
        E |o' - o|^2 / E |o - E o|^2 at the end.
    """
    with torch.no_grad():
        targets = [call.run(source)[call.queries] for call in calls]
        together = torch.cat(targets)
        spread = (together - together.mean(dim=0)).square().sum()
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=spread.dtype)
        for call, target in zip(calls, targets, strict=True):
            loss = (call.run(converted)[call.queries] - target).square().sum() / spread
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(loss_and_gradient)
        final = float(loss_and_gradient())
    optimizer.zero_grad()
    return final
