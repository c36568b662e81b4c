"""Each attention against its naive float64 twin (naive.py): outputs and gradients."""

from dataclasses import dataclass, field
from typing import Any

import naive
import pytest
import torch
from pairwise import pairwise
from torch import Tensor

from espnet_kv.attention import ATTENTIONS, build_attention, softmax
from espnet_kv.attention.chunks import Chunks

HEADS, SIZE = 4, 16


@dataclass
class Variant:
    attention_type: str
    conf: dict[str, Any] = field(default_factory=dict)

    def build(self, rel_pos: bool, **espnet_options: Any) -> torch.nn.Module:
        """A float64 module with weights far from their start, in training mode."""
        module = build_attention(
            self.attention_type, self.conf, HEADS, SIZE, 0.0, rel_pos, **espnet_options
        ).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    def twin(self, w, x: Tensor, visible: Tensor, chunks: Chunks | None, **options) -> Tensor:
        if self.attention_type == "mla":
            return naive.latent_attention(w, x, HEADS, visible, **options)
        if self.attention_type == "linear":
            size = chunks.size if chunks else None
            return naive.linear_attention(w, x, HEADS, visible, **self.conf, chunk=size)
        kv_heads = self.conf.get("num_kv_heads")
        return naive.softmax_attention(w, x, HEADS, visible, kv_heads, **options)


SOFTMAX = {
    "mha": Variant("mha"),
    "gqa4": Variant("gqa", {"num_kv_heads": 4}),
    "gqa2": Variant("gqa", {"num_kv_heads": 2}),
    "mqa": Variant("gqa", {"num_kv_heads": 1}),
    "mla-r3": Variant("mla", {"kv_rank": 3}),
    "mla-r32": Variant("mla", {"kv_rank": 2 * SIZE}),
}
LINEAR = {
    "linear-elu": Variant("linear", {"feature_map": "elu"}),
    "linear-relu": Variant("linear", {"feature_map": "relu"}),
    "linear-hedgehog": Variant("linear", {"feature_map": "hedgehog"}),
    "linear-elu-decay": Variant("linear", {"feature_map": "elu", "decay": 0.9}),
    "linear-hedgehog-decay": Variant("linear", {"feature_map": "hedgehog", "decay": 0.5}),
}
VARIANTS = SOFTMAX | LINEAR
CHUNKS = {
    "full": None,
    "chunk1": (1, -1),
    "chunk1-left2": (1, 2),
    "chunk4": (4, -1),
    "chunk4-left0": (4, 0),
    "chunk4-left2": (4, 2),
    "chunk16": (16, -1),
}
MASKS = ["unmasked", "padded", "square"]
POSITIONS = {"rel": True, "abs": False}
FEW_CHUNKS = {"full": None, "chunk4-left1": (4, 1)}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
softmax_variants = pytest.mark.parametrize("variant", SOFTMAX.values(), ids=SOFTMAX)


def make_mask(kind: str, batch: int, frames: int) -> Tensor | None:
    """None, (B, 1, T) with utterances of T, T/2 and 1 frames, or a random (B, T, T)."""
    if kind == "unmasked":
        return None
    if kind == "padded":
        lengths = torch.tensor([frames, max(1, frames // 2), 1])[:batch]
        return (torch.arange(frames) < lengths[:, None])[:, None]
    return (torch.rand(batch, frames, frames) < 0.6) | torch.eye(frames, dtype=torch.bool)


def context(
    rel_pos: bool, chunking, mask: Tensor | None, frames: int, dtype: torch.dtype = torch.float64
) -> tuple:
    """What ESPnet's block passes after query, key and value."""
    pos_emb = naive.position_table(frames, SIZE).to(dtype) if rel_pos else None
    if chunking is not None:
        return Chunks(pos_emb, *chunking), mask
    return (pos_emb, mask) if rel_pos else (mask,)


def visibility(variant: Variant, chunking, mask, batch: int, frames: int) -> Tensor:
    """(B, T, T) by definition: the mask, and the chunks in reach."""
    visible = torch.ones(batch, frames, frames, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if chunking is not None:
        size, left = chunking
        if variant.attention_type == "linear":
            left = -1  # a sum cannot forget one of its terms
        visible = visible & naive.chunk_visible(frames, size, left)
    return visible


def real_rows(mask: Tensor | None, batch: int, frames: int) -> Tensor:
    """(B, T) bool: frames that are not padding."""
    if mask is None or mask.size(1) != 1:
        return torch.ones(batch, frames, dtype=torch.bool)
    return mask[:, 0]


def run_with_gradients(function, x: Tensor, parameters: dict[str, Tensor], rows: Tensor):
    """The output on `rows` and the gradients of a random projection of it."""
    out = function(x)[rows]
    generator = torch.Generator().manual_seed(2)
    projection = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    leaves = {"x": x, **parameters}
    gradients = torch.autograd.grad(
        (out * projection).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return out, dict(zip(leaves, gradients, strict=True))


def compare(variant: Variant, rel_pos, chunking, mask_kind, frames, dtype=torch.float64, **options):
    """Hold a module in `dtype` against its twin: output of the real frames and all gradients."""
    module = variant.build(rel_pos, **options)
    options.pop("qk_norm", None)  # the twin finds the weights of the norm
    x = torch.randn(3, frames, SIZE, dtype=torch.float64)
    mask = make_mask(mask_kind, 3, frames)
    rows = real_rows(mask, 3, frames)

    w = naive.weights(module)
    visible = visibility(variant, chunking, mask, 3, frames)
    chunks = Chunks(None, *chunking) if chunking else None
    expected, expected_gradients = run_with_gradients(
        lambda x: variant.twin(w, x, visible, chunks, **options),
        x.clone().requires_grad_(),
        w,
        rows,
    )
    module = module.to(dtype)
    extra = context(rel_pos, chunking, mask, frames, dtype)
    got, gradients = run_with_gradients(
        lambda x: module(x, x, x, *extra),
        x.to(dtype).requires_grad_(),
        dict(module.named_parameters()),
        rows,
    )
    tolerance = 1e-9 if dtype == torch.float64 else 5e-4
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.double(),
            expected_gradients[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@pairwise(variant=SOFTMAX, rel_pos=POSITIONS, chunking=CHUNKS, mask_kind=MASKS)
def test_softmax_attention_equals_its_twin(variant, rel_pos, chunking, mask_kind):
    compare(variant, rel_pos, chunking, mask_kind, frames=19)


@pairwise(variant=LINEAR, chunking=CHUNKS, mask_kind=MASKS)
def test_linear_attention_equals_its_twin(variant, chunking, mask_kind):
    compare(variant, True, chunking, mask_kind, frames=19)


@pairwise(variant=LINEAR)
def test_linear_attention_without_positions(variant):
    compare(variant, False, (4, -1), "padded", frames=19)


@pairwise(
    variant=VARIANTS,
    frames=[1, 2, 7, 33],
    rel_pos=POSITIONS,
    chunking=FEW_CHUNKS,
    dtype={"fp64": torch.float64, "fp32": torch.float32},
)
def test_odd_lengths_and_single_precision(variant, rel_pos, chunking, frames, dtype):
    compare(variant, rel_pos, chunking, "padded", frames, dtype=dtype)


@pytest.mark.parametrize("chunking", [None, (4, 1)], ids=["full", "chunk4-left1"])
@softmax_variants
def test_zero_triu(variant, chunking):
    compare(variant, True, chunking, "padded", 11, zero_triu=True)


@pytest.mark.parametrize("chunking", [None, (4, 1)], ids=["full", "chunk4-left1"])
def test_qk_norm(chunking):
    compare(VARIANTS["mha"], False, chunking, "padded", 11, qk_norm=True)


@pairwise(
    variant=SOFTMAX,
    rel_pos=POSITIONS,
    mask_kind=["padded", "square"],
    chunking={"full": None, "chunk4-left0": (4, 0), "chunk5-left2": (5, 2)},
    frames=[17, 27],  # last blocks of 1 and 3 queries
)
def test_blocks_of_queries_change_nothing(
    monkeypatch, variant, rel_pos, mask_kind, chunking, frames
):
    module = variant.build(rel_pos)
    x = torch.randn(3, frames, SIZE, dtype=torch.float64, requires_grad=True)
    mask = make_mask(mask_kind, 3, frames)
    rows = real_rows(mask, 3, frames)
    extra = context(rel_pos, chunking, mask, frames)

    def run():
        parameters = dict(module.named_parameters())
        return run_with_gradients(lambda x: module(x, x, x, *extra), x, parameters, rows)

    whole, whole_gradients = run()
    monkeypatch.setattr(softmax, "QUERY_BLOCK", 8)
    blocked, gradients = run()
    torch.testing.assert_close(blocked, whole, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-9, atol=1e-9)


def copy_weights(module, source, names: str) -> None:
    with torch.no_grad():
        for name in names.split():
            module.get_parameter(name).copy_(source.get_parameter(name))


@pairwise(rel_pos=POSITIONS, chunking=CHUNKS)
def test_gqa_with_all_heads_is_mha(rel_pos, chunking):
    mha, gqa = VARIANTS["mha"].build(rel_pos), VARIANTS["gqa4"].build(rel_pos)
    gqa.load_state_dict(mha.state_dict())
    x = torch.randn(2, 13, SIZE, dtype=torch.float64)
    extra = context(rel_pos, chunking, make_mask("padded", 2, 13), 13)
    torch.testing.assert_close(gqa(x, x, x, *extra), mha(x, x, x, *extra), rtol=0, atol=0)


@pairwise(rel_pos=POSITIONS, chunking=CHUNKS)
def test_mla_at_full_rank_is_mha(rel_pos, chunking):
    """W_down = [W_k; W_v] and up-projections that pick: the K bias cancels, the V bias stays."""
    mha, mla = VARIANTS["mha"].build(rel_pos), VARIANTS["mla-r32"].build(rel_pos)
    shared = "linear_q.weight linear_q.bias linear_out.weight linear_out.bias"
    copy_weights(mla, mha, shared)
    if rel_pos:
        copy_weights(mla, mha, "linear_pos.weight pos_bias_u pos_bias_v")
    nothing, everything = torch.zeros(SIZE, SIZE), torch.eye(SIZE)
    with torch.no_grad():
        mla.linear_kv_down.weight.copy_(torch.cat([mha.linear_k.weight, mha.linear_v.weight]))
        mla.linear_k_up.weight.copy_(torch.cat([everything, nothing], dim=1))
        mla.linear_v_up.weight.copy_(torch.cat([nothing, everything], dim=1))
        mla.linear_v_up.bias.copy_(mha.linear_v.bias)
    x = torch.randn(2, 13, SIZE, dtype=torch.float64)
    mask = make_mask("padded", 2, 13)
    extra = context(rel_pos, chunking, mask, 13)
    torch.testing.assert_close(
        mla(x, x, x, *extra)[mask[:, 0]], mha(x, x, x, *extra)[mask[:, 0]], rtol=1e-9, atol=1e-9
    )


@pairwise(variant=VARIANTS, rel_pos=POSITIONS, chunking=FEW_CHUNKS, square=[False, True])
def test_padding_is_not_seen(variant, rel_pos, chunking, square):
    """Nor does it matter whether the mask says so for each query."""
    module = variant.build(rel_pos)
    frames, length = 19, 11
    x = torch.randn(2, frames, SIZE, dtype=torch.float64)
    mask = torch.ones(2, 1, frames, dtype=torch.bool)
    mask[1, :, length:] = False
    extra = context(rel_pos, chunking, mask, frames)
    clean = module(x, x, x, *extra)
    x[1, length:] = 1e4 * torch.randn(frames - length, SIZE, dtype=torch.float64)
    if square:
        extra = context(rel_pos, chunking, mask.expand(2, frames, frames), frames)
    dirty = module(x, x, x, *extra)
    assert dirty.isfinite().all()
    torch.testing.assert_close(dirty[mask[:, 0]], clean[mask[:, 0]], rtol=1e-9, atol=1e-9)


@pairwise(
    variant={name: VARIANTS[name] for name in ("mha", "mqa", "linear-elu-decay")},
    chunking=CHUNKS,
    square=[False, True],
)
def test_padding_is_not_seen_in_any_chunks(variant, chunking, square):
    test_padding_is_not_seen(variant, True, chunking, square)


@pairwise(variant=SOFTMAX, rel_pos=POSITIONS)
def test_left_chunks_bound_what_is_seen(variant, rel_pos):
    module = variant.build(rel_pos)
    x = torch.randn(1, 20, SIZE, dtype=torch.float64)
    extra = context(rel_pos, (4, 1), None, 20)
    before = module(x, x, x, *extra)
    x[:, :8] += 1  # chunks 0 and 1
    after = module(x, x, x, *extra)
    torch.testing.assert_close(after[:, 12:], before[:, 12:], rtol=0, atol=0)  # see 2, 3 and 4
    assert (after[:, 8:12] - before[:, 8:12]).abs().amax(-1).min() > 1e-6


@variants
def test_uninitialised_memory_is_not_read(variant, poisoned_memory):
    assert torch.empty(3).isnan().all()
    module = variant.build(True)
    x = torch.randn(2, 19, SIZE, dtype=torch.float64)
    for chunking in (None, (4, 1)):
        extra = context(True, chunking, make_mask("padded", 2, 19), 19)
        assert module(x, x, x, *extra).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@variants
def test_half_precision(variant, dtype):
    """asr_inference --dtype bfloat16 turns the whole model over."""
    module = variant.build(True)
    x = torch.randn(2, 19, SIZE, dtype=torch.float64)
    mask = make_mask("padded", 2, 19)
    expected = module(x, x, x, *context(True, None, mask, 19))
    half = x.to(dtype)
    got = module.to(dtype)(half, half, half, *context(True, None, mask, 19, dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0.1, atol=0.15)


@pairwise(variant=VARIANTS, rel_pos=POSITIONS)
def test_dropout_acts_in_training_only(variant, rel_pos):
    module = build_attention(variant.attention_type, variant.conf, HEADS, SIZE, 0.5, rel_pos)
    x = torch.randn(1, 9, SIZE)
    extra = context(rel_pos, None, None, 9, torch.float32)
    assert not torch.equal(module(x, x, x, *extra), module(x, x, x, *extra))
    module.eval()
    assert torch.equal(module(x, x, x, *extra), module(x, x, x, *extra))


def test_every_attention_is_tested_here():
    assert {v.attention_type for v in VARIANTS.values()} == set(ATTENTIONS)
