"""What a cache should come to, by arithmetic on the configuration alone.

No tensor is looked at here: what a running stream holds is held against these figures.

Shape letters: D model size, H heads, d_k = D / H, G key/value heads, r rank, f size of a feature
map, K frames that a convolution looks back.
"""

from collections.abc import Callable, Mapping
from typing import Any

# what attention keeps of a frame: (vectors, numbers in each)
type Vectors = list[tuple[int, int]]
SUM_BYTES = 4  # of linear attention, float32 whatever the cache_dtype


def _mha(conf: Mapping[str, Any], heads: int, size: int) -> Vectors:
    if conf.get("cache", "kv") == "input":
        return [(1, size)]
    return [(2 * heads, size // heads)]


def _gqa(conf: Mapping[str, Any], heads: int, size: int) -> Vectors:
    return [(2 * conf.get("num_kv_heads", 1), size // heads)]


def _mla(conf: Mapping[str, Any], heads: int, size: int) -> Vectors:
    return [(1, conf.get("kv_rank", 64))]


PER_FRAME: dict[str, Callable[[Mapping[str, Any], int, int], Vectors]] = {
    "mha": _mha,
    "gqa": _gqa,
    "mla": _mla,
    "linear": lambda conf, heads, size: [],
}
"""attention_type -> what it keeps of a frame, given attention_conf, H and D."""


def _linear_sums(conf: Mapping[str, Any], heads: int, size: int) -> int:
    d_k = size // heads
    features = 2 * d_k if conf.get("feature_map") == "hedgehog" else d_k
    return heads * features * (d_k + 1)


CONSTANT: dict[str, Callable[[Mapping[str, Any], int, int], int]] = {"linear": _linear_sums}
"""attention_type -> numbers that it keeps however long the stream is."""


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


def vector_bytes(numbers: int, cache_dtype: str) -> int:
    """Bytes of one vector of so many numbers; integers come with a scale of 2 bytes."""
    return {
        "fp64": 8 * numbers,
        "fp32": 4 * numbers,
        "fp16": 2 * numbers,
        "bf16": 2 * numbers,
        "int8": numbers + 2,
        "int4": (numbers + 1) // 2 + 2,
    }[cache_dtype]


def attention_bytes(
    attention_type: str,
    attention_conf: Mapping[str, Any],
    heads: int,
    size: int,
    cache_dtype: str,
) -> tuple[int, int]:
    """(bytes per frame, bytes whatever the length) that one attention module keeps."""
    vectors = PER_FRAME[attention_type](attention_conf, heads, size)
    per_frame = sum(count * vector_bytes(numbers, cache_dtype) for count, numbers in vectors)
    constant = CONSTANT.get(attention_type)
    return per_frame, 0 if constant is None else SUM_BYTES * constant(attention_conf, heads, size)


def of_layer(conf: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """attention_conf of one layer, where options may list a value for each."""
    return {
        key: value[layer] if isinstance(value, list | tuple) else value
        for key, value in conf.items()
    }


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

    def attention_layer(self, layer: int, frames: int, left_chunks: int, cache_dtype: str) -> int:
        """Bytes of one layer after `frames` frames, of which left_chunks chunks are kept."""
        per_frame, constant = attention_bytes(
            self.attention_type,
            of_layer(self.attention_conf, layer),
            self.conf["attention_heads"],
            self.conf["output_size"],
            cache_dtype,
        )
        kept = frames if left_chunks < 0 else min(frames, left_chunks * self.chunk_size)
        return kept * per_frame + constant

    def bytes(self, features: int, left_chunks: int, cache_dtype: str) -> dict[str, int]:
        """{"attention", "conv", "input"} after so many features."""
        layers, frames = self.conf["num_blocks"], self.frames(features)
        attention = sum(
            self.attention_layer(layer, frames, left_chunks, cache_dtype)
            for layer in range(layers)
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
    conf: Mapping[str, Any], size: int, stored: int, frames: int, measured: int
) -> dict[str, int]:
    """{"decoder_self", "decoder_cross"} of a search in one utterance, in float32.

    Args:
        conf: every argument of the decoder.
        size: D.
        stored: tokens of hypotheses that the search keeps.
        frames: of the encoder.
        measured: decoder_self as measured. Sums of linear attention belong to hypotheses, of which
            the search may know more than take a step: so many times the arithmetic is taken as
            comes closest.
    """
    token, sums = _decoder_layers(conf, size, "self")
    frame, constant = _decoder_layers(conf, size, "src")
    own = stored * token
    if sums:
        own += sums * round((measured - own) / sums)
    return {"decoder_self": own, "decoder_cross": frames * frame + constant}


def _decoder_layers(conf: Mapping[str, Any], size: int, place: str) -> tuple[int, int]:
    """(bytes per item, bytes whatever their number) of all layers."""
    layers = [
        attention_bytes(
            conf[f"{place}_attention_type"],
            of_layer(conf[f"{place}_attention_conf"] or {}, layer),
            conf["attention_heads"],
            size,
            "fp32",
        )
        for layer in range(conf["num_blocks"])
    ]
    return sum(item for item, _ in layers), sum(constant for _, constant in layers)
