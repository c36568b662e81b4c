"""What the encoders share: attention by name, chunk masks, causal convolution."""

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

# (chunk_size, left_chunks) of one pass in this thread or task; None: those of the encoder
one_pass: ContextVar[tuple[int, int] | None] = ContextVar("one_pass", default=None)


class KVEncoder:
    """Mixin in front of an ESPnet encoder class.

    ESPnet builds the encoder, then its attention modules (and, when causal, its convolutions over
    time) are replaced by ours; blocks and forward stay ESPnet's.

    Args:
        input_size: size F of the features.
        attention_type: mha, gqa, mla or linear (`espnet_kv.attention.ATTENTIONS`).
        attention_conf: options of that attention, e.g. {kv_rank: 64}, or with a value for each
            block, {kv_rank: [64, 48, ...]}.
        chunk_size: frames after subsampling in a chunk; 0 = the whole utterance. A stream or a
            pass may have another (`init_state`, `chunks`).
        left_chunks: chunks before its own that a frame sees; -1 = all. As chunk_size.
        dynamic_chunk_training: draw chunk_size and left_chunks for every training batch, half of
            them whole utterances (U2, arXiv 2012.05481), so that one model serves every setting.
        causal: convolutions over time see the past only.
        espnet_conf: the arguments of the ESPnet class. use_sdpa and use_flash_attn change
            nothing: attention always runs through torch's scaled_dot_product_attention.

    Raises:
        ConfigError (a ValueError): names the key, its value and what is allowed.
    """

    # of the ESPnet class
    encoders: Any
    embed: Any
    training: bool

    # the argument of the ESPnet class that tells selfattn from rel_selfattn
    layer_type_key: ClassVar[str]
    # where a block keeps its attention module
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
            raise ConfigError(f"attention_conf: {attention_conf!r} is no mapping of options")
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
        ours = self._takes_our_attention(conf, attention_type, chunked)
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
        except ConfigError:  # padded over time: cannot stream
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
            positions.register_forward_hook(self._hand_out_chunks)
        elif chunked:
            self._check_positions()
        # ESPnet loads non-strictly, and would go on with random attention weights
        self.load_guard = refuse_partial_loads(self)  # type: ignore[arg-type]

    @contextmanager
    def chunks(
        self, *, chunk_size: int | None = None, left_chunks: int | None = None
    ) -> Iterator[None]:
        """Within it, one pass of this thread or task has this chunk mask.

            with encoder.chunks(chunk_size=16, left_chunks=4):
                ys, lengths, _ = encoder(xs, lengths)

        The settings hold for every kv_* encoder called within, and for no other thread. A stream
        has its own (`init_state`).

        Args:
            chunk_size: frames after subsampling in a chunk; 0: the whole utterance; None: the
                encoder's own.
            left_chunks: chunks before its own that a frame sees; -1: all; None: the encoder's own.

        Raises:
            ConfigError (a ValueError): a value that is not allowed, or the encoder cannot work in
                chunks.
        """
        size = self.chunk_size if chunk_size is None else chunk_size
        left = self.left_chunks if left_chunks is None else left_chunks
        check_chunks(size, left)
        if size > 0:
            self._check_chunked(self.espnet_conf)
            self._takes_our_attention(self.espnet_conf, "mha", True)
            self._check_positions()
        token = one_pass.set((size, left))
        try:
            yield
        finally:
            one_pass.reset(token)

    def forward(self, xs_pad: Tensor, ilens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ESPnet's; in training with dynamic_chunk_training under a chunk mask that is drawn."""
        if not (self.training and self.dynamic_chunk_training):
            return super().forward(xs_pad, ilens, *args, **kwargs)  # type: ignore[misc]
        stride, window = self._subsampling
        token = one_pass.set(draw_chunks(max(1, (xs_pad.size(1) - window) // stride + 1)))
        try:
            return super().forward(xs_pad, ilens, *args, **kwargs)  # type: ignore[misc]
        finally:
            one_pass.reset(token)

    @staticmethod
    @abstractmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """(module, attribute name) of every convolution over time in a block."""

    @classmethod
    def _espnet_class(cls) -> Any:
        return next((c for c in cls.__mro__ if c.__module__.startswith("espnet2.")), None)

    def _takes_our_attention(self, conf: dict, attention_type: str, chunked: bool) -> bool:
        """Whether attention modules are replaced: not for kinds that ESPnet alone has."""
        layer_type = conf[self.layer_type_key]
        if conf["rel_pos_type"] != "legacy" and layer_type in ("selfattn", "rel_selfattn"):
            return True
        if conf["rel_pos_type"] == "legacy" and layer_type == "selfattn":
            return True
        if attention_type != "mha" or chunked:
            raise ConfigError(
                f"rel_pos_type: {conf['rel_pos_type']!r} with {self.layer_type_key}: "
                f"{layer_type!r} works only as ESPnet made it (attention_type mha, no chunks); "
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
            # ESPnet's relative attention ignores qk_norm, its other one zero_triu
            zero_triu=rel_pos and conf["zero_triu"],
            qk_norm=not rel_pos and conf["qk_norm"],
        )

    def _check_chunked(self, conf: dict) -> None:
        """Refuse what looks at the whole utterance and so cannot be chunked."""
        if conf.get("ctc_trim"):
            raise ConfigError("ctc_trim: true drops frames, which chunks do not survive; set false")
        if conf.get("merge_method") == "learned_ave":
            raise ConfigError(
                "merge_method: learned_ave pools over the whole utterance, which chunks do not "
                "see; use concat or fixed_ave"
            )

    def _check_causal(self, conf: dict) -> None:
        """Refuse what would still see the future."""
        for key in ("cnn_module_kernel", "cgmlp_conv_kernel", "merge_conv_kernel"):
            if key in conf and conf[key] % 2 == 0:
                raise ConfigError(f"{key}: {conf[key]} is even; causal: true needs an odd kernel")
        if conf["pos_enc_layer_type"] == "conv":
            raise ConfigError("pos_enc_layer_type: conv sees the future; set causal: false")
        if conf.get("positionwise_layer_type") in ("conv1d", "conv1d-linear"):
            raise ConfigError(
                f"positionwise_layer_type: {conf['positionwise_layer_type']} sees the future; "
                "causal: true needs linear"
            )
        if conf.get("merge_method") == "learned_ave":
            raise ConfigError(
                "merge_method: learned_ave sees the future; causal: true needs concat or fixed_ave"
            )

    def _positional_encoding(self) -> nn.Module | None:
        embed = self.embed
        return embed[-1] if isinstance(embed, nn.Sequential) else getattr(embed, "pos_enc", None)

    def _check_positions(self) -> None:
        if self._positional_encoding() is None:
            raise ConfigError("input_layer: null adds no positions; chunks need an input layer")

    def _chunks(self, pos_emb: Tensor | None) -> Chunks | None:
        """The chunk mask of the pass that is being made; None: no chunks."""
        size, left = one_pass.get() or (self.chunk_size, self.left_chunks)
        return Chunks(pos_emb, size, left) if size > 0 else None

    def _hand_out_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook on the positional encoding: puts Chunks where blocks expect pos_emb.

        ESPnet's blocks pass that argument on to their attention unchanged, while the convolutions
        go on getting the padding mask.
        """
        x, pos_emb = output if isinstance(output, tuple) else (output, None)
        chunks = self._chunks(pos_emb)
        return output if chunks is None else (x, chunks)


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


def check_chunks(chunk_size: Any, left_chunks: Any) -> None:
    """Check the settings of chunks.

    Raises:
        ConfigError (a ValueError): not whole numbers, or out of range.
    """
    _check_whole("chunk_size", chunk_size, 0, "0 (the whole utterance) or more frames")
    _check_whole("left_chunks", left_chunks, -1, "-1 (all) or more chunks")


def _check_whole(key: str, value: Any, least: int, allowed: str) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"{key}: {value!r} is not allowed (allowed: {allowed})")


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {value!r} is not allowed (allowed: true, false)")
