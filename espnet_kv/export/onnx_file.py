"""Writing and running of ONNX files."""

import logging
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

    Activations are quantised while the graph runs. Products of two activations, depthwise
    convolutions, and the map of features stay in float32. The subsampling convolution, a quarter of
    the arithmetic, becomes a product (as one in float32 it would be slower).

    Args:
        source: the graph. target: the new file.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    convolutions_as_products(model)
    names = [node.name for node in model.graph.node]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that these graphs do not need
    try:
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[name for name in names if "/mapping/" in name],
            extra_options={"MatMulConstBOnly": True},
        )
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
