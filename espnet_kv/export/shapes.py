"""Arithmetic on shapes in an ONNX graph, replaced by its results.

Only the number of streams varies between runs of an exported graph. The exporter nevertheless
writes every size as nodes that compute it. They are half of all nodes, and in a chunk of one
stream they take as long as the caches of attention.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

BATCHES = (2, 3)


def shapes_as_constants(model: Any, run: Callable[[Any, int], Sequence[Tensor]]) -> None:
    """Replace in place what follows from shapes and does not depend on the number of streams B.

    `remove_unused` then removes the arithmetic.

    The shape of a Reshape may contain B once, which is then left to be inferred.

    Args:
        model: onnx.ModelProto in which no shape depends on data, such as that of a
            `StreamingGraph`; its nodes are in the order in which they run.
        run: outputs of an onnx.ModelProto with the inputs of `model` for a number of streams.
    """
    from onnx import numpy_helper

    graph = model.graph
    known = _known_by_shapes(graph)
    uses = list(_uses(graph, known))
    if not uses:
        return
    measured = _measuring(model, uses)
    names = [output.name for output in measured.graph.output]
    values = [
        {name: x.numpy() for name, x in zip(names, run(measured, b), strict=True)} for b in BATCHES
    ]
    for node, place in uses:
        name = _measured(node, place)
        first, second = (value[name] for value in values)
        found = _constant(first, second, _is_shape(node, place))
        if found is not None:
            node.input[place] = f"{name}/constant"
            if all(node.input[place] != tensor.name for tensor in graph.initializer):
                graph.initializer.append(numpy_helper.from_array(found, node.input[place]))


def _known_by_shapes(graph: Any) -> set[str]:
    """Names of the tensors computed from shapes and constants alone."""
    constants = {tensor.name for tensor in graph.initializer}
    known: set[str] = set()
    for node in graph.node:
        inputs = {name for name in node.input if name}
        if inputs <= constants:
            constants.update(node.output)
        elif node.op_type == "Shape" or inputs <= known | constants:
            known.update(node.output)
    return known


def _uses(graph: Any, known: set[str]) -> Iterator[tuple[Any, int]]:
    """(node, index of its input) where a known tensor meets those that are not."""
    for node in graph.node:
        if not known.intersection(node.output):
            for place, name in enumerate(node.input):
                if name in known:
                    yield node, place


def _is_shape(node: Any, place: int) -> bool:
    return node.op_type == "Reshape" and place == 1


def _measured(node: Any, place: int) -> str:
    """The tensor to measure: of a Reshape the shape it makes, as it may be given 0 and -1."""
    return f"{node.output[0]}/shape" if _is_shape(node, place) else node.input[place]


def _measuring(model: Any, uses: Sequence[tuple[Any, int]]) -> Any:
    """A copy of the model whose outputs are the tensors to measure."""
    from onnx import ModelProto, ValueInfoProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(
        helper.make_node("Shape", [node.output[0]], [_measured(node, place)])
        for node, place in uses
        if _is_shape(node, place)
    )
    del copy.graph.output[:]
    names = dict.fromkeys(_measured(node, place) for node, place in uses)
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def _constant(first: Any, second: Any, is_shape: bool) -> Any:
    """The value for all numbers of streams, given those for BATCHES; None: there is none."""
    if first.dtype != "int64" or first.shape != second.shape:
        return None
    differ = first != second
    if not differ.any():
        return first
    if not (is_shape and differ.sum() == 1 and first.all()):
        return None
    found = first.copy()
    found[differ] = -1
    return found


def remove_unused(graph: Any) -> None:
    """Remove the nodes and constants that no output depends on."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for tensor in list(graph.initializer):
        if tensor.name not in needed:
            graph.initializer.remove(tensor)
