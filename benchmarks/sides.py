"""The sides of benchmarks/streaming.py: streams through our encoders and ESPnet's.

A chunk of C frames after subsampling has 4 C new features. For chunk n, a side reads `window`
features from `first` + 4 C n on, so that all sides return the same C frames of the same audio.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from common import DROPOUTS, MELS, copy_weights, encoder_conf
from torch import Tensor

CHUNK = 16  # frames after subsampling
STRIDE = 4  # features per frame, by conv2d's two 3x3 convolutions of stride 2
NEW = STRIDE * CHUNK
OVERLAP = 3  # features after the chunk that its last frame needs
ESPNET, TRIMMED = "espnet", "espnet trimmed"
# name -> attention_type, and additions to its attention_conf in conf/
ATTENTIONS: dict[str, tuple[str, dict]] = {
    "mha": ("mha", {}),
    "mha input": ("mha", {"cache": "input"}),
    "gqa": ("gqa", {"num_kv_heads": 2}),
    "mla": ("mla", {"kv_rank": 64}),
    "linear": ("linear", {}),
}
# our name of a module in a block -> ESPnet's
BLOCK_NAMES = {
    "self_attn": "self_att",
    "conv_module": "conv_mod",
    "norm_ff_macaron": "norm_macaron",
    "norm_mha": "norm_self_att",
    "norm_ff": "norm_feed_forward",
}


def conf_of(name: str, blocks: int) -> dict:
    """encoder_conf of one of ATTENTIONS: the recipe's, without dropout."""
    attention, extra = ATTENTIONS[name]
    conf = encoder_conf("conformer", attention)
    conf["attention_conf"] = conf.get("attention_conf", {}) | extra
    return conf | dict.fromkeys(DROPOUTS, 0.0) | {"num_blocks": blocks, "chunk_size": CHUNK}


def build_ours(blocks: int, device: str) -> dict:
    """Our encoders by name, with the weights of mha where names and shapes agree."""
    from espnet_kv.encoder.encoders import KVConformerEncoder

    torch.manual_seed(0)
    encoders = {name: KVConformerEncoder(MELS, **conf_of(name, blocks)) for name in ATTENTIONS}
    weights = encoders["mha"].state_dict()
    for encoder in encoders.values():
        copy_weights(weights, encoder)
        encoder.eval().to(device)
    return encoders


def build_espnet(mha) -> Any:
    """ESPnet's asr_transducer encoder, of the sizes and with the weights of our `mha`.

    Raises:
        RuntimeError: the parameters of both encoders do not correspond one to one.
    """
    from espnet2.asr_transducer.encoder.encoder import Encoder

    conf = conf_of("mha", len(mha.encoders))
    block = {
        "block_type": "conformer",
        "num_blocks": conf["num_blocks"],
        "hidden_size": conf["output_size"],
        "linear_size": conf["linear_units"],
        "heads": conf["attention_heads"],
        "conv_mod_kernel_size": conf["cnn_module_kernel"],
    }
    inputs = {"vgg_like": False, "subsampling_factor": STRIDE, "conv_size": conf["output_size"]}
    # dynamic chunks make its convolutions causal
    encoder = Encoder(MELS, [block], inputs, {"dynamic_chunk_training": True})
    weights = {_espnet_name(name): tensor for name, tensor in mha.state_dict().items()}
    # our positional encoding multiplies the subsampled features by sqrt(D), ESPnet's does not
    for name in ("embed.output.weight", "embed.output.bias"):
        weights[name] = weights[name] * mha.embed.pos_enc.xscale
    encoder.load_state_dict(weights)
    return encoder.eval().to(next(mha.parameters()).device)


def _espnet_name(name: str) -> str:
    match name.split("."):
        case ["encoders", index, module, *rest]:
            return ".".join(["encoders.blocks", index, BLOCK_NAMES.get(module, module), *rest])
        case ["after_norm", *rest]:
            return ".".join(["encoders.norm_blocks", *rest])
        case ["embed", "out", *rest]:
            return ".".join(["embed.output", *rest])
    return name


class Stream(ABC):
    """Some streams through an encoder.

    Attributes:
        first, window: the features of a chunk, see above.
    """

    first: int
    window: int

    def pieces(self, features: Tensor) -> list[Tensor]:
        """(B, 4 C n + 11, F) -> the input for each of n chunks."""
        count = (features.size(1) - Espnet.window) // NEW + 1
        begins = [self.first + NEW * n for n in range(count)]
        return [features[:, begin : begin + self.window].contiguous() for begin in begins]

    def run(self, pieces: list[Tensor]) -> None:
        """Encode consecutive chunks."""
        for piece in pieces:
            self.step(piece)

    @abstractmethod
    def step(self, xs: Tensor) -> Tensor:
        """Encode one chunk."""

    @abstractmethod
    def held(self) -> dict[str, int]:
        """Bytes held between two chunks, by kind."""

    @abstractmethod
    def held_analytic(self) -> int:
        """The expected bytes by arithmetic."""

    @abstractmethod
    def alive(self) -> int:
        """Bytes of their allocated storage."""


class Ours(Stream):
    """`forward_chunk` of one of our encoders."""

    # features 4 to 6 are fed beforehand, because the state holds the overlap of the last chunk
    first = STRIDE + OVERLAP
    window = NEW

    def __init__(self, encoder, left_chunks: int, features: Tensor):
        self.encoder = encoder
        self.state = encoder.init_state(len(features), left_chunks=left_chunks)
        self.step(features[:, STRIDE : self.first])

    def step(self, xs: Tensor) -> Tensor:
        ys, self.state = self.encoder.forward_chunk(xs, self.state)
        return ys

    def held(self) -> dict[str, int]:
        return self.state.nbytes_by_kind()

    def held_analytic(self) -> int:
        return self.state.nbytes_analytic

    def alive(self) -> int:
        return self.state.capacity_bytes


class Espnet(Stream):
    """`chunk_forward` of ESPnet's asr_transducer encoder, called as its Speech2Text calls it.

    It subsamples C + 2 frames and drops the first and the last, so its caller passes 11 features
    twice. The cache is part of the encoder: one stream per encoder.
    """

    first = 0
    window = NEW + 2 * STRIDE + OVERLAP

    def __init__(self, encoder, left_chunks: int, features: Tensor):
        self.encoder = encoder
        self.left = left_chunks * CHUNK
        device = features.device
        self.lengths = torch.tensor([self.window], device=device)
        self.processed = torch.tensor([[0]], device=device)
        self.features = features[:, :0]
        encoder.reset_cache(self.left, device)

    def step(self, xs: Tensor) -> Tensor:
        ys = self.encoder.chunk_forward(xs, self.lengths, self.processed, self.left)
        self.processed += CHUNK
        self.features = xs[:, NEW:]  # kept by the caller for the next chunk
        return ys

    def held(self) -> dict[str, int]:
        caches = [block.cache for block in self.encoder.encoders.blocks]
        attention, conv = (sum(c[i].nbytes for c in caches) for i in (0, 1))
        return {"attention": attention, "conv": conv, "input": self.features.nbytes}

    def held_analytic(self) -> int:
        blocks = self.encoder.encoders.blocks
        frames = sum(self.left + block.conv_mod.kernel_size - 1 for block in blocks)
        numbers = frames * blocks[0].block_size + (self.window - NEW) * MELS
        return numbers * 4

    def alive(self) -> int:
        # the cache consists of views of tensors that also hold the chunk
        caches = [tensor for block in self.encoder.encoders.blocks for tensor in block.cache]
        return sum(c.untyped_storage().nbytes() for c in caches) + self.features.nbytes


class TrimmedEspnet(Espnet):
    """ESPnet's modules without the two frames dropped by `chunk_forward`, with a cached mask."""

    first = STRIDE
    window = NEW + OVERLAP

    def __init__(self, encoder, left_chunks: int, features: Tensor):
        super().__init__(encoder, left_chunks, features)
        self.mask = torch.ones(1, self.left + CHUNK, dtype=torch.bool, device=features.device)
        self.mask[:, self.left :] = False
        self.filled = 0

    def step(self, xs: Tensor) -> Tensor:
        encoder = self.encoder
        x, _ = encoder.embed(xs)
        positions = encoder.pos_enc(x, left_context=self.left)
        ys = encoder.encoders.chunk_forward(x, positions, self.mask, left_context=self.left)
        if self.filled < self.left:
            self.filled += CHUNK
            self.mask[:, self.left - self.filled :] = False
        self.features = xs[:, NEW:]
        return ys


def multiply_accumulates(name: str, conf: dict, left: int) -> tuple[int, int, int]:
    """Multiply-accumulates per stream by the formulas, for a chunk with `left` cached frames.

    Returns:
        Input layer; blocks without attention; attention. ESPnet projects the relative positions in
        every chunk; ours are projected once.
    """
    size, rank = conf["output_size"], conf["attention_conf"].get("kv_rank", 0)
    heads, blocks = conf["attention_heads"], conf["num_blocks"]
    keys, positions = left + CHUNK, left + 2 * CHUNK - 1
    embedded = CHUNK + 2 if name == ESPNET else CHUNK
    bins = ((MELS - 1) // 2, ((MELS - 1) // 2 - 1) // 2)
    first_conv = (2 * embedded + 1) * bins[0] * 9 * size
    embed = first_conv + embedded * bins[1] * (9 * size * size + size * size)

    feed_forward = 2 * 2 * size * conf["linear_units"]
    convolution = 3 * size * size + conf["cnn_module_kernel"] * size
    rest = CHUNK * (feed_forward + convolution)

    attention = CHUNK * 2 * size * size  # linear_q, linear_out
    d_k = size // heads
    if name == "linear":
        attention += CHUNK * 2 * size * size + 2 * CHUNK * size * (d_k + 1)
        return embed, blocks * rest, blocks * attention
    attention += CHUNK * positions * size  # q . p
    scores = 2 * CHUNK * keys * size  # q . k and the weighted values
    if name in (ESPNET, TRIMMED):
        attention += positions * size * size + keys * 2 * size * size + scores
    elif name == "mla":
        absorbed = 2 * CHUNK * size * rank + 2 * CHUNK * keys * heads * rank
        attention += CHUNK * size * rank + min(absorbed, 2 * keys * size * rank + scores)
    else:
        projected = keys if name == "mha input" else CHUNK
        kv_heads = conf["attention_conf"].get("num_kv_heads", heads)
        attention += projected * size * 2 * kv_heads * d_k + scores
    return embed, blocks * rest, blocks * attention
