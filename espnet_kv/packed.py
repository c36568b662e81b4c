"""Weights of linear layers in the layout in which a CPU multiplies few rows fastest.

Shape letters: N output size, K input size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Measured with one thread, as ratios to F.linear: 0.4 to 0.6 with 5 to 20 rows, 0.8 to 0.9 with
# hundreds. With fewer rows, or a smaller weight, the call itself takes the time that is saved.
LEAST_ROWS = 5
LEAST_NUMBERS = 1 << 17
# The layout is chosen for a number of rows: that for 16 is the best or nearly so for all numbers.
TYPICAL_ROWS = 16


class PackedWeight:
    """A copy of a weight in oneDNN's blocked layout, made anew when the weight has changed.

    Copies and pickles of it are empty, and are filled at their first use.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._source: Tensor | None = None  # of the copy; it keeps the address from being used anew
        self._version = -1

    def __getstate__(self) -> dict[str, object]:
        return vars(PackedWeight())

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear: (..., K) -> (..., N), equal but for rounding.

        It is F.linear itself, bit for bit, where that is faster or needed: for a few rows, with
        gradients, under autocast, in a trace, and for all but float32 on a CPU.
        """
        if not _helps(x, weight):
            return F.linear(x, weight, bias)
        self.fill(weight)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

    def fill(self, weight: Tensor) -> None:
        """Pack the weight (N, K), if that has not been done since it changed."""
        version = 0 if weight.is_inference() else weight._version
        source = self._source
        if source is None or (source.data_ptr(), self._version) != (weight.data_ptr(), version):
            plain = weight.detach()
            # first the copy: another thread that finds the new source uses it
            self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous(), TYPICAL_ROWS)
            self._source, self._version = plain, version


class Packable:
    """A layer that `pack_weights` packs; it comes before the class of torch in the bases."""

    def pack(self) -> None:
        """Make or renew the copy of the weight, if it saves time."""
        raise NotImplementedError


class PackedLinear(Packable, nn.Linear):
    """nn.Linear with a packed copy of its weight. Parameters and state dict are the same."""

    packed: PackedWeight

    @classmethod
    def of(cls, linear: nn.Linear) -> "PackedLinear":
        """The parameters and hooks of `linear` in this class."""
        made = cls(linear.in_features, linear.out_features, device="meta")
        vars(made).update(vars(linear))
        made.packed = PackedWeight()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.packed.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """See Packable."""
        self.packed.fill(self.weight)


def pack_weights(model: nn.Module) -> None:
    """Give the layers in a model packed copies of their weights, for inference on a CPU.

    The matrix products of a chunk then take about half the time. The copies take as much memory as
    the weights. Later changes of the weights are noticed, except in place through `Tensor.data`.

    Linear layers are replaced by PackedLinear, which torch's dynamic quantisation does not know:
    quantise before. Subclasses of nn.Linear stay as they are, as do layers for which
    `is_worth_packing` is false.
    """
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Linear and is_worth_packing(layer.weight):
                setattr(owner, name, PackedLinear.of(layer))
    for layer in model.modules():
        if isinstance(layer, Packable):
            layer.pack()


def is_worth_packing(weight: Tensor) -> bool:
    """Whether torch has oneDNN, and the weight is large, in float32 and on a CPU."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    has_kernel = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return fits and weight.numel() >= LEAST_NUMBERS and has_kernel


def _helps(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and x.numel() >= LEAST_ROWS * x.size(-1)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )
