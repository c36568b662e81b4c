"""Training linear attention on the outputs of softmax attention (Hedgehog, arXiv 2402.04347)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.attention.base import Attention
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.linear import LinearAttention
from espnet_kv.convert.calls import recording
from espnet_kv.convert.modules import replacement_module


def to_linear(
    attention: MultiHeadAttention, feature_map: str = "hedgehog", decay: float | None = None
) -> LinearAttention:
    """Linear attention initialised with the projections of `attention`, without positions.

    Query and key projections are scaled by d_k^-1/4, so that their product equals the logits of
    softmax attention.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: unknown feature_map, decay out of range.
    """
    new = replacement_module(attention, LinearAttention, feature_map=feature_map, decay=decay)
    with torch.no_grad():
        for name in ("linear_q", "linear_k"):
            for parameter in getattr(new, name).parameters():
                parameter.mul_(attention.d_k**-0.25)
    return new


def transfer(
    teachers: Mapping[str, MultiHeadAttention],
    students: Mapping[str, Attention],
    run: Callable[[], object],
    steps: int,
    lr: float = 1e-2,
    projections: bool = False,
    progress: Callable[[int, float], Any] = lambda step, error: None,
) -> dict[str, float]:
    """Train the feature maps of students to reproduce the outputs of their teachers.

    All layers are trained at the same time, each on the inputs of its teacher; other parameters
    are not trained. The result is deterministic for given batches.

    Args:
        teachers, students: layer name -> module.
        run: runs the model that contains the teachers on one batch of unlabelled audio.
        steps: number of batches.
        lr: initial learning rate of Adam, with cosine decay to 0.
        projections: train linear_q and linear_k too.
        progress: called with (step, mean relative squared error) after each step.

    Returns:
        Each layer's relative squared error for the last batch.
    """
    trained = {name: _trained(student, projections) for name, student in students.items()}
    optimizer = torch.optim.Adam([p for group in trained.values() for p in group], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors: dict[str, float] = {}
    for step in range(steps):
        with recording(teachers) as calls, torch.no_grad():
            run()
        optimizer.zero_grad()
        for name, student in students.items():
            losses = [_error(student, teachers[name], call) for call in calls[name]]
            loss = torch.stack(losses).mean()
            grads = torch.autograd.grad(loss, trained[name])
            for parameter, grad in zip(trained[name], grads, strict=True):
                parameter.grad = grad
            errors[name] = float(loss.detach())
        optimizer.step()
        schedule.step()
        progress(step + 1, sum(errors.values()) / len(errors))
    return errors


def _trained(student: nn.Module, projections: bool) -> list[nn.Parameter]:
    names = ("feature_map.", "linear_q.", "linear_k.") if projections else ("feature_map.",)
    return [p for name, p in student.named_parameters() if name.startswith(names)]


def _error(student: nn.Module, teacher: nn.Module, call: Any) -> Tensor:
    with torch.no_grad():
        expected = call.run(teacher)[call.queries]
        spread = (expected - expected.mean(dim=0)).square().sum()
    return (call.run(student)[call.queries] - expected).square().sum() / spread
