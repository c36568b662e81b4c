"""What a graph of layout plain says about itself, in its metadata and in export.json."""

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict


class Cache(BaseModel):
    """A cache: name of its input, attention or conv, shape of one stream, type as in torch."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str


class Description(BaseModel):
    """Shapes and settings of a graph.

    Attributes:
        attention: label of the attention, e.g. "mla r64".
        chunk_size: C, encoder frames of a chunk. left_chunks: chunks of left context.
        cache_dtype: None: the model's type.
        window: features that a chunk depends on. shift: new features of a chunk.
        features: F, numbers of a feature vector.
        output_size: D, numbers of an encoder frame. vocabulary: V, tokens with the blank.
        caches: in the order of the inputs after features, frames and lengths.
        cache_bytes: of one stream.
        weights: see `weights_digest`.
    """

    model_config = ConfigDict(extra="forbid")

    attention: str
    chunk_size: int
    left_chunks: int
    cache_dtype: str | None
    window: int
    shift: int
    features: int
    output_size: int
    vocabulary: int
    caches: list[Cache]
    cache_bytes: int
    weights: str


def weights_digest(model: Any) -> str:
    """SHA-256 of names and values, in float32, in `normalize`, `encoder` and `ctc` of a model."""
    digest = hashlib.sha256()
    for part in (model.normalize, model.encoder, model.ctc):
        for name, value in {} if part is None else part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()
