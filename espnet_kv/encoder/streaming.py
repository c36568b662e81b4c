"""Encoding of streams chunk by chunk, with a state that caches the left context."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.attention.positions import at_positions, relative
from espnet_kv.cache.codec import build_codec
from espnet_kv.cache.features import Features
from espnet_kv.cache.position_table import PositionTables
from espnet_kv.cache.state import State, StateSpec
from espnet_kv.cache.step import CacheStep, ChunkStep, active_step, current_step
from espnet_kv.cache.store import Store
from espnet_kv.cache.stream import FIRST_CHUNKS, EncoderState
from espnet_kv.encoder.chunked import KVEncoder, check_chunks, subsampling
from espnet_kv.encoder.small_inputs import replace_for_chunks
from espnet_kv.errors import ConfigError

# position tables in use, by encoder and by (slots, chunk_size, device)
_tables: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[tuple, PositionTables]] = (
    weakref.WeakKeyDictionary()
)


class StreamingEncoder(KVEncoder):
    """KVEncoder with `init_state` and `forward_chunk`.

    A chunk passes through ESPnet's forward; attention and convolutions read the left context from
    the `CacheStep` of the context. Streaming does not write to the encoder, so streams with
    different settings may use it at the same time.

    Shape letters: B streams, R streams of a chunk, T input frames, F feature size, C chunk_size,
    D model size, N slots.
    """

    def __init__(self, input_size: int, *args: Any, **conf: Any):
        super().__init__(input_size, *args, **conf)
        self.input_size = input_size
        self._cannot_stream: str | None = None  # why the encoder cannot stream
        try:
            self._check_streamable(self.espnet_conf)
            subsampling(self.embed)
        except ConfigError as refusal:
            self._cannot_stream = str(refusal)
        replace_for_chunks(self.encoders)
        for index, module in enumerate(self._stateful_modules()):
            module.state_index = index
        positions = self._positional_encoding()
        if positions is not None:
            positions.register_forward_pre_hook(self._keep_positions)

    def init_state(
        self,
        batch_size: int = 1,
        *,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
        device: torch.device | str | None = None,
    ) -> EncoderState:
        """Create the state of new streams.

        Args:
            batch_size: B. Streams may leave and join later (EncoderState.select, join).
            chunk_size: frames after subsampling in a chunk; None: the encoder's setting.
            left_chunks: number of chunks of left context; -1: all; None: the encoder's setting.
            cache_dtype: fp32, fp16, bf16, int8 or int4 for the states of attention and
                convolutions; None: the model's type. Sums of linear attention are at least fp32.
            device: device of the state; None: the model's device.

        Raises:
            ConfigError (a ValueError): the configuration of the encoder does not allow streaming
                (e.g. chunk_size is 0 or a module uses future frames), or a value is not allowed.
            ValueError: batch_size is not a positive integer.
        """
        size = self.chunk_size if chunk_size is None else chunk_size
        left = self.left_chunks if left_chunks is None else left_chunks
        check_chunks(size, left)
        self._check_streaming(size)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: {batch_size!r} is not allowed (allowed: 1 or more)")
        weight = next(self.parameters())  # type: ignore[attr-defined]
        build_codec(cache_dtype, 1, weight.dtype)  # checks the value even if no module uses it
        spec = StateSpec(
            batch_size,
            (FIRST_CHUNKS if left < 0 else left + 1) * size,
            cache_dtype,
            weight.dtype,
            weight.device if device is None else torch.device(device),
        )
        empty = torch.zeros(0, self.input_size, dtype=spec.dtype, device=spec.device)
        return EncoderState(
            chunk_size=size,
            left_chunks=left,
            cache_dtype=cache_dtype,
            dtype=spec.dtype,
            store=Store(self.module_states(spec), batch_size, spec.slots),
            places=list(range(batch_size)),
            features=Features(self.input_size, [empty.clone() for _ in range(batch_size)]),
            frames=[0] * batch_size,
            held=[0] * batch_size,
            emitted=[0] * batch_size,
            finished=[False] * batch_size,
            footprints=[module.footprint for module in self._stateful_modules()],
            owner=weakref.ref(self),
        )

    @torch.no_grad()
    def forward_chunk(
        self,
        xs: Tensor,
        state: EncoderState,
        is_final: bool | Sequence[bool] = False,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """Encode the chunks that these frames complete.

        The output consists of complete chunks and, with is_final, the remaining frames. For any
        split of the input, it equals one pass with the chunk mask of the state's settings.

        Args:
            xs: (B, T, F), T >= 0.
            state: state of B streams from this encoder; changed in place.
            is_final: whether these are the last frames, for all streams or for each.
            lengths: number of valid frames of each stream in xs; None: T.

        Returns:
            ys (B, T', D) and state. The first state.emitted[b] frames of ys[b] are valid.

        Raises:
            ValueError: the state belongs to another encoder or has another number of streams, xs
                has the wrong shape, a stream continues after its last frames, or the encoder is
                in training mode.
        """
        try:
            final = [bool(last) for last in is_final]  # type: ignore[union-attr]
        except TypeError:  # one value for all streams
            final = [bool(is_final)] * state.batch_size
        lengths = [xs.size(1)] * len(xs) if lengths is None else list(lengths)
        self._check_call(xs, state, final, lengths)
        state.claim()
        if max(lengths, default=0) > 0:
            state.features.append(xs, lengths)
        begun = list(state.frames)
        read = [0] * state.batch_size  # features that are no longer needed
        pieces = []
        while chunk := self._next_chunk(state, read, final):
            pieces.append((chunk, self._encode_chunk(state, chunk, read)))
            for stream, frames in chunk.items():
                state.frames[stream] += frames
                state.held[stream] += frames
                read[stream] += frames * self._subsampling[0]
            if state.left_chunks >= 0:
                state.trim(state.left_chunks * state.chunk_size)
        held = zip(state.features.lengths, read, final, strict=True)
        state.features.keep([0 if last else n - done for n, done, last in held])
        state.finished = [was or last for was, last in zip(state.finished, final, strict=True)]
        state.emitted = [now - then for now, then in zip(state.frames, begun, strict=True)]

        dtype = pieces[0][1].dtype if pieces else xs.dtype
        size = (state.batch_size, max(state.emitted, default=0), self.output_size())  # type: ignore[attr-defined]
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
        """{stream: frames} of all streams with a complete or last chunk to encode.

        The order is that of their places, so that a chunk of all streams needs no copy.
        """
        stride, window = self._subsampling
        chunk = {}
        fed_frames = state.features.lengths
        for stream in sorted(range(state.batch_size), key=state.places.__getitem__):
            fed = fed_frames[stream]
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
        if state.left_chunks < 0:
            state.make_room(max(starts) + state.chunk_size)
        stride, context = self._subsampling
        xs = state.features.read(
            streams, [read[stream] for stream in streams], (max(lengths) - 1) * stride + context
        )
        step = ChunkStep(
            state.store.states,
            self._shared_tables(state, xs),
            [state.places[stream] for stream in streams],
            starts,
            lengths,
            [state.held[stream] for stream in streams],
            state.slots,
            xs.device,
        )
        if not self._has_relative_positions(self.espnet_conf):
            numbers = torch.tensor(starts, device=xs.device)[:, None]
            step.positions = numbers + torch.arange(max(lengths), device=xs.device)  # (R, Q)
        return self.run_step(xs, torch.full((len(xs),), xs.size(1)), step)

    def run_step(self, xs: Tensor, lengths: Tensor, step: CacheStep) -> Tensor:
        """Encode the features (R, T, F), lengths (R,), of a step -> (R, Q, D)."""
        with active_step(step):
            ys = self(xs, lengths)[0]  # type: ignore[operator]
        return ys[0] if isinstance(ys, tuple) else ys  # without intermediate CTC outputs

    def chunk_features(self, chunk_size: int) -> tuple[int, int]:
        """(new features of a chunk, features that its frames depend on)."""
        stride, window = self._subsampling
        return chunk_size * stride, (chunk_size - 1) * stride + window

    def module_states(self, spec: StateSpec) -> list[State]:
        """New states of the modules, by `state_index`."""
        return [module.init_state(spec) for module in self._stateful_modules()]

    def position_tables(
        self, slots: int, chunk_size: int, device: torch.device | None = None
    ) -> list[Tensor | None]:
        """Projected relative positions N - 1 down to -(C - 1) of each module, by `state_index`.

        Empty if the encoder does not use relative positions.
        """
        if not self._has_relative_positions(self.espnet_conf):
            return []
        size = self.output_size()  # type: ignore[attr-defined]
        pos_emb = relative(slots - 1, 1 - chunk_size, size, device or torch.device("cpu"))
        return [
            module.position_table(pos_emb) if hasattr(module, "position_table") else None
            for module in self._stateful_modules()
        ]

    def _shared_tables(self, state: EncoderState, xs: Tensor) -> Sequence[Tensor | None]:
        """`position_tables` of a stream, shared with the streams of the same settings."""
        if not self._has_relative_positions(self.espnet_conf):
            return ()
        made = state.tables
        if made is None or (made.slots, made.chunk_size) != (state.slots, state.chunk_size):
            tables = self.position_tables(state.slots, state.chunk_size, xs.device)
            made = PositionTables(state.slots, state.chunk_size, tables)
            # streams with the same settings share a table; the comparison detects changed weights
            shared = _tables.setdefault(self, weakref.WeakValueDictionary())
            key = (state.slots, state.chunk_size, xs.device)
            other = shared.setdefault(key, made)
            if not other.same_as(made):
                shared[key] = other = made
            state.tables = made = other
        return made.tables

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
                f"{conf['rel_pos_type']!r} is ESPnet's own attention, which cannot stream; use "
                "rel_pos_type: latest with rel_selfattn or selfattn"
            )
        if conf["input_layer"] in ("embed", None):
            raise ConfigError(
                f"input_layer: {conf['input_layer']!r} does not take frames of features; streaming "
                "needs conv2d or linear"
            )
        if conf.get("interctc_use_conditioning"):
            raise ConfigError("interctc_use_conditioning: true cannot stream; set false")
        self._check_chunked(conf)
        self._check_causal(conf)

    def _check_streaming(self, chunk_size: int) -> None:
        """Refuse encoders and settings that need the whole utterance."""
        if chunk_size < 1:
            raise ConfigError(
                "chunk_size: 0 (the whole utterance) cannot stream; set chunk_size to 1 or more "
                "frames"
            )
        if self._cannot_stream is not None:
            raise ConfigError(self._cannot_stream)
        if not all(hasattr(module, "init_state") for module in self._stateful_modules()):
            raise ConfigError(
                "causal: false lets convolutions use future frames; streaming needs causal: true"
            )

    def _check_call(
        self, xs: Tensor, state: EncoderState, final: list[bool], lengths: list[int]
    ) -> None:
        if self.training:
            raise ValueError("forward_chunk: the encoder is in training mode; call eval() first")
        if state.encoder is None:  # it was unpickled, or its encoder was deleted
            self._adopt(state)
        if state.encoder is not self:
            raise ValueError("forward_chunk: the state belongs to another encoder")
        if xs.dim() != 3 or xs.size(2) != self.input_size:
            raise ValueError(
                f"forward_chunk: xs of shape {tuple(xs.shape)} is not (B, T, {self.input_size})"
            )
        if not len(xs) == len(final) == len(lengths) == state.batch_size:
            raise ValueError(
                f"forward_chunk: xs of {len(xs)} streams, is_final of {len(final)} and lengths of "
                f"{len(lengths)} do not fit a state of {state.batch_size}"
            )
        if not all(0 <= length <= xs.size(1) for length in lengths):
            raise ValueError(
                f"forward_chunk: lengths {lengths} are not within 0 to {xs.size(1)} frames of xs"
            )
        for stream, (done, length) in enumerate(zip(state.finished, lengths, strict=True)):
            if done and length:
                raise ValueError(f"forward_chunk: stream {stream} has ended; reset it first")

    def _adopt(self, state: EncoderState) -> None:
        """Make this the encoder of a state without encoder, if the layout is equal."""
        self._check_streaming(state.chunk_size)
        spec = StateSpec(1, 1, state.cache_dtype, state.dtype, torch.device("meta"))
        own = Store(self.module_states(spec), 1, 1)
        if own.layout == state.store.layout:
            state.owner = weakref.ref(self)

    def _keep_positions(self, module: nn.Module, args: tuple) -> tuple | None:
        """Pre-hook on the positional encoding: keep the type of its table under autocast."""
        table, x = getattr(module, "pe", None), args[0]
        if (
            current_step.get() is None
            or table is None
            or not torch.is_autocast_enabled(x.device.type)
        ):
            return None
        return (x.to(table.dtype), *args[1:])

    def _pass_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        step = current_step.get()
        if step is None:
            return super()._pass_chunks(module, args, output)
        if step.positions is None:  # relative positions are in `CacheStep.tables`
            return args[0] * module.xscale
        return at_positions(module, args[0], step.positions)
