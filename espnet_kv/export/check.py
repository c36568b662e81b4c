"""Check of a graph against the model that it was made from, on recordings.

Shape letters: B streams, C chunk_size, F feature size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import torch
from torch import Tensor

from espnet_kv.export.layouts import Layout
from espnet_kv.export.onnx_file import open_graph, run_graph
from espnet_kv.streaming.ctc import GreedySearch

CHUNKS = 50
"""Fewest chunks to compare."""
STREAMS = 4
"""Streams of the ragged batch."""


@dataclass(frozen=True)
class Differences:
    """Differences of a graph and the model.

    Attributes:
        chunks: chunks compared.
        log_probs: highest difference, relative to the largest log-probability.
        ragged: the same between streams in a batch, of different ages, and alone; None: the layout
            has no batches.
        tokens: error rate in % of the tokens of the best path, the model's as reference.
    """

    chunks: int
    log_probs: float
    ragged: float | None
    tokens: float


@torch.no_grad()
def compare(path: Path, layout: Layout, model: Any, features: Sequence[Tensor]) -> Differences:
    """Compare a graph and its model.

    Args:
        path: the graph. layout: it was written with.
        model: ESPnetASRModel in eval mode.
        features: (T, F) of each recording, as the runtime computes them.

    Returns:
        The differences over all whole chunks of the recordings.
    """
    session = open_graph(path)
    ours, expected, hypotheses, references = [], [], [], []
    for one in features:
        ours.append(_graph(session, layout, one))
        expected.append(_model(model, layout, one))
        references.append(best_path(expected[-1], model.blank_id))
        hypotheses.append(best_path(ours[-1], model.blank_id))
    a, b = torch.cat(ours), torch.cat(expected)
    scale = float(b.abs().max())
    return Differences(
        len(a) // layout.graph.chunk_size,
        float((a - b).abs().max()) / scale,
        _ragged(session, layout, features, ours, scale) if layout.batched else None,
        token_errors(references, hypotheses),
    )


def token_errors(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Error rate in % of tokens; infinite without any token, as there is nothing to compare."""
    spoken = [number for number, reference in enumerate(references) if reference]
    if not spoken:
        return float("inf")
    return 100 * jiwer.wer([references[n] for n in spoken], [hypotheses[n] for n in spoken])


def _windows(layout: Layout, features: Tensor) -> list[Tensor]:
    """(window, F) of each whole chunk."""
    graph = layout.graph
    last = len(features) - graph.window
    return [features[start : start + graph.window] for start in range(0, last + 1, graph.shift)]


def _graph(session: Any, layout: Layout, features: Tensor) -> Tensor:
    """(T', V) log-probabilities of a recording by the graph."""
    inputs = list(layout.example(1))
    out = [torch.zeros(0, layout.vocabulary)]
    for window in _windows(layout, features):
        inputs = layout.with_features(inputs, window[None])
        outputs = run_graph(session, inputs)
        out.append(outputs[0][0])
        inputs = layout.following(inputs, outputs)
    return torch.cat(out)


def _model(model: Any, layout: Layout, features: Tensor) -> Tensor:
    """The same by forward_chunk."""
    return log_probs_of(model, layout, layout.model_features(features))


def log_probs_of(model: Any, layout: Layout, features: Tensor) -> Tensor:
    """(T', V) log-probabilities of the whole chunks of the model's features by forward_chunk."""
    graph = layout.graph
    state = model.encoder.init_state(
        chunk_size=graph.chunk_size,
        left_chunks=graph.left_chunks,
        cache_dtype=graph.cache_dtype,
    )
    whole = len(_windows(layout, features)) * graph.shift + graph.window - graph.shift
    xs = features[None, :whole].clone()  # ESPnet's normalisation works in place
    if model.normalize is not None:
        xs, _ = model.normalize(xs, torch.tensor([xs.size(1)]))
    encoded, state = model.encoder.forward_chunk(xs, state)
    return model.ctc.log_softmax(encoded)[0]


def _ragged(
    session: Any, layout: Layout, features: Sequence[Tensor], alone: Sequence[Tensor], scale: float
) -> float:
    """Highest difference between streams that begin one chunk after the other, and alone."""
    streams = [(f, y) for f, y in zip(features, alone, strict=True) if len(y)][:STREAMS]
    size = layout.graph.chunk_size
    worst, held = 0.0, []  # held: inputs of each stream that has begun
    windows = [_windows(layout, f) for f, _ in streams]
    begun: list[int] = []
    for turn in range(max(len(w) + n for n, w in enumerate(windows))):
        if turn < len(streams):
            held.append(list(layout.example(1)))
            begun.append(turn)
        active = [n for n, first in enumerate(begun) if turn - first < len(windows[n])]
        if not active:
            continue
        rows = [layout.with_features(held[n], windows[n][turn - begun[n]][None]) for n in active]
        batch = [torch.cat(column) for column in zip(*rows, strict=True)]
        outputs = run_graph(session, batch)
        after = layout.following(batch, outputs)
        for row, n in enumerate(active):
            held[n] = [x[row : row + 1] for x in after]
            first = (turn - begun[n]) * size
            reference = streams[n][1][first : first + size]
            worst = max(worst, float((outputs[0][row] - reference).abs().max()))
    return worst / scale


def best_path(log_probs: Tensor, blank: int) -> str:
    """The tokens of the best path, separated by spaces."""
    search = GreedySearch(blank)
    search.advance(log_probs)
    (best,) = search.nbest(1)
    return " ".join(map(str, best.tokens))
