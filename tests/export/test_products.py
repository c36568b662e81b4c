"""Matrix products of a graph: scales folded into them, and convolutions as products."""

import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from small_encoders import assert_close  # noqa: E402

from espnet_kv.export.onnx_file import open_graph, quantize, run_graph  # noqa: E402
from espnet_kv.export.products import (  # noqa: E402
    LEAST_CHANNELS,
    convolutions_as_products,
    scales_into_weights,
)

CHANNELS = LEAST_CHANNELS


def write(module, x, path):
    """The graph of `module`, for any batch."""
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    torch.onnx.export(
        module.eval(), x, path, input_names=["x"], output_names=["y"], dynamic_axes=axes,
        dynamo=False,
    )  # fmt: skip
    return onnx.load(path)


def kinds(model):
    return [node.op_type for node in model.graph.node]


def replaced(module, x, tmp_path):
    """The model with products, and what it makes of x."""
    model = write(module, x, tmp_path / "model.onnx")
    convolutions_as_products(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "products.onnx")
    with torch.no_grad():
        return model, run_graph(open_graph(tmp_path / "products.onnx"), [x])[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [(3, 2, (9, 12)), (3, 2, (10, 11)), ((1, 2), 1, (4, 5)), (5, 3, (5, 5)), (1, 2, (6, 3))],
)
def test_products_are_convolutions(tmp_path, kernel, stride, size, bias, batch):
    conv = nn.Conv2d(CHANNELS, 5, kernel, stride, bias=bias)
    x = torch.randn(batch, CHANNELS, *size)
    model, found = replaced(conv, x, tmp_path)
    assert "Conv" not in kinds(model)
    assert_close(found, conv(x).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(CHANNELS, 6, 3, padding=1),
        nn.Conv2d(CHANNELS, 6, 3, dilation=2),
        nn.Conv2d(2 * CHANNELS, 6, 3, groups=2),
        nn.Conv2d(CHANNELS - 1, 6, 3),
        nn.Conv1d(CHANNELS, 6, 3),
    ],
    ids=["padding", "dilation", "groups", "few channels", "one axis"],
)
def test_others_stay(tmp_path, conv):
    x = torch.randn(2, conv.in_channels, *[9] * (conv.weight.dim() - 2))
    model, found = replaced(conv, x, tmp_path)
    assert kinds(model).count("Conv") == 1
    assert_close(found, conv(x).detach())


class Twice(nn.Module):
    """Two convolutions with the same weights, and one that stays."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, 2)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(torch.relu(self.first(x)))))


@pytest.mark.filterwarnings("ignore")
def test_several_convolutions_in_a_graph(tmp_path):
    module, x = Twice(), torch.randn(2, 1, 20, 22)
    model, found = replaced(module, x, tmp_path)
    assert kinds(model).count("Conv") == 1
    assert kinds(model).count("MatMul") == 2
    assert_close(found, module(x).detach())
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.filterwarnings("ignore")
def test_the_int8_graph_has_them_in_int8(tmp_path):
    module, x = Twice(), torch.randn(2, 1, 20, 22)
    write(module, x, tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    quantize(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == before
    small = onnx.load(tmp_path / "int8.onnx")
    assert kinds(small).count("MatMulInteger") == 2
    assert "MatMul" not in kinds(small)
    found = run_graph(open_graph(tmp_path / "int8.onnx"), [x])[0]
    wanted = module(x).detach()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


class Scaled(nn.Module):
    """A scaled linear layer; `shared` uses its weights a second time."""

    def __init__(self, scale: float, shared: bool):
        super().__init__()
        self.linear, self.scale, self.shared = nn.Linear(6, 6), scale, shared

    def forward(self, x):
        first = self.linear(x) if self.shared else 1.0
        scale = torch.tensor(self.scale)
        return x + self.linear(x) * (scale[None] if self.scale == 2 else scale) * first


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scale", "shared", "products"),
    [(0.5, False, 1), (2.0, False, 1), (0.3, False, 2), (0.5, True, 2)],
)
def test_scales_are_folded_where_that_is_exact(scale, shared, products, tmp_path):
    module, x = Scaled(scale, shared), torch.randn(3, 4, 6)
    model = write(module, (x,), tmp_path / "x.onnx")
    scales_into_weights(model)
    assert sum(node.op_type == "Mul" for node in model.graph.node) == products
    onnx.checker.check_model(model, full_check=True)
    (got,) = run_graph(open_graph(model.SerializeToString()), [x])
    assert_close(got, module(x).detach())
