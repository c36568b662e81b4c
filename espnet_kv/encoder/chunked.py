"""Mixin of the encoders: choice of attention, chunk masks, causal convolution."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor, nn

from espnet_kv.attention import build_attention, check_attention, layer_confs
from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.chunks import Chunks, draw_chunks
from espnet_kv.encoder.causal import CausalConv1d
from espnet_kv.errors import ConfigError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.signatures import complete_arguments, with_arguments_of

# (chunk_size, left_chunks) of a pass in this thread or task; None: the settings of the encoder
chunk_override: ContextVar[tuple[int, int] | None] = ContextVar("chunk_override", default=None)


class KVEncoder:
    """Mixin for an ESPnet encoder class; it must come before that class in the bases.

    ESPnet builds the encoder. Then its attention modules (and, if causal, its convolutions over
    time) are replaced. Blocks and forward stay ESPnet's.

    Args:
        input_size: size F of the features.
        attention_type: mha, gqa, mla or linear (`espnet_kv.attention.ATTENTIONS`).
        attention_conf: options of the attention, e.g. {kv_rank: 64}, or one value per block,
            {kv_rank: [64, 48, ...]}.
        chunk_size: frames after subsampling in a chunk; 0 = the whole utterance. `init_state` and
            `chunks` override it for a stream or a pass.
        left_chunks: number of chunks of left context; -1 = all. Overridden like chunk_size.
        dynamic_chunk_training: draw chunk_size and left_chunks for every training batch, half of
            them whole utterances (U2, arXiv 2012.05481), so that one model serves all settings.
        causal: use causal convolutions over time.
        espnet_conf: the arguments of the ESPnet class. use_sdpa and use_flash_attn have no
            effect: attention always uses torch's scaled_dot_product_attention.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """

    # attributes of the ESPnet class
    encoders: Any
    embed: Any
    training: bool

    # argument of the ESPnet class with the value selfattn or rel_selfattn
    layer_type_key: ClassVar[str]
    # attribute of a block that holds its attention module
    attention_slot: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._espnet_class() is None:
            return
        with_arguments_of(cls._espnet_class(), own=KVEncoder)(cls)

    def __init__(
        self,
        input_size: int,
        attention_type: str = "mha",
        attention_conf: Mapping[str, Any] | None = None,
        chunk_size: int = 0,
        left_chunks: int = -1,
        dynamic_chunk_training: bool = False,
        causal: bool = False,
        **espnet_conf: Any,
    ):
        if not isinstance(attention_conf, Mapping | None):
            raise ConfigError(f"attention_conf: {attention_conf!r} is not a mapping of options")
        attention_conf = dict(attention_conf or {})
        check_attention(attention_type, attention_conf)
        check_chunks(chunk_size, left_chunks)
        _check_bool("dynamic_chunk_training", dynamic_chunk_training)
        _check_bool("causal", causal)
        given = espnet_conf | {"input_size": input_size}
        conf = complete_arguments("encoder_conf", type(self), self._espnet_class(), given)
        HeadSizes(conf["attention_heads"], conf["output_size"])
        layers = layer_confs(attention_conf, conf["num_blocks"])
        chunked = chunk_size > 0 or dynamic_chunk_training
        ours = self._replaces_attention(conf, attention_type, chunked)
        if chunked:
            self._check_chunked(conf)
        if causal:
            self._check_causal(conf)

        super().__init__(input_size, **espnet_conf)  # type: ignore[call-arg]
        self.espnet_conf = conf
        self.holds_our_attention = ours
        self.chunk_size = chunk_size
        self.left_chunks = left_chunks
        self.dynamic_chunk_training = dynamic_chunk_training
        try:
            self._subsampling = subsampling(self.embed)
        except ConfigError:  # padding over time: this encoder cannot stream
            self._subsampling = (1, 1)
        for block, layer_conf in zip(self.encoders, layers, strict=True):
            if ours and getattr(block, self.attention_slot) is not None:
                setattr(
                    block,
                    self.attention_slot,
                    self._build_attention(conf, attention_type, layer_conf),
                )
            if causal:
                for owner, name in self.time_convolutions(block):
                    setattr(owner, name, CausalConv1d.like(getattr(owner, name)))
        positions = self._positional_encoding()
        if positions is not None:
            positions.register_forward_hook(self._pass_chunks)
        elif chunked:
            self._check_positions()
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)  # type: ignore[arg-type]

    @contextmanager
    def chunks(
        self, *, chunk_size: int | None = None, left_chunks: int | None = None
    ) -> Iterator[None]:
        """Set the chunk mask of the passes within the block.

            with encoder.chunks(chunk_size=16, left_chunks=4):
                ys, lengths, _ = encoder(xs, lengths)

        The settings apply to all kv_* encoders called in the block by this thread or task. Streams
        are not affected (`init_state`).

        Args:
            chunk_size: frames after subsampling in a chunk; 0: the whole utterance; None: the
                encoder's setting.
            left_chunks: number of chunks of left context; -1: all; None: the encoder's setting.

        Raises:
            ConfigError (a ValueError): a value is not allowed, or the encoder cannot use chunks.
        """
        size = self.chunk_size if chunk_size is None else chunk_size
        left = self.left_chunks if left_chunks is None else left_chunks
        check_chunks(size, left)
        if size > 0:
            self._check_chunked(self.espnet_conf)
            self._replaces_attention(self.espnet_conf, "mha", True)
            self._check_positions()
        token = chunk_override.set((size, left))
        try:
            yield
        finally:
            chunk_override.reset(token)

    def forward(self, xs_pad: Tensor, ilens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """ESPnet's forward, with a random chunk mask in training with dynamic_chunk_training."""
        if not (self.training and self.dynamic_chunk_training):
            return super().forward(xs_pad, ilens, *args, **kwargs)  # type: ignore[misc]
        stride, window = self._subsampling
        token = chunk_override.set(draw_chunks(max(1, (xs_pad.size(1) - window) // stride + 1)))
        try:
            return super().forward(xs_pad, ilens, *args, **kwargs)  # type: ignore[misc]
        finally:
            chunk_override.reset(token)

    @staticmethod
    @abstractmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """(module, attribute name) of every convolution over time in a block."""

    @classmethod
    def _espnet_class(cls) -> Any:
        return next((c for c in cls.__mro__ if c.__module__.startswith("espnet2.")), None)

    def _replaces_attention(self, conf: dict, attention_type: str, chunked: bool) -> bool:
        """Whether attention modules are replaced; ESPnet's legacy kinds are not."""
        layer_type = conf[self.layer_type_key]
        if conf["rel_pos_type"] != "legacy" and layer_type in ("selfattn", "rel_selfattn"):
            return True
        if conf["rel_pos_type"] == "legacy" and layer_type == "selfattn":
            return True
        if attention_type != "mha" or chunked:
            raise ConfigError(
                f"rel_pos_type: {conf['rel_pos_type']!r} with {self.layer_type_key}: "
                f"{layer_type!r} supports only ESPnet's attention (attention_type mha, no chunks); "
                f"use rel_pos_type: latest with rel_selfattn or selfattn"
            )
        return False

    def _has_relative_positions(self, conf: dict) -> bool:
        return conf[self.layer_type_key] == "rel_selfattn"

    def _build_attention(self, conf: dict, attention_type: str, attention_conf: dict) -> nn.Module:
        rel_pos = self._has_relative_positions(conf)
        return build_attention(
            attention_type,
            attention_conf,
            conf["attention_heads"],
            conf["output_size"],
            conf["attention_dropout_rate"],
            rel_pos,
            # ESPnet's relative attention ignores qk_norm, its absolute attention zero_triu
            zero_triu=rel_pos and conf["zero_triu"],
            qk_norm=not rel_pos and conf["qk_norm"],
        )

    def _check_chunked(self, conf: dict) -> None:
        """Refuse options that need the whole utterance and cannot be used with chunks."""
        if conf.get("ctc_trim"):
            raise ConfigError(
                "ctc_trim: true drops frames and cannot be used with chunks; set false"
            )
        if conf.get("merge_method") == "learned_ave":
            raise ConfigError(
                "merge_method: learned_ave pools over the whole utterance and cannot be used with "
                "chunks; use concat or fixed_ave"
            )

    def _check_causal(self, conf: dict) -> None:
        """Refuse options that use future frames."""
        for key in ("cnn_module_kernel", "cgmlp_conv_kernel", "merge_conv_kernel"):
            if key in conf and conf[key] % 2 == 0:
                raise ConfigError(f"{key}: {conf[key]} is even; causal: true needs an odd kernel")
        if conf["pos_enc_layer_type"] == "conv":
            raise ConfigError("pos_enc_layer_type: conv uses future frames; set causal: false")
        if conf.get("positionwise_layer_type") in ("conv1d", "conv1d-linear"):
            raise ConfigError(
                f"positionwise_layer_type: {conf['positionwise_layer_type']} uses future frames; "
                "causal: true needs linear"
            )
        if conf.get("merge_method") == "learned_ave":
            raise ConfigError(
                "merge_method: learned_ave uses future frames; causal: true needs concat or "
                "fixed_ave"
            )

    def _positional_encoding(self) -> nn.Module | None:
        embed = self.embed
        return embed[-1] if isinstance(embed, nn.Sequential) else getattr(embed, "pos_enc", None)

    def _check_positions(self) -> None:
        if self._positional_encoding() is None:
            raise ConfigError("input_layer: null adds no positions; chunks need an input layer")

    def _chunks(self, pos_emb: Tensor | None) -> Chunks | None:
        """The chunk mask of the current pass; None: no chunks."""
        size, left = chunk_override.get() or (self.chunk_size, self.left_chunks)
        return Chunks(pos_emb, size, left) if size > 0 else None

    def _pass_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook on the positional encoding: replace pos_emb by Chunks.

        ESPnet's blocks pass this argument unchanged to their attention. The convolutions still
        get the padding mask.
        """
        x, pos_emb = output if isinstance(output, tuple) else (output, None)
        chunks = self._chunks(pos_emb)
        return output if chunks is None else (x, chunks)


def subsampling(embed: nn.Module | None) -> tuple[int, int]:
    """(stride, window) in input frames: output t uses inputs t*stride to t*stride + window - 1.

    Raises:
        ConfigError (a ValueError): a convolution pads over time.
    """
    stride, window = 1, 1
    for module in embed.modules() if embed is not None else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            if module.padding[0]:
                raise ConfigError("input_layer: a convolution that pads over time cannot stream")
            window += (module.kernel_size[0] - 1) * stride
            stride *= module.stride[0]
    return stride, window


def check_chunks(chunk_size: Any, left_chunks: Any) -> None:
    """Check the chunk settings.

    Raises:
        ConfigError (a ValueError): a value is not an integer, or out of range.
    """
    _check_whole("chunk_size", chunk_size, 0, "0 (the whole utterance) or more frames")
    _check_whole("left_chunks", left_chunks, -1, "-1 (all) or more chunks")


def _check_whole(key: str, value: Any, least: int, allowed: str) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"{key}: {value!r} is not allowed (allowed: {allowed})")


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} is not allowed (allowed: true, false)")
