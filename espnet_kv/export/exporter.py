"""Export of a model to a directory of ONNX graphs, each compared with the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet_kv.cli import progress
from espnet_kv.encoder.kaldi_fbank import KaldiFbankFrontend
from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.export.check import CHUNKS, Differences, compare
from espnet_kv.export.description import Cache, Description, weights_digest
from espnet_kv.export.graph import StreamingGraph
from espnet_kv.export.layouts import LAYOUTS
from espnet_kv.export.onnx_file import quantize, write_onnx
from espnet_kv.streaming.frontend import StreamingFrontend, TooShortError
from espnet_kv.streaming.recordings import read_scp, read_utterance

GRAPH, QUANTIZED = "model.onnx", "model.int8.onnx"
TOKENS, RECORD = "tokens.txt", "export.json"
EXACT = 1e-4
"""Highest difference of log-probabilities of a graph in fp32, relative to the largest."""
ROUNDED = 5e-2
"""The same where caches are rounded: a number may be rounded up here and down there."""
TOKEN_ERRORS = {GRAPH: 1.0, QUANTIZED: 5.0}
"""Highest error rate in % of the best path's tokens, the model's as reference."""


def read_features(model: Any, scp: Path, kind: str, utterances: int) -> list[Tensor]:
    """Features (T, F), before normalisation, of the first recordings of a wav.scp.

    Args:
        model: ESPnetASRModel with a frontend that streams.
        scp: the wav.scp. kind: sound or kaldi_ark. utterances: how many to read.

    Raises:
        UserError: a recording cannot be read.
    """
    frontend = StreamingFrontend(model.frontend)
    entries = list(read_scp(scp).items())[:utterances]
    features = []
    with progress("reading recordings", len(entries)) as counter:
        for _, entry in entries:
            samples = read_utterance(entry, kind, frontend.sample_rate)
            try:
                features.append(frontend(torch.as_tensor(samples).float(), is_final=True))
            except TooShortError:
                frontend.reset()
            counter.update()
    return features


def export(
    model: Any,
    features: Sequence[Tensor],
    directory: Path,
    *,
    layout: str = "plain",
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    cache_dtype: str | None = None,
    int8: bool = True,
) -> dict[str, Differences]:
    """Write the graphs of a model, tokens.txt and export.json to a directory.

    Args:
        model: ESPnetASRModel in eval mode, in float32 on the CPU.
        features: recordings to compare graph and model on, see `read_features`.
        directory: an empty directory.
        layout: key of LAYOUTS.
        chunk_size, left_chunks, cache_dtype: see StreamingGraph.
        int8: write a second graph whose weights are int8.

    Returns:
        The differences of each graph, by its file name.

    Raises:
        ArgumentError: the layout needs Kaldi's features, or left_chunks is -1.
        UserError: the recordings are too short, or a graph disagrees with the model.
    """
    if layout == "wenet" and not isinstance(model.frontend, KaldiFbankFrontend):
        raise ArgumentError(
            "layout",
            "wenet: sherpa-onnx computes Kaldi's features, and the model was trained with others; "
            "train with frontend: kaldi_fbank, or give --layout plain",
        )
    graph = StreamingGraph(model, chunk_size, left_chunks, cache_dtype).eval()
    chunks = sum(max(0, (len(f) - graph.window) // graph.shift + 1) for f in features)
    if chunks < CHUNKS:
        raise UserError(
            f"the recordings have {chunks} chunks of {graph.chunk_size} frames; the comparison "
            f"needs {CHUNKS}: give more or longer recordings"
        )
    inputs = LAYOUTS[layout](graph, len(model.token_list)).eval()
    description = describe(graph, len(model.token_list))
    write_onnx(inputs, directory / GRAPH, {"espnet_kv": description.model_dump_json()})
    if int8:
        quantize(directory / GRAPH, directory / QUANTIZED)
    found = {}
    for name in (GRAPH, QUANTIZED) if int8 else (GRAPH,):
        found[name] = compare(directory / name, inputs, model, features)
        print(f"  {name}: {_said(found[name])}", flush=True)
        _judge(name, found[name], cache_dtype)
    write_tokens(model.token_list, directory / TOKENS)
    record = {"layout": layout, **description.model_dump()} | {
        "checks": {name: vars(difference) for name, difference in found.items()}
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return found


def describe(graph: StreamingGraph, vocabulary: int) -> Description:
    """Shapes and settings of a graph; vocabulary: V."""
    caches = graph.caches()
    named = zip(graph.cache_names(), graph.kinds(), caches, strict=True)
    return Description(
        attention=graph.attention,
        chunk_size=graph.chunk_size,
        left_chunks=graph.left_chunks,
        cache_dtype=graph.cache_dtype,
        window=graph.window,
        shift=graph.shift,
        features=graph.features,
        output_size=graph.encoder.output_size(),
        vocabulary=vocabulary,
        caches=[
            Cache(
                name=name,
                kind=kind,
                shape=tuple(cache.shape[1:]),
                dtype=str(cache.dtype).removeprefix("torch."),
            )
            for name, kind, cache in named
        ],
        cache_bytes=sum(cache.nbytes for cache in caches),
        weights=weights_digest(graph),
    )


def write_tokens(token_list: Sequence[str], path: Path) -> None:
    """Write tokens.txt as sherpa-onnx reads it: a token and its number; the blank is <blk>."""
    names = ["<blk>", *token_list[1:]]
    lines = [f"{name} {number}\n" for number, name in enumerate(names)]
    path.write_text("".join(lines), encoding="utf-8")


def _said(found: Differences) -> str:
    ragged = "" if found.ragged is None else f", in a batch of all ages {found.ragged:.1e}"
    return (
        f"{found.chunks} chunks compared: log-probabilities differ by {found.log_probs:.1e}"
        f"{ragged} (relative), tokens by {found.tokens:.2f} %"
    )


def _judge(name: str, found: Differences, cache_dtype: str | None) -> None:
    """Refuse a graph that disagrees with the model."""
    allowed = EXACT if cache_dtype in (None, "fp32") else ROUNDED
    worst = max(found.log_probs, found.ragged or 0.0)
    if name == GRAPH and not worst <= allowed:
        raise UserError(
            f"{name} disagrees with the model: log-probabilities differ by {worst:.1e} (allowed: "
            f"{allowed:.0e}); nothing was written"
        )
    if not found.tokens <= TOKEN_ERRORS[name]:
        raise UserError(
            f"{name} disagrees with the model: {found.tokens:.2f} % of the tokens differ (allowed: "
            f"{TOKEN_ERRORS[name]:g} %); nothing was written"
            + ("; leave it out with --int8 false" if name == QUANTIZED else "")
        )
