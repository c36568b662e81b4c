"""Writing and running of ONNX files."""

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet_kv.errors import UserError
from espnet_kv.export.layouts import Layout
from espnet_kv.export.products import convolutions_as_products, scales_into_weights
from espnet_kv.export.shapes import remove_unused, shapes_as_constants

OPSET = 17
BFLOAT16 = 16  # the number of this type in ONNX; NumPy does not have it
FLOAT = ("/mapping/", "/cgmlp/channel_proj2/")
"""Parts of the names of products that stay in float32 in a graph of int8: the map of features, and
the layer behind the gate of a Branchformer's cgMLP. Values there are products of two and a few are
ten times the rest, so that one scale for all rounds most of them away."""


def write_onnx(layout: Layout, path: Path, metadata: Mapping[str, str | int]) -> None:
    """Write the graph of a layout.

    Args:
        layout: in eval mode, with weights in float32 on the CPU.
        path: the new file.
        metadata: stored in the file beside those of the layout.
    """
    import onnx

    axes = {name: {0: "batch"} for name in [*layout.input_names, *layout.output_names]}
    with warnings.catch_warnings(), torch.no_grad():
        # Python numbers that become constants are fixed by the configuration.
        # torch's newer exporter gives an equally fast graph, but takes 15 times as long.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            layout,
            layout.example(2 if layout.batched else 1),
            str(path),
            input_names=list(layout.input_names),
            output_names=list(layout.output_names),
            dynamic_axes=axes if layout.batched else None,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(path)
    if layout.batched:
        shapes_as_constants(
            model,
            lambda other, b: run_graph(open_graph(other.SerializeToString()), layout.example(b)),
        )
    scales_into_weights(model)
    remove_unused(model.graph)
    onnx.helper.set_model_props(
        model, {key: str(value) for key, value in (layout.metadata() | dict(metadata)).items()}
    )
    onnx.save(model, path)


def quantize(source: Path, target: Path) -> None:
    """Write a copy of a graph whose matrix products have weights in int8.

    Activations are quantised while the graph runs, weights have a scale for each output. Products
    of two activations, depthwise convolutions and those of FLOAT stay in float32. The subsampling
    convolution, a quarter of the arithmetic, becomes a product (as one in float32 it would be
    slower).

    Args:
        source: the graph. target: the new file.
    """
    import onnx

    model = onnx.load(source)
    convolutions_as_products(model)
    axes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found = [
        (node.name, axes[node.input[1]])
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and node.input[1] in axes
        and not any(part in node.name for part in FLOAT)
    ]
    matrices = [name for name, count in found if count == 2]
    # onnxruntime has one scale for all outputs where heads have matrices of their own
    stacked = [name for name, count in found if count > 2]
    model = _quantized(model, matrices, per_channel=True)
    onnx.save(_quantized(model, stacked, per_channel=False) if stacked else model, target)


def _quantized(model: Any, nodes: list[str], per_channel: bool) -> Any:
    """The model with the weights of these nodes in int8; per_channel: a scale for each output."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that these graphs do not need
    try:
        with tempfile.TemporaryDirectory() as folder:
            quantize_dynamic(
                model,
                target := Path(folder) / "int8.onnx",
                nodes_to_quantize=nodes,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                extra_options={"MatMulConstBOnly": True},
            )
            return onnx.load(target)
    finally:
        root.setLevel(level)


def require_packages(*names: str) -> None:
    """Raise UserError if a package of the extra `serve` is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f'{name} is not installed: pip install "espnet_kv[serve]"') from error


def open_graph(graph: Path | bytes, threads: int = 0) -> Any:
    """An onnxruntime.InferenceSession of a file or its content, on the CPU.

    Args:
        threads: 0: one for each core.
    """
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = threads
    source = graph if isinstance(graph, bytes) else str(graph)
    return InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_graph(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a graph once; inputs and outputs are in its order."""
    from onnxruntime import OrtValue

    values = {}
    for put, x in zip(session.get_inputs(), inputs, strict=True):
        if x.dtype == torch.bfloat16:
            bits = x.contiguous().view(torch.uint16).numpy()
            values[put.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
        else:
            values[put.name] = OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
    names = [put.name for put in session.get_outputs()]
    outputs = session.run_with_ort_values(names, values)
    return [torch.from_dlpack(value._ortvalue.to_dlpack()) for value in outputs]
