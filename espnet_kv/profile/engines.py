"""Streaming with exported graphs, measured beside the model itself."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.profile.latency import Streamer, time_steps
from espnet_kv.profile.schema import EngineStream, Kinds
from espnet_kv.profile.sound import Sound
from espnet_kv.profile.subject import Subject
from espnet_kv.streaming.engine import Engine, EngineBuilder, TorchEngine
from espnet_kv.streaming.frontend import StreamingFrontend

FILES = {"onnx": "model.onnx", "onnx int8": "model.int8.onnx"}
"""The graphs in the directory onnx beside the model file, by the name of their engine."""


def find_engines(
    subject: Subject,
    wanted: str | None,
    engine: Callable[..., Engine],
    say: Callable[[str], None],
) -> dict[str, EngineBuilder]:
    """The graphs of a model that can be measured.

    Args:
        wanted: None: those that fit the model and its chunk settings, others are left out with a
            message. onnx: there must be one, and all must fit. torch: none.
        engine: the class OnnxEngine.
        say: called with messages.

    Raises:
        UserError: there is no graph, or one does not fit, and `wanted` is onnx.
    """
    file = subject.source.asr_model_file
    if wanted == "onnx" and not (subject.streams and file):
        raise ArgumentError("engine", "onnx: for a trained model that streams; leave it out")
    if wanted == "torch" or not subject.streams or file is None:
        return {}
    found: dict[str, EngineBuilder] = {}
    for name, graph in FILES.items():
        path = Path(file).parent / "onnx" / graph
        if not path.is_file() and (wanted is None or found):
            continue
        build = functools.partial(engine, path)
        try:
            build(subject.model, subject.chunk_size, subject.left_chunks)
        except UserError as error:
            if wanted is not None:
                raise
            say(f"engine {name} is left out: {error}")
        else:
            found[name] = build
    return found


def measure_engines(
    subject: Subject,
    sound: Sound,
    engines: Mapping[str, EngineBuilder],
    search: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, EngineStream]:
    """The profile's `engines`: the graphs and, before them, torch; empty if there is no graph.

    Args:
        search: options of streaming.
    """
    measured = {}
    for name, build in ({"torch": TorchEngine, **engines} if engines else {}).items():
        measured[name] = stream = _measure(subject, sound, build, search)
        say(
            f"engine {name}: {stream.chunk_ms.p50:.2f} ms a chunk, real-time factor "
            f"{stream.streaming_rtf:.3f}"
        )
    return measured


@torch.no_grad()
def _measure(
    subject: Subject, sound: Sound, build: EngineBuilder, search: Mapping[str, Any]
) -> EngineStream:
    engine = build(subject.model, subject.chunk_size, subject.left_chunks)
    frontend = StreamingFrontend(subject.model.frontend, engine.normalize)
    state = engine.init_state()

    def step(features: torch.Tensor) -> None:
        engine.encode(features[0], state, False)  # in place

    chunk_ms = time_steps(subject, sound, frontend, step)
    allocated = state.capacity_by_kind()
    return EngineStream(
        cache_dtype=engine.cache_dtype,
        chunk_ms=chunk_ms,
        streaming_rtf=Streamer(subject, search, build).real_time_factor(sound),
        bytes=Kinds(**state.nbytes_by_kind()),
        allocated=Kinds(**{kind: allocated[kind] for kind in Kinds.model_fields}),
    )
