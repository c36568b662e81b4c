"""A naive CTC prefix beam search."""

import math
from collections.abc import Callable

import numpy as np
import torch

BLANK = 0


def draw(frames: int, tokens: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    """(T, V) log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(frames, tokens, generator=generator)).log_softmax(-1)


def naive_beam(
    log_probs: torch.Tensor,
    beam_size: int,
    bonus: Callable[[tuple[int, ...]], float] = lambda prefix: 0.0,
) -> dict[tuple[int, ...], float]:
    """Prefix beam search with growing tuples and every token tried, as textbooks have it.

    bonus: added to the score of a prefix when prefixes are compared.
    """
    add = np.logaddexp
    beam = {(): (0.0, -math.inf)}
    for frame in log_probs.double().tolist():
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def put(prefix, in_blank, in_token, grown=grown):
            before = grown.get(prefix, (-math.inf, -math.inf))
            grown[prefix] = add(before[0], in_blank), add(before[1], in_token)

        for prefix, (in_blank, in_token) in beam.items():
            total = add(in_blank, in_token)
            for token, score in enumerate(frame):
                if token == BLANK:
                    put(prefix, total + score, -math.inf)
                elif prefix and token == prefix[-1]:
                    put(prefix, -math.inf, in_token + score)
                    put((*prefix, token), -math.inf, in_blank + score)
                else:
                    put((*prefix, token), -math.inf, total + score)
        ranked = sorted(grown, key=lambda prefix: -add(*grown[prefix]) - bonus(prefix))
        beam = {prefix: grown[prefix] for prefix in ranked[:beam_size]}
    return {prefix: float(add(*ends)) for prefix, ends in beam.items()}
