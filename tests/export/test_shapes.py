"""Arithmetic on shapes in ONNX graphs, replaced by its results."""

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from espnet_kv.export.onnx_file import open_graph, run_graph  # noqa: E402
from espnet_kv.export.shapes import remove_unused, shapes_as_constants  # noqa: E402

FRAMES, SIZE = 4, 6


def exported(module: nn.Module, tmp_path):
    """The graph of a module of one input (B, FRAMES, SIZE), as torch writes it."""
    torch.onnx.export(
        module.eval(),
        (torch.zeros(2, FRAMES, SIZE),),
        str(tmp_path / "x.onnx"),
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    return onnx.load(tmp_path / "x.onnx")


def run(model, batch: int, x: Tensor | None = None) -> list[Tensor]:
    x = torch.zeros(batch, FRAMES, SIZE) if x is None else x
    return run_graph(open_graph(model.SerializeToString()), [x])


def kinds(model) -> set[str]:
    return {node.op_type for node in model.graph.node}


class Heads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.size(0), x.size(1), 2, -1).transpose(1, 2)
        kept = heads[:, :, x.size(1) - 3 :]
        return kept.flatten(1).unflatten(1, (3, x.size(2)))


class Streams(nn.Module):
    """Streams become rows of one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0) * 2, -1) + 1


class Counted(nn.Module):
    """The number of streams is among the results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * torch.ones(x.size(0), 1, 1), x.sum() / x.size(0)


@pytest.mark.parametrize("module", [Heads(), Streams(), Counted()], ids=lambda m: type(m).__name__)
def test_outputs_are_the_same_for_every_number_of_streams(module, tmp_path):
    model = exported(module, tmp_path)
    shapes_as_constants(model, run)
    remove_unused(model.graph)
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, FRAMES, SIZE)
        expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, wanted in zip(run(model, batch, x), expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("module", [Heads(), Streams()], ids=lambda m: type(m).__name__)
def test_no_arithmetic_is_left(module, tmp_path):
    model = exported(module, tmp_path)
    assert kinds(model) & {"Shape", "Gather"}
    shapes_as_constants(model, run)
    remove_unused(model.graph)
    assert not kinds(model) & {"Shape", "Gather", "Unsqueeze", "Concat"}


def test_what_depends_on_data_stays(tmp_path):
    """The first number of x says where a slice begins."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "flat"], ["numbers"]),
        helper.make_node("Slice", ["numbers", "zero", "one"], ["begin"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "one", "two"], ["frames"]),
        helper.make_node("Slice", ["x", "begin", "frames", "one"], ["y"]),
    ]
    values = {"flat": [-1], "zero": [0], "one": [1], "two": [2]}
    graph = helper.make_graph(
        nodes,
        "graph",
        [info("x", TensorProto.FLOAT, ["batch", FRAMES, SIZE])],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(torch.tensor(v).numpy(), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    shapes_as_constants(model, run)
    remove_unused(model.graph)
    assert "Shape" not in kinds(model) and "Cast" in kinds(model)
    for begin in (0, 2):
        x = torch.full((2, FRAMES, SIZE), float(begin))
        torch.testing.assert_close(run(model, 2, x)[0], x[:, begin:])
