"""What a cache should come to, by arithmetic on the configuration alone.

No tensor is looked at here: what a running stream holds is held against these figures.

Shape letters: D model size, H heads, d_k = D / H, G key/value heads, r rank, f size of a feature
map, K frames that a convolution looks back.
"""

from collections.abc import Callable, Mapping
from typing import Any

from espnet_kv.attention import attention_like, layer_confs
from espnet_kv.cache.footprint import Footprint, vector_bytes
from espnet_kv.decoder.cached import own_options, shares_latent

# what is kept of a stream: (vectors, numbers in each)
type Vectors = list[tuple[int, int]]


def _conformer(conf: Mapping[str, Any]) -> Vectors:
    if not conf["use_cnn_module"]:
        return []
    return [(conf["cnn_module_kernel"] - 1, conf["output_size"])]


def _cgmlp(conf: Mapping[str, Any]) -> Vectors:
    # the gate halves the channels
    return [(conf["cgmlp_conv_kernel"] - 1, conf["cgmlp_linear_units"] // 2)]


def _branchformer(conf: Mapping[str, Any]) -> Vectors:
    return _cgmlp(conf) if conf["use_cgmlp"] else []


def _e_branchformer(conf: Mapping[str, Any]) -> Vectors:
    # both branches side by side are merged by a convolution
    return [*_cgmlp(conf), (conf["merge_conv_kernel"] - 1, 2 * conf["output_size"])]


CONVOLUTIONS: dict[str, Callable[[Mapping[str, Any]], Vectors]] = {
    "conformer": _conformer,
    "branchformer": _branchformer,
    "e_branchformer": _e_branchformer,
    "transformer": lambda conf: [],
}
"""encoder -> (K, channels) of each convolution over time in a block, given its arguments."""


def footprints(
    attention_type: str, attention_conf: Mapping[str, Any], heads: int, size: int, layers: int
) -> list[Footprint]:
    """What each layer's attention stores, as its class computes it from the configuration."""
    confs = layer_confs(attention_conf, layers)
    return [attention_like(attention_type, conf, heads, size).footprint for conf in confs]


class EncoderArithmetic:
    """The cache of one stream.

    Args:
        encoder: conformer, ... (without kv_).
        conf: every argument of the encoder.
        attention_type, attention_conf: its attention.
        mels: size of a feature.
        subsampling: (stride, window) in features.
        chunk_size: in frames.
    """

    def __init__(
        self,
        encoder: str,
        conf: Mapping[str, Any],
        attention_type: str,
        attention_conf: Mapping[str, Any],
        mels: int,
        subsampling: tuple[int, int],
        chunk_size: int,
    ):
        self.encoder, self.conf = encoder, conf
        self.attention_type, self.attention_conf = attention_type, attention_conf
        self.mels, self.subsampling, self.chunk_size = mels, subsampling, chunk_size

    def frames(self, features: int) -> int:
        """Frames that are encoded once so many features were heard: whole chunks."""
        stride, window = self.subsampling
        ready = max(0, (features - window) // stride + 1)
        return ready // self.chunk_size * self.chunk_size

    def bytes(self, features: int, left_chunks: int, cache_dtype: str) -> dict[str, int]:
        """{"attention", "conv", "input"} after so many features."""
        layers, frames = self.conf["num_blocks"], self.frames(features)
        kept = frames if left_chunks < 0 else min(frames, left_chunks * self.chunk_size)
        heads, size = self.conf["attention_heads"], self.conf["output_size"]
        own = footprints(self.attention_type, self.attention_conf, heads, size, layers)
        attention = sum(
            footprint.nbytes([kept], cache_dtype)
            for footprint in own
            if self.conf.get("use_attn", True)
        )
        convolutions = CONVOLUTIONS[self.encoder](self.conf)
        conv = sum(k * vector_bytes(n, cache_dtype) for k, n in convolutions)
        waiting = features - frames * self.subsampling[0]
        return {
            "attention": attention,
            "conv": layers * conv,
            "input": waiting * self.mels * 4,
        }


def decoder_bytes(
    conf: Mapping[str, Any], size: int, stored: int, hypotheses: int, frames: int
) -> dict[str, int]:
    """{"decoder_self", "decoder_cross"} of a search in one utterance, in float32.

    Args:
        conf: every argument of the decoder.
        size: D.
        stored: tokens that the search stores.
        hypotheses: that the search knows; each has its own sums in linear attention.
        frames: of the encoder.
    """
    if "dims" in conf:  # of Whisper
        heads, layers = conf["dims"]["n_text_head"], conf["dims"]["n_text_layer"]
    else:
        heads, layers = conf["attention_heads"], conf["num_blocks"]
    own, cross = (
        footprints(
            conf[f"{place}_attention_type"],
            own_options(conf[f"{place}_attention_conf"] or {}),
            heads,
            size,
            layers,
        )
        for place in ("self", "src")
    )
    if shares_latent(conf["src_attention_conf"] or {}):
        cross = cross[:1]
    tokens = sum(stored * footprint.frame_bytes("fp32") for footprint in own)
    sums = sum(hypotheses * footprint.constant_bytes("fp32") for footprint in own)
    return {
        "decoder_self": tokens + sums,
        "decoder_cross": sum(footprint.nbytes([frames]) for footprint in cross),
    }
