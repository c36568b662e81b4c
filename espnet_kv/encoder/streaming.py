"""Encoding audio piece by piece, with a state that holds what later chunks still look at."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.cache import EncoderState, FeatureState, StateSpec
from espnet_kv.codec import build_codec
from espnet_kv.encoder.base import KVEncoder
from espnet_kv.errors import ConfigError
from espnet_kv.position import at_positions
from espnet_kv.step import Step, running

# slots that an unbounded left context begins with, in chunks; they double when full
FIRST_CHUNKS = 16


class StreamingEncoder(KVEncoder):
    """KVEncoder with `init_state` and `forward_chunk`.

    A chunk goes through ESPnet's own forward; attention, convolutions and positions find what
    came before it in the `Step` that stands in `running`.

    Shape letters: B streams, T frames fed, F feature size, C chunk_size, D model size.
    """

    def __init__(self, input_size: int, *args: Any, **conf: Any):
        super().__init__(input_size, *args, **conf)
        self._input_size = input_size
        self._subsampling = (1, 1)
        self._refusal: str | None = None  # what to say when somebody wants to stream
        try:
            self._check_streamable(self.espnet_conf)
            self._subsampling = subsampling(self.embed)
        except ConfigError as refusal:
            self._refusal = str(refusal)
        for index, module in enumerate(self._stateful_modules()):
            module.state_index = index

    def init_state(
        self,
        batch_size: int = 1,
        cache_dtype: str | None = None,
        device: torch.device | str | None = None,
    ) -> EncoderState:
        """The state of streams of which nothing was heard yet.

        Args:
            batch_size: B. Streams may be dropped and joined later (EncoderState.select, join).
            cache_dtype: fp32, fp16, bf16, int8 or int4 for what attention and convolutions store;
                None: the model's own type. The sums of linear attention are never less than fp32.
            device: None: the model's own.

        Raises:
            ConfigError (a ValueError): the encoder cannot stream as it is configured: chunk_size
                is 0, something looks ahead, ...; or cache_dtype is unknown.
            ValueError: batch_size is no positive whole number.
        """
        self._check_streaming()
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: {batch_size!r} is not allowed (allowed: 1 or more)")
        weight = next(self.parameters())  # type: ignore[attr-defined]
        build_codec(cache_dtype, 1, weight.dtype)  # also where no module would ask for it
        chunks = FIRST_CHUNKS if self.left_chunks < 0 else self.left_chunks + 1
        spec = StateSpec(
            batch_size,
            chunks * self.chunk_size,
            cache_dtype,
            weight.dtype,
            weight.device if device is None else torch.device(device),
        )
        return EncoderState(
            owner=weakref.ref(self),
            chunk_size=self.chunk_size,
            left_chunks=self.left_chunks,
            slots=spec.slots,
            states=[module.init_state(spec) for module in self._stateful_modules()],
            features=FeatureState(spec, self._input_size),
            frames=[0] * batch_size,
            emitted=[0] * batch_size,
            finished=[False] * batch_size,
        )

    @torch.no_grad()
    def forward_chunk(
        self,
        xs: Tensor,
        state: EncoderState,
        is_final: bool | Sequence[bool] = False,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """Encode what became complete with these frames.

        Whole chunks come out, and with is_final the rest. However the audio is cut up, the
        output is that of one pass under the chunk mask of the state's chunk_size and left_chunks.

        Args:
            xs: (B, T, F), T >= 0.
            state: of this encoder and of B streams; changed in place.
            is_final: whether these are the last frames, for all streams or for each.
            lengths: frames of xs that each stream really has; None: T.

        Returns:
            ys (B, T', D), of which the first state.emitted[b] frames are stream b's, and state.

        Raises:
            ValueError: the state belongs to another encoder or another number of streams, xs has
                the wrong shape, a stream goes on after its last frames, or the encoder is in
                training mode.
        """
        final = [is_final] * state.batch_size if isinstance(is_final, bool) else list(is_final)
        lengths = [xs.size(1)] * len(xs) if lengths is None else list(lengths)
        self._check_call(xs, state, final, lengths)
        if max(lengths, default=0) > 0:
            state.features.append(xs, lengths)
        begun = list(state.frames)
        read = [0] * state.batch_size  # features that are done with
        pieces = []
        while chunk := self._next_chunk(state, read, final):
            pieces.append((chunk, self._encode_chunk(state, chunk, read)))
            for stream, frames in chunk.items():
                state.frames[stream] += frames
                read[stream] += frames * self._subsampling[0]
            if state.left_chunks >= 0:
                state.trim(state.left_chunks * state.chunk_size)
        held = zip(state.features.lengths, read, final, strict=True)
        state.features.keep([0 if last else n - done for n, done, last in held])
        state.finished = [was or last for was, last in zip(state.finished, final, strict=True)]
        state.emitted = [now - then for now, then in zip(state.frames, begun, strict=True)]

        dtype = pieces[0][1].dtype if pieces else xs.dtype
        size = (state.batch_size, max(state.emitted), self.output_size())  # type: ignore[attr-defined]
        ys = xs.new_zeros(size, dtype=dtype)
        filled = [0] * state.batch_size
        for chunk, y in pieces:
            for row, (stream, frames) in enumerate(chunk.items()):
                ys[stream, filled[stream] : filled[stream] + frames] = y[row, :frames]
                filled[stream] += frames
        return ys, state

    def _next_chunk(
        self, state: EncoderState, read: list[int], final: list[bool]
    ) -> dict[int, int]:
        """{stream: frames} of every stream that has a chunk to encode, or its last part of one."""
        stride, window = self._subsampling
        chunk = {}
        for stream, fed in enumerate(state.features.lengths):
            frames = max(0, (fed - read[stream] - window) // stride + 1)
            if frames >= state.chunk_size:
                chunk[stream] = state.chunk_size
            elif final[stream] and frames > 0:
                chunk[stream] = frames
        return chunk

    def _encode_chunk(self, state: EncoderState, chunk: dict[int, int], read: list[int]) -> Tensor:
        """Encode one chunk of some streams: {stream: frames} -> (R, Q, D)."""
        streams, lengths = list(chunk), list(chunk.values())
        starts = [state.frames[stream] for stream in streams]
        while state.left_chunks < 0 and max(starts) + state.chunk_size > state.slots:
            state.slots *= 2
        stride, context = self._subsampling
        xs = state.features.read(
            streams, [read[stream] for stream in streams], (max(lengths) - 1) * stride + context
        )
        everyone = len(streams) == state.batch_size
        held = state.held
        step = Step(
            state.states,
            None if everyone else streams,
            starts,
            lengths,
            [held[stream] for stream in streams],
            state.slots,
            state.chunk_size,
            xs.device,
        )
        token = running.set(step)
        try:
            ys = self(xs, torch.full((len(xs),), xs.size(1)))[0]  # type: ignore[operator]
        finally:
            running.reset(token)
        return ys[0] if isinstance(ys, tuple) else ys  # apart from intermediate CTC outputs

    def _stateful_modules(self) -> Iterator[Any]:
        """Attention modules and convolutions over time, in the order of the blocks."""
        for block in self.encoders:
            attention = getattr(block, self.attention_slot)
            if attention is not None:
                yield attention
            for owner, name in self.time_convolutions(block):
                yield getattr(owner, name)

    def _check_streamable(self, conf: dict[str, Any]) -> None:
        if not self.holds_our_attention:
            raise ConfigError(
                f"{self.layer_type_key}: {conf[self.layer_type_key]!r} with rel_pos_type: "
                f"{conf['rel_pos_type']!r} is attention as ESPnet made it, which cannot stream"
            )
        if conf["input_layer"] in ("embed", None):
            raise ConfigError(
                f"input_layer: {conf['input_layer']!r} takes no frames of features; streaming "
                "needs conv2d or linear"
            )
        if conf.get("interctc_use_conditioning"):
            raise ConfigError("interctc_use_conditioning: true cannot stream; set false")
        self._check_chunked(conf)
        self._check_causal(conf)

    def _check_streaming(self) -> None:
        """Refuse what needs the whole utterance."""
        if self.chunk_size < 1:
            raise ConfigError(
                "chunk_size: 0 (the whole utterance) cannot stream; set chunk_size to 1 or more "
                "frames"
            )
        if self._refusal is not None:
            raise ConfigError(self._refusal)
        if not all(hasattr(module, "init_state") for module in self._stateful_modules()):
            raise ConfigError(
                "causal: false lets convolutions see the future; streaming needs causal: true"
            )

    def _check_call(
        self, xs: Tensor, state: EncoderState, final: list[bool], lengths: list[int]
    ) -> None:
        if self.training:
            raise ValueError("forward_chunk: the encoder is in training mode; call eval() first")
        if state.owner() is not self:
            raise ValueError("forward_chunk: the state belongs to another encoder")
        if xs.dim() != 3 or xs.size(2) != self._input_size:
            raise ValueError(
                f"forward_chunk: xs of shape {tuple(xs.shape)} is not (B, T, {self._input_size})"
            )
        if not len(xs) == len(final) == len(lengths) == state.batch_size:
            raise ValueError(
                f"forward_chunk: xs of {len(xs)} streams, is_final of {len(final)} and lengths of "
                f"{len(lengths)} do not fit a state of {state.batch_size}"
            )
        if not all(0 <= length <= xs.size(1) for length in lengths):
            raise ValueError(f"forward_chunk: lengths {lengths} of xs with {xs.size(1)} frames")
        for stream, (done, length) in enumerate(zip(state.finished, lengths, strict=True)):
            if done and length:
                raise ValueError(f"forward_chunk: stream {stream} had its last frames already")

    def _hand_out_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        step = running.get()
        if step is None:
            return super()._hand_out_chunks(module, args, output)
        return self._positioned(args[0], step)

    def _positioned(self, x: Tensor, step: Step) -> tuple[Tensor, Step]:
        """What the positional encoding gives for a chunk (R, Q, D): frames and their Step."""
        encoding: Any = self._positional_encoding()
        if self._has_relative_positions(self.espnet_conf):
            encoding.extend_pe(x.new_empty(()).expand(1, step.slots))
            center = encoding.pe.size(1) // 2
            step.pos_emb = encoding.pe[:, center - step.slots + 1 : center + step.chunk_size]
            return x * encoding.xscale, step
        starts = torch.tensor(step.starts, device=x.device)[:, None]
        positions = starts + torch.arange(x.size(1), device=x.device)  # (R, Q)
        return at_positions(encoding, x, positions), step


def subsampling(embed: nn.Module | None) -> tuple[int, int]:
    """(stride, window) in input frames: output t reads inputs t*stride to t*stride + window - 1.

    Raises:
        ConfigError (a ValueError): a convolution pads, so that it does not depend on time alone.
    """
    stride, window = 1, 1
    for module in embed.modules() if embed is not None else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            if module.padding[0]:
                raise ConfigError("input_layer: a convolution that pads over time cannot stream")
            window += (module.kernel_size[0] - 1) * stride
            stride *= module.stride[0]
    return stride, window
