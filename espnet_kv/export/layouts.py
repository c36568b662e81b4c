"""Names and shapes of the inputs and outputs of an exported graph.

`plain` is this package's own. `nemo` and `wenet` are those that sherpa-onnx expects of its models
`nemo_ctc` and `wenet_ctc`, which have one tensor for the left context of attention and one for that
of convolutions, with shapes that sherpa-onnx reads from the metadata. All caches of a model are
packed into these two.

Shape letters: B streams, C chunk_size, L frames of left context, F features, V vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espnet_kv.errors import ArgumentError
from espnet_kv.export.graph import StreamingGraph
from espnet_kv.export.runtime_features import FLOOR, INT16


class Layout(nn.Module):
    """A StreamingGraph with the inputs and outputs of one runtime.

    Args:
        graph: in eval mode.
        vocabulary: V.
        mapping: from the runtime's features to the model's; None: they are the same.

    Attributes:
        input_names, output_names: of the graph, in order.
        batched: whether streams share a run.
        runtime: key of RUNTIMES, the features that the runtime computes; None: it takes those of
            the model.
        floor: lowest value of these features.
        offset: makes them those of samples between -1 and 1.
    """

    input_names: Sequence[str]
    output_names: Sequence[str]
    batched: bool = True
    runtime: str | None = None
    floor: float = math.log(FLOOR)
    offset: float = 0.0

    def __init__(self, graph: StreamingGraph, vocabulary: int, mapping: nn.Module | None = None):
        super().__init__()
        self.graph, self.vocabulary = graph, vocabulary
        self.mapping = mapping

    def model_features(self, x: Tensor) -> Tensor:
        """The model's features (..., F) of those of the runtime, before normalisation."""
        return x + self.offset if self.mapping is None else self.mapping(x + self.offset)

    @abstractmethod
    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        """Inputs of the first chunk of B streams."""

    @abstractmethod
    def metadata(self) -> dict[str, int]:
        """Numbers that the runtime reads from the file."""

    @abstractmethod
    def following(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the next chunk, still with the features of this one."""

    def with_features(self, inputs: Sequence[Tensor], features: Tensor) -> list[Tensor]:
        """The inputs with the features (B, window, F) of a chunk."""
        return [features, *inputs[1:]]


class PlainLayout(Layout):
    """features (B, window, F), frames (B,), lengths (B,) and one tensor for each cache.

    See `StreamingGraph.forward`.
    """

    def __init__(self, graph: StreamingGraph, vocabulary: int, mapping: nn.Module | None = None):
        super().__init__(graph, vocabulary, mapping)
        names = graph.cache_names()
        self.input_names = ["features", "frames", "lengths", *names]
        self.output_names = ["log_probs", "encoder_out", *(f"next_{name}" for name in names)]

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        graph = self.graph
        return (
            torch.zeros(batch_size, graph.window, graph.features),
            torch.zeros(batch_size, dtype=torch.long),
            torch.full((batch_size,), graph.chunk_size),
            *graph.caches(batch_size),
        )

    def forward(
        self, features: Tensor, frames: Tensor, lengths: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        return self.graph(features, frames, lengths, *caches)

    def metadata(self) -> dict[str, int]:
        return {}

    def following(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        return [inputs[0], inputs[1] + inputs[2], inputs[2], *outputs[2:]]


def _check_fp32(graph: StreamingGraph) -> None:
    """Refuse caches that sherpa-onnx does not hold."""
    if any(cache.dtype != torch.float32 for cache in graph.caches()):
        raise ArgumentError(
            "cache_dtype", "sherpa-onnx holds caches in fp32; give fp32, or --layout plain"
        )


class NemoLayout(Layout):
    """The model `nemo_ctc` of sherpa-onnx: streams of all ages, chunks of the size of the export.

    The caches of attention are one row of numbers for each stream, and so are those of
    convolutions. A row has one number at least.

    Raises:
        ArgumentError: the caches are not float32.
    """

    input_names = (
        *("audio_signal", "length"),
        *("cache_last_channel", "cache_last_time", "cache_last_channel_len"),
    )
    output_names = (
        *("logprobs", "encoded_lengths"),
        *("cache_last_channel_next", "cache_last_time_next", "cache_last_channel_len_next"),
    )
    runtime = "nemo"

    def __init__(self, graph: StreamingGraph, vocabulary: int, mapping: nn.Module | None = None):
        super().__init__(graph, vocabulary, mapping)
        _check_fp32(graph)
        self.shapes = [cache.shape[1:] for cache in graph.caches()]
        self.rows = [("attention", "conv").index(kind) for kind in graph.kinds()]
        self.used = [0, 0]
        for shape, row in zip(self.shapes, self.rows, strict=True):
            self.used[row] += shape.numel()

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        graph = self.graph
        return (
            torch.zeros(batch_size, graph.features, graph.window),
            torch.full((batch_size,), graph.window),
            *(torch.zeros(batch_size, 1, 1, max(1, numbers)) for numbers in self.used),
            torch.zeros(batch_size, dtype=torch.long),
        )

    def forward(
        self, audio_signal: Tensor, length: Tensor, channel: Tensor, time: Tensor, frames: Tensor
    ) -> tuple[Tensor, ...]:
        graph, held = self.graph, [channel.flatten(1), time.flatten(1)]
        stride = graph.shift // graph.chunk_size
        new = torch.div(length - graph.window + graph.shift, stride, rounding_mode="floor")
        caches, at = [], [0, 0]
        for shape, row in zip(self.shapes, self.rows, strict=True):
            part = held[row][:, at[row] : at[row] + shape.numel()]
            at[row] += shape.numel()
            if shape.numel():
                caches.append(part.unflatten(1, shape))
            else:  # without left context; ONNX cannot reshape to a dimension of 0
                one = held[row][:, :1, None, None].expand(-1, shape[0], 1, shape[2])
                caches.append(one[:, :, :0])
        features = self.model_features(audio_signal.transpose(1, 2))
        log_probs, _, *after = graph(features, frames, new, *caches)
        packed: list[list[Tensor]] = [[], []]
        for cache, shape, row in zip(after, self.shapes, self.rows, strict=True):
            if shape.numel():
                packed[row].append(cache.flatten(1))
        # numbers without a use are passed on
        rows = zip(packed, held, self.used, strict=True)
        joined = [torch.cat([*parts, row[:, used:]], dim=1) for parts, row, used in rows]
        return (log_probs, new, *(row[:, None, None] for row in joined), frames + new)

    def metadata(self) -> dict[str, int]:
        graph = self.graph
        sizes = {"window_size": graph.window, "chunk_shift": graph.shift}
        for name, numbers in zip(("channel", "time"), self.used, strict=True):
            shape = (1, 1, max(1, numbers))
            sizes |= {f"cache_last_{name}_dim{n}": size for n, size in enumerate(shape, 1)}
        return sizes | {
            "subsampling_factor": graph.shift // graph.chunk_size,
            "vocab_size": self.vocabulary - 1,  # without the blank
        }

    def with_features(self, inputs: Sequence[Tensor], features: Tensor) -> list[Tensor]:
        return [features.transpose(1, 2), *inputs[1:]]

    def following(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        return [*inputs[:2], *outputs[2:]]


class WenetLayout(Layout):
    """The model `wenet_ctc` of sherpa-onnx: one stream, chunk sizes as given to sherpa-onnx.

    sherpa-onnx computes its features from samples between -32768 and 32768.

    Raises:
        ArgumentError: the caches are not float32.
    """

    input_names = ("x", "offset", "required_cache_size", "attn_cache", "conv_cache", "attn_mask")
    output_names = ("log_probs", "next_attn_cache", "next_conv_cache")
    batched = False
    runtime = "kaldi"
    offset = -2 * math.log(INT16)

    def __init__(self, graph: StreamingGraph, vocabulary: int, mapping: nn.Module | None = None):
        super().__init__(graph, vocabulary, mapping)
        _check_fp32(graph)
        shapes = [cache.shape for cache in graph.caches()]
        per_frame = graph.per_frame()
        # numbers per frame of the left context, and of a stream
        self.frame_numbers = sum(s[1] * s[3] for s, f in zip(shapes, per_frame, strict=True) if f)
        self.stream_numbers = sum(
            s.numel() for s, f in zip(shapes, per_frame, strict=True) if not f
        )
        self.shapes, self.is_per_frame = shapes, per_frame
        # attn_cache is (1, 1, L, 2 size), conv_cache (1, 1, size, kernel - 1)
        self.size = max(1, math.ceil(self.frame_numbers / 2))
        self.width = max(1, math.ceil(self.stream_numbers / self.size))

    def model_features(self, x: Tensor) -> Tensor:
        """See Layout; the floor of the energies does not depend on the range of the samples."""
        features = super().model_features(x)
        return features.clamp(min=self.floor) if self.mapping is None else features

    def unpack(self, frames: Tensor, constant: Tensor) -> list[Tensor]:
        """(B, L, at least frame_numbers) and (B, at least stream_numbers) -> the caches."""
        caches, at_frame, at_constant = [], 0, 0
        for shape, per_frame in zip(self.shapes, self.is_per_frame, strict=True):
            if per_frame:
                count = shape[1] * shape[3]
                part = frames[:, :, at_frame : at_frame + count]
                caches.append(part.unflatten(2, (shape[1], shape[3])).transpose(1, 2))
                at_frame += count
            else:
                part = constant[:, at_constant : at_constant + shape.numel()]
                caches.append(part.unflatten(1, shape[1:]))
                at_constant += shape.numel()
        return caches

    def pack(
        self, caches: Sequence[Tensor], frames: Tensor, constant: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The caches after a chunk -> the tensors for the next `unpack`.

        Args:
            frames, constant: those of the last `unpack`. Numbers without a use are passed on, so
                that a graph has all inputs that the runtime gives it.
        """
        pairs = list(zip(caches, self.is_per_frame, strict=True))
        after = [c.transpose(1, 2).flatten(2) for c, per_frame in pairs if per_frame]
        after_constant = [c.flatten(1) for c, per_frame in pairs if not per_frame]
        return (
            torch.cat([*after, frames[:, :, self.frame_numbers :]], dim=2),
            torch.cat([*after_constant, constant[:, self.stream_numbers :]], dim=1),
        )

    def example(self, batch_size: int) -> tuple[Tensor, ...]:
        graph = self.graph
        return (
            torch.zeros(1, graph.window, graph.features),
            torch.full((1,), graph.left),
            torch.full((1,), graph.left),
            torch.zeros(1, 1, graph.left, 2 * self.size),
            torch.zeros(1, 1, self.size, self.width),
            torch.ones(1, 1, graph.left + graph.chunk_size, dtype=torch.bool),
        )

    def forward(
        self,
        x: Tensor,
        offset: Tensor,
        required_cache_size: Tensor,
        attn_cache: Tensor,
        conv_cache: Tensor,
        attn_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        held = attn_cache[0], conv_cache.flatten(1)
        frames = offset - required_cache_size
        new = attn_mask[:, 0, self.graph.left :].sum(dim=1)  # all frames of the chunk
        features = self.model_features(x)
        log_probs, _, *caches = self.graph(features, frames, new, *self.unpack(*held))
        after, constant = self.pack(caches, *held)
        return log_probs, after[None], constant.view(1, 1, self.size, self.width)

    def metadata(self) -> dict[str, int]:
        graph = self.graph
        stride = graph.shift // graph.chunk_size
        return {
            "head": 1,
            "num_blocks": 1,
            "output_size": self.size,
            "cnn_module_kernel": self.width + 1,
            "right_context": graph.window - 1 - (graph.chunk_size - 1) * stride,
            "subsampling_factor": stride,
            "vocab_size": self.vocabulary,
        }

    def following(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        offset = inputs[1] + self.graph.chunk_size
        return [inputs[0], offset, inputs[2], *outputs[1:], inputs[5]]


LAYOUTS: dict[str, type[Layout]] = {
    "plain": PlainLayout,
    "nemo": NemoLayout,
    "wenet": WenetLayout,
}
