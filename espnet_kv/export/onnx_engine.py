"""An exported graph as the encoder of the streaming recognizer.

Shape letters: T features, F feature size, T' encoder frames, D model size, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from espnet_kv.attention import attention_label
from espnet_kv.cache import KINDS
from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.export.description import Description, weights_digest
from espnet_kv.export.onnx_file import open_graph, require_packages, run_graph


@dataclass
class GraphState:
    """State of a stream between two pieces.

    Attributes:
        caches: of the graph, each (1, ...).
        kinds: attention or conv, for each of them.
        features: (T, F) from the first one that the next chunk needs.
        frames: encoder frames so far.
    """

    caches: list[Tensor]
    kinds: list[str]
    features: Tensor
    frames: int = 0

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes of the caches, which have their full size from the start, and of the features."""
        held = dict.fromkeys(KINDS, 0) | {"input": self.features.nbytes}
        for kind, cache in zip(self.kinds, self.caches, strict=True):
            held[kind] += cache.nbytes
        return held


class OnnxEngine:
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
        self._stride = about.shift // about.chunk_size
        self._first = about.window - about.shift + self._stride  # features of one frame

    def init_state(self) -> GraphState:
        """The state of a new stream."""
        caches = self.description.caches
        return GraphState(
            [torch.zeros(1, *cache.shape, dtype=getattr(torch, cache.dtype)) for cache in caches],
            [cache.kind for cache in caches],
            torch.zeros(0, self.description.features),
        )

    def encode(
        self, features: Tensor, state: GraphState, is_final: bool
    ) -> tuple[Tensor, Tensor, GraphState]:
        """See Engine; the features are those before normalisation."""
        about = self.description
        held = torch.cat([state.features, features])
        log_probs, encoded = [torch.zeros(0, about.vocabulary)], [torch.zeros(0, about.output_size)]
        while frames := self._frames(len(held), is_final):
            window = held[: about.window]
            window = torch.nn.functional.pad(window, (0, 0, 0, about.window - len(window)))
            numbers = torch.tensor([state.frames]), torch.tensor([frames])
            outputs = run_graph(self._session, [window[None], *numbers, *state.caches])
            log_probs.append(outputs[0][0, :frames])
            encoded.append(outputs[1][0, :frames])
            state.caches = outputs[2:]
            state.frames += frames
            held = held[about.shift :]
        state.features = held.clone()
        return torch.cat(log_probs), torch.cat(encoded), state

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
