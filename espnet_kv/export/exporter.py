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
from espnet_kv.export.check import (
    CHUNKS,
    Differences,
    best_path,
    compare,
    log_probs_of,
    token_errors,
)
from espnet_kv.export.description import Cache, Description, weights_digest
from espnet_kv.export.graph import StreamingGraph
from espnet_kv.export.layouts import LAYOUTS, Layout
from espnet_kv.export.onnx_file import quantize, write_onnx
from espnet_kv.export.runtime_features import (
    EDGE,
    MARGIN,
    RUNTIMES,
    FeatureError,
    fit,
    model_features,
)
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


LARGEST_ERROR = 0.5
"""Highest mean difference of fitted features, in nat."""
FITTED_TOKEN_ERRORS = 5.0
"""Highest error rate in % of the best path's tokens with fitted features, the own as reference."""


def read_recordings(model: Any, scp: Path, kind: str | None, utterances: int) -> list[Tensor]:
    """Samples (N,) of the first recordings of a wav.scp, at the model's rate.

    Args:
        model: ESPnetASRModel with a frontend that streams.
        scp: the wav.scp. kind: sound or kaldi_ark; None: what each entry is.
        utterances: how many to read.

    Raises:
        UserError: a recording cannot be read.
    """
    frontend = StreamingFrontend(model.frontend)
    entries = list(read_scp(scp).items())[:utterances]
    recordings = []
    with progress("reading recordings", len(entries)) as counter:
        for utterance, entry in entries:
            try:
                samples = read_utterance(entry, kind, frontend.sample_rate)
            except UserError as error:
                raise UserError(f"{scp}: {utterance}: {error}") from error
            recordings.append(torch.as_tensor(samples).float())
            counter.update()
    return recordings


def export(
    model: Any,
    recordings: Sequence[Tensor],
    directory: Path,
    *,
    layout: str = "plain",
    features: str = "model",
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    cache_dtype: str | None = None,
    int8: bool = True,
) -> dict[str, Differences]:
    """Write the graphs of a model, tokens.txt and export.json to a directory.

    Args:
        model: ESPnetASRModel in eval mode, in float32 on the CPU.
        recordings: samples (N,) to compare graph and model on, see `read_recordings`.
        directory: an empty directory.
        layout: key of LAYOUTS.
        features: model: the runtime computes those that the model was trained with. fitted: the
            graph begins with a map from the runtime's to the model's, fitted on the recordings.
        chunk_size, left_chunks, cache_dtype: see StreamingGraph.
        int8: write a second graph whose weights are int8.

    Returns:
        The differences of each graph, by its file name.

    Raises:
        ArgumentError: the layout needs other features, or left_chunks is -1.
        UserError: the recordings are too short, or a graph or fitted features disagree with the
            model.
    """
    kind, frontend = LAYOUTS[layout], StreamingFrontend(model.frontend)
    _check_features(kind, layout, features, model)
    graph = StreamingGraph(model, chunk_size, left_chunks, cache_dtype).eval()
    found = [(x, _features(frontend, x, kind.runtime is not None)) for x in recordings]
    pairs = [(x, one) for x, one in found if one is not None]
    own = [one for _, one in pairs]
    chunks = sum(max(0, (len(f) - graph.window) // graph.shift + 1) for f in own)
    if chunks < CHUNKS:
        raise UserError(
            f"the recordings have {chunks} chunks of {graph.chunk_size} frames; the comparison "
            f"needs {CHUNKS}: give more or longer recordings"
        )
    inputs, given, error = kind(graph, len(model.token_list)).eval(), own, None
    if kind.runtime is not None:
        runtime = RUNTIMES[kind.runtime]
        given = [runtime(x, frontend.sample_rate, graph.features) for x, _ in pairs]
        inputs, error = _mapped(inputs, given, own, model, features == "fitted")
    description = describe(graph, len(model.token_list))
    write_onnx(inputs, directory / GRAPH, {"espnet_kv": description.model_dump_json()})
    if int8:
        quantize(directory / GRAPH, directory / QUANTIZED)
    differences = {}
    for name in (GRAPH, QUANTIZED) if int8 else (GRAPH,):
        differences[name] = compare(directory / name, inputs, model, given)
        print(f"  {name}: {_said(differences[name])}", flush=True)
        _judge(name, differences[name], cache_dtype)
    write_tokens(model.token_list, directory / TOKENS)
    record = {"layout": layout, **description.model_dump()} | {
        "features": {"kind": features} | ({} if error is None else vars(error)),
        "checks": {name: vars(difference) for name, difference in differences.items()},
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return differences


def _check_features(kind: type[Layout], layout: str, features: str, model: Any) -> None:
    """Refuse a layout with features that do not go with it."""
    if features == "fitted" and kind.runtime is None:
        raise ArgumentError(
            "features", f"fitted: --layout {layout} takes the model's; leave it out"
        )
    same = kind.runtime == "kaldi" and isinstance(model.frontend, KaldiFbankFrontend)
    if features == "model" and kind.runtime is not None and not same:
        names = {"kaldi": "Kaldi's features", "nemo": "those of NeMo"}
        raise ArgumentError(
            "layout",
            f"{layout}: sherpa-onnx computes {names[kind.runtime]}, and the model was trained with "
            "others; give --features fitted, or --layout plain",
        )


def _features(frontend: StreamingFrontend, samples: Tensor, sherpa: bool) -> Tensor | None:
    """The model's features (T, F), before normalisation; None: the recording is too short.

    sherpa: their frames are those of sherpa-onnx.
    """
    try:
        if sherpa:
            return model_features(frontend, samples)
        return frontend(samples, is_final=True)
    except TooShortError:
        frontend.reset()
        return None


@torch.no_grad()
def _mapped(
    layout: Layout, given: Sequence[Tensor], own: Sequence[Tensor], model: Any, fitted: bool
) -> tuple[Layout, FeatureError]:
    """The layout with its map of features, if `fitted`, and the error of its features.

    Every fifth recording is not part of the fit, and the error is that of these.

    Raises:
        UserError: the error is too large.
    """
    pairs = []  # frames of both, without those at the ends
    for x, y in zip(given, own, strict=True):
        last = min(len(x), len(y)) - EDGE
        pairs.append((x[EDGE:last], y[EDGE:last]))
    if fitted:
        train = [pair for number, pair in enumerate(pairs) if number % 5] or pairs
        mapping = fit(
            [x + layout.offset for x, _ in train],
            [y for _, y in train],
            layout.floor + layout.offset,
        )
        layout = type(layout)(layout.graph, layout.vocabulary, mapping).eval()
    mapped = [layout.model_features(x) for x, _ in pairs]
    differences = [
        torch.where(x > layout.floor + MARGIN, (z - y).abs(), torch.nan).flatten()
        for z, (x, y) in list(zip(mapped, pairs, strict=True))[::5]
    ]
    every = torch.cat(differences)
    references, hypotheses = (
        [best_path(log_probs_of(model, layout, x), model.blank_id) for x in side]
        for side in ([y for _, y in pairs], mapped)
    )
    error = FeatureError(
        float(every.nanmean()),
        100 * float(every.isnan().float().mean()),
        token_errors(references, hypotheses),
    )
    print(
        f"  features: differ from the model's by {error.nat:.2g} nat (mean), "
        f"{error.below_floor:.0f} % are below the runtime's floor; tokens differ by "
        f"{error.tokens:.2f} %",
        flush=True,
    )
    if not (error.nat <= LARGEST_ERROR and error.tokens <= FITTED_TOKEN_ERRORS):
        raise UserError(
            f"features of sherpa-onnx disagree with the model's: {error.nat:.2g} nat (allowed: "
            f"{LARGEST_ERROR:g}), {error.tokens:.2f} % of the tokens (allowed: "
            f"{FITTED_TOKEN_ERRORS:g} %); nothing was written"
        )
    return layout, error


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
