"""Sensitivity of the model output to noise in each attention layer's output."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# standard deviation of the noise, relative to that of the output it is added to
NOISE = 0.1


@torch.no_grad()
def measure_effects(
    modules: Mapping[str, nn.Module], run: Callable[[], Tensor], seed: int = 0
) -> dict[str, float]:
    """Add noise to the output of one layer at a time and measure the change of the model output.

    Args:
        modules: name -> attention module.
        run: runs the model in evaluation mode on the same audio every time and returns its output
            (encoder output or log-probabilities).
        seed: for the noise.

    Returns:
        For each module, squared change of the model output divided by the squared noise.
    """
    before = run().double()
    effects = {}
    for name, module in modules.items():
        generator = torch.Generator().manual_seed(seed)
        added = torch.zeros((), dtype=torch.float64)

        def disturb(_module, _args, output, generator=generator, added=added):
            noise = torch.randn(output.shape, generator=generator).to(output)
            noise = noise * (NOISE * output.std())
            added += noise.double().square().sum().cpu()
            return output + noise

        hook = module.register_forward_hook(disturb)
        try:
            changed = run().double() - before
        finally:
            hook.remove()
        effects[name] = float(changed.square().sum().cpu() / added)
    return effects
