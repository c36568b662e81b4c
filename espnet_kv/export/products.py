"""Matrix products of an ONNX graph: what can be folded into their weights, or become one.

Shape letters: C input and O output channels, T and F the axes convolved over, K_T and K_F sizes of
the kernel.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espnet_kv.export.shapes import remove_unused

# The subsampling convolution has hundreds; with a single one there is nothing to gain.
LEAST_CHANNELS = 16
_END = 2**63 - 1


def convolutions_as_products(model: Any) -> None:
    """Replace in place the two-dimensional convolutions of many channels without padding.

    The parts of the input that meet each weight of the kernel, side by side, are a matrix of
    (K_T K_F C) columns. Its product with the weights is the convolution (Chellapilla et al.,
    "High Performance Convolutional Neural Networks for Document Processing", 2006).

    Args:
        model: onnx.ModelProto.
    """
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "Conv" or not _is_replaced(node, weights):
            nodes.append(node)
            continue
        kernel = numpy_helper.to_array(weights[node.input[1]])  # (O, C, K_T, K_F)
        matrix = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))  # (K_T K_F C, O)
        name = f"{node.name}/weight"
        graph.initializer.append(numpy_helper.from_array(matrix.copy(), name))
        nodes += _product(node, name, kernel.shape[2:], graph)
    del graph.node[:]
    graph.node.extend(nodes)
    remove_unused(graph)


def scales_into_weights(model: Any) -> None:
    """Multiply weights and biases by the scale of a linear layer's output, in place.

    Such as the half of a Conformer's feed-forward layers. Only powers of two, which are exact.

    Args:
        model: onnx.ModelProto.
    """
    from onnx import numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(output.name for output in graph.output)
    for node in list(graph.node):
        scale = _scale(node, makers)
        linear = makers.get(node.input[0]) if scale else None
        if linear is None or linear.op_type != "Add" or uses[node.input[0]] > 1:
            continue
        bias, product = linear.input
        matrix = makers.get(product)
        if matrix is None or matrix.op_type != "MatMul" or uses[product] > 1:
            continue
        names = (bias, matrix.input[1])
        if any(uses[name] > 1 or name not in tensors for name in names):
            continue
        for name in names:
            values = numpy_helper.to_array(tensors[name]) * np.float32(scale)
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))
        linear.output[0] = node.output[0]
        graph.node.remove(node)


def _scale(node: Any, makers: Mapping[str, Any]) -> float | None:
    """The power of two that a node multiplies its first input by; None: it does something else."""
    constant = makers.get(node.input[1]) if node.op_type == "Mul" else None
    if constant is None or constant.op_type != "Constant":
        return None
    from onnx import numpy_helper

    value = numpy_helper.to_array(_attributes(constant)["value"])
    return value.item() if value.size == 1 and abs(np.frexp(value.item())[0]) == 0.5 else None


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _is_replaced(node: Any, weights: dict[str, Any]) -> bool:
    given = _attributes(node)
    kernel = weights.get(node.input[1])
    return (
        kernel is not None
        and len(kernel.dims) == 4
        and kernel.dims[1] >= LEAST_CHANNELS
        and given.get("group", 1) == 1
        and given.get("auto_pad", b"NOTSET") == b"NOTSET"
        and not any(given.get("pads", ()))
        and all(step == 1 for step in given.get("dilations", ()))
    )


def _product(node: Any, weight: str, kernel: tuple[int, int], graph: Any) -> Iterator[Any]:
    """The nodes that take the place of a convolution; their constants go to the graph."""
    from onnx import helper, numpy_helper

    def constant(name: str, values: list[int]) -> str:
        array = np.array(values, dtype=np.int64)
        graph.initializer.append(numpy_helper.from_array(array, f"{node.name}/{name}"))
        return f"{node.name}/{name}"

    def make(kind: str, inputs: list[str], name: str, **attributes: Any) -> Any:
        output = f"{node.name}/{name}"
        return helper.make_node(kind, inputs, [output], output, **attributes)

    strides = list(_attributes(node).get("strides", (1, 1)))
    axes, steps = constant("axes", [1, 2]), constant("steps", strides)
    last = make("Transpose", [node.input[0]], "frames", perm=[0, 2, 3, 1])  # (B, T, F, C)
    yield last
    frames, parts = last.output[0], []
    for t, f in np.ndindex(*kernel):
        ends = [_end(t, kernel[0]), _end(f, kernel[1])]
        begin, end = constant(f"begin_{t}_{f}", [t, f]), constant(f"end_{t}_{f}", ends)
        part = make("Slice", [frames, begin, end, axes, steps], f"part_{t}_{f}")
        parts.append(part.output[0])
        yield part
    columns = make("Concat", parts, "columns", axis=3)
    product = make("MatMul", [columns.output[0], weight], "product")
    yield from (columns, product)
    last = product
    if len(node.input) > 2:
        last = make("Add", [product.output[0], node.input[2]], "biased")
        yield last
    yield helper.make_node(
        "Transpose", [last.output[0]], list(node.output), f"{node.name}/channels", perm=[0, 3, 1, 2]
    )


def _end(offset: int, size: int) -> int:
    """Where the input that meets the weight `offset` of `size` ends, counted from the end."""
    return offset - size + 1 if offset < size - 1 else _END
