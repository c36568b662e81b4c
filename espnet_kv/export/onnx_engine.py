"""An exported graph as the encoder of the streaming recognizer.

Shape letters: T features, F feature size, T' encoder frames, D model size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from espnet_kv.attention import attention_label
from espnet_kv.cache import KINDS
from espnet_kv.cache.features import Features
from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.export.description import Description, weights_digest
from espnet_kv.export.onnx_file import open_graph, require_packages, run_graph
from espnet_kv.streaming.engine import Engine


@dataclass
class GraphState:
    """State of B streams between two pieces.

    Attributes:
        caches: of the graph, each (B, ...).
        kinds: attention or conv, for each of them.
        features: of each stream from the first one that its next chunk needs.
        frames: encoder frames of each stream so far.
    """

    caches: list[Tensor]
    kinds: list[str]
    features: Features
    frames: list[int]

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.frames)

    @staticmethod
    def join(parts: Sequence["GraphState"]) -> "GraphState":
        """One state of the rows of all parts, in this order."""
        return GraphState(
            [torch.cat(column) for column in zip(*(part.caches for part in parts), strict=True)],
            parts[0].kinds,
            Features(parts[0].features.size, [t for part in parts for t in part.features.tensors]),
            [n for part in parts for n in part.frames],
        )

    def reset(self, rows: Iterable[int]) -> None:
        """Replace the streams of these rows by new ones, in place."""
        for row in rows:
            for cache in self.caches:
                cache[row] = 0
            self.features.tensors[row] = self.features.tensors[row].new_zeros(0, self.features.size)
            self.frames[row] = 0

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes of the features, and of the caches of the streams that have had a chunk.

        The caches of a stream have their full size from the first chunk.
        """
        return self._bytes(sum(frames > 0 for frames in self.frames))

    def capacity_by_kind(self) -> dict[str, int]:
        """Bytes allocated."""
        return self._bytes(self.batch_size)

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated, of all kinds."""
        return sum(self.capacity_by_kind().values())

    def _bytes(self, streams: int) -> dict[str, int]:
        """Bytes of the features, and of the caches of so many streams."""
        found = dict.fromkeys(KINDS, 0) | {"input": self.features.nbytes}
        for kind, cache in zip(self.kinds, self.caches, strict=True):
            found[kind] += streams * cache[0].nbytes
        return found


class OnnxEngine(Engine[GraphState]):
    """A graph of layout plain in onnxruntime on the CPU, with as many threads as PyTorch has.

    An `Engine` of the recognizer; bind the path to have its builder:

        engine = functools.partial(OnnxEngine, Path("exp/asr_x/onnx/model.onnx"))
        recognizer = StreamingRecognizer(config, model_file, engine=engine)

    Args:
        path: a graph of `espnet_kv.bin.export`.
        model: ESPnetASRModel that the graph was exported from, in float32 on the CPU.
        chunk_size, left_chunks, cache_dtype: settings that the graph must have; None: any.

    Attributes:
        description: shapes and settings of the graph.

    Raises:
        UserError: onnxruntime is missing, or the file is not a graph of this model.
        ArgumentError: the graph has another setting, or the model is not in float32 on the CPU.
    """

    normalize: nn.Module | None = None  # the graph contains it

    def __init__(
        self,
        path: Path,
        model: Any,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
    ):
        weight = next(model.encoder.parameters())
        for name, value, allowed in (
            ("dtype", str(weight.dtype).removeprefix("torch."), "float32"),
            ("device", weight.device.type, "cpu"),
        ):
            if value != allowed:
                raise ArgumentError(name, f"{value}: a graph in onnxruntime needs {allowed}")
        self._session, self.description = _open(path)
        about = self.description
        for name, wanted, found in (
            ("chunk_size", chunk_size, about.chunk_size),
            ("left_chunks", left_chunks, about.left_chunks),
            ("cache_dtype", cache_dtype, about.cache_dtype or "fp32"),
        ):
            if wanted not in (None, found):
                raise ArgumentError(
                    name, f"{wanted}: {path} was exported with {found}; give that, or export again"
                )
        _check_model(path, about, model)
        self.chunk_size, self.left_chunks = about.chunk_size, about.left_chunks
        self.cache_dtype = about.cache_dtype
        self._stride = about.shift // about.chunk_size
        self._first = about.window - about.shift + self._stride  # features of one frame

    def init_state(self, streams: int = 1) -> GraphState:
        """See Engine."""
        if type(streams) is not int or streams < 1:
            raise ValueError(f"streams: {streams!r} is not allowed (allowed: 1 or more)")
        caches, size = self.description.caches, self.description.features
        return GraphState(
            [torch.zeros(streams, *c.shape, dtype=getattr(torch, c.dtype)) for c in caches],
            [cache.kind for cache in caches],
            Features(size, [torch.zeros(0, size) for _ in range(streams)]),
            [0] * streams,
        )

    def encode_rows(
        self, features: Tensor, state: GraphState, is_final: Sequence[bool], lengths: Sequence[int]
    ) -> tuple[list[tuple[Tensor, Tensor]], GraphState]:
        """See Engine; the features are those before normalisation.

        Streams with a whole chunk share a run of the graph, and those with several chunks have
        several runs.
        """
        about, held = self.description, state.features
        held.append(features, lengths)
        empty = torch.zeros(0, about.vocabulary), torch.zeros(0, about.output_size)
        parts = [[empty] for _ in range(state.batch_size)]
        first = [0] * state.batch_size  # of the features that the next chunk needs
        while True:
            waiting = zip(held.lengths, first, is_final, strict=True)
            counts = [self._frames(length - at, final) for length, at, final in waiting]
            rows = [row for row, count in enumerate(counts) if count]
            if not rows:
                break
            windows = held.read(rows, [first[row] for row in rows], about.window)
            windows = nn.functional.pad(windows, (0, 0, 0, about.window - windows.size(1)))
            chunk = [counts[row] for row in rows]
            log_probs, encoded = self._run(windows, chunk, state, rows)
            for row, count, *out in zip(rows, chunk, log_probs, encoded, strict=True):
                parts[row].append((out[0][:count], out[1][:count]))
                first[row] += about.shift
        pairs = zip(held.lengths, first, strict=True)
        held.keep([max(0, length - at) for length, at in pairs])
        columns = [tuple(zip(*part, strict=True)) for part in parts]
        return [(torch.cat(scores), torch.cat(outputs)) for scores, outputs in columns], state

    def _run(
        self, windows: Tensor, lengths: list[int], state: GraphState, rows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Run a chunk of these rows -> log_probs (R, C, V), encoder_out (R, C, D)."""
        every = len(rows) == state.batch_size  # then the outputs replace the caches as they are
        caches = state.caches if every else [cache[rows] for cache in state.caches]
        frames = torch.tensor([state.frames[row] for row in rows])
        inputs = [windows, frames, torch.tensor(lengths), *caches]
        log_probs, encoded, *after = run_graph(self._session, inputs)
        if every:
            state.caches = after
        else:
            for cache, new in zip(state.caches, after, strict=True):
                cache[rows] = new
        for row, count in zip(rows, lengths, strict=True):
            state.frames[row] += count
        return log_probs, encoded

    def _frames(self, features: int, is_final: bool) -> int:
        """Encoder frames of the next chunk; 0: it is not complete."""
        frames = (features - self._first) // self._stride + 1
        if frames >= self.chunk_size:
            return self.chunk_size
        return max(0, frames) if is_final else 0


def _open(path: Path) -> tuple[Any, Description]:
    """The session of a graph of layout plain, and what the graph says about itself."""
    require_packages("onnxruntime")
    if not path.is_file():
        raise UserError(
            f"{path} is not there: export the model (python -m espnet_kv.bin.export), or name its "
            "graph (onnx_model)"
        )
    try:
        session = open_graph(path, torch.get_num_threads())
    except Exception as error:  # onnxruntime has no public class for its errors
        raise UserError(f"{path} cannot be read as an ONNX graph: {one_line(error)}") from error
    said = session.get_modelmeta().custom_metadata_map.get("espnet_kv")
    if said is None:
        raise UserError(f"{path} is not a graph of espnet_kv.bin.export: give one of those")
    if session.get_outputs()[1].name != "encoder_out":
        raise UserError(f"{path} was exported with another layout: give one of --layout plain")
    try:
        return session, Description.model_validate_json(said)
    except ValidationError as error:
        raise UserError(
            f"{path} was exported by another version of espnet_kv: export the model again"
        ) from error


def _check_model(path: Path, about: Description, model: Any) -> None:
    """Refuse the graph of another model."""
    differences = [
        f"{name}: {found} in the graph, {wanted} in the model"
        for name, found, wanted in (
            ("attention", about.attention, attention_label(model.encoder)),
            ("features", about.features, model.encoder.input_size),
            ("model size", about.output_size, model.encoder.output_size()),
            ("vocabulary", about.vocabulary, len(model.token_list)),
        )
        if found != wanted
    ]
    if not differences and about.weights != weights_digest(model):
        differences = ["same sizes, but other weights"]
    if differences:
        raise UserError(
            f"{path} is the graph of another model ({'; '.join(differences)}): export this one, "
            "or name its graph"
        )
