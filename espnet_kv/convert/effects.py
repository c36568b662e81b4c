"""How much an error in what a layer puts out shows in what its model puts out."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# size of the noise beside the output that it is added to
NOISE = 0.1


@torch.no_grad()
def measure_effects(
    modules: Mapping[str, nn.Module], run: Callable[[], Tensor], seed: int = 0
) -> dict[str, float]:
    """Add noise to one layer's output at a time, and see what comes of it.

    Args:
        modules: attention modules.
        run: pushes some audio through their model in evaluation mode and returns what the model
            makes of it (encoder output, log-probabilities): the same shape every time.

    Returns:
        Of each module the squared change of the model's output over the squared noise.
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
