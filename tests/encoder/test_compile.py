"""torch.compile: no graph break that ESPnet's own classes do not have, no compilation per chunk."""

from typing import Any

import pytest
import torch
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from small_decoders import SIZE, VOCABULARY, of
from small_decoders import build as build_decoder
from small_encoders import ATTENTIONS, FEATURES, assert_close, batch, build, build_stock
from streams import STREAMED
from torch._dynamo.testing import CompileCounter

from espnet_kv.attention import build_attention
from espnet_kv.attention.chunks import Chunks

ENCODERS = ("kv_conformer", "kv_branchformer", "kv_e_branchformer", "kv_transformer")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(module: torch.nn.Module, *args: Any) -> int:
    """Graphs that one pass is compiled to."""
    with torch.no_grad():
        return torch._dynamo.explain(module.forward)(*args).graph_count


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_break_no_more_than_espnets(name):
    args, chunks = batch(31), {"chunk_size": 4, "left_chunks": 1, "causal": True}
    stock = graphs(build_stock(name, num_blocks=1), *args)
    for attention in ("mla", "mha"):
        torch._dynamo.reset()
        conf = ATTENTIONS[attention] | (chunks if attention == "mla" else {})
        assert graphs(build(name, num_blocks=1, **conf), *args) <= stock


@pytest.mark.parametrize("rel_pos", [True, False], ids=["rel", "abs"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_compiles_to_one_graph(attention, rel_pos):
    conf = ATTENTIONS[attention]
    module = build_attention(
        conf["attention_type"], conf.get("attention_conf", {}), 4, SIZE, 0.0, rel_pos
    )
    x, pos_emb = torch.randn(2, 9, SIZE), torch.randn(1, 17, SIZE)
    mask = torch.ones(2, 1, 9, dtype=torch.bool)
    for position in (pos_emb if rel_pos else None, Chunks(pos_emb if rel_pos else None, 4, 1)):
        assert graphs(module, x, x, x, position, mask) == 1


def test_decoders_break_no_more_than_espnets():
    hs, ys = torch.randn(2, 9, SIZE), torch.randint(VOCABULARY, (2, 5))
    args = hs, torch.tensor([9, 6]), ys, torch.tensor([5, 4])
    stock = graphs(build_decoder(TransformerDecoder, num_blocks=1), *args)
    for self_attention, src_attention in (("mha", "mla"), ("linear", "gqa")):
        torch._dynamo.reset()
        decoder = build_decoder(**of(self_attention, src_attention), num_blocks=1)
        assert graphs(decoder, *args) <= stock


@pytest.mark.parametrize(
    ("name", "attention"),
    [("kv_conformer", "mha"), ("kv_transformer", "mla"), ("kv_e_branchformer", "decay")],
)
def test_a_stream_is_not_compiled_again_for_every_chunk(name, attention):
    encoder = build(name, causal=True, num_blocks=1, **STREAMED[attention])
    chunks = {"chunk_size": 4, "left_chunks": 2}
    x = torch.randn(2, 3 + 16 * 10, FEATURES)
    plain = encoder.init_state(2, **chunks)
    counter = CompileCounter()
    state, seen = encoder.init_state(2, **chunks), []
    expected, got = [], []
    for first in range(3, x.size(1), 16):
        piece = x[:, (0 if first == 3 else first) : first + 16]
        expected.append(encoder.forward_chunk(piece, plain)[0])
    encoder.compile(backend=counter)
    for first in range(3, x.size(1), 16):
        piece = x[:, (0 if first == 3 else first) : first + 16]
        got.append(encoder.forward_chunk(piece, state)[0])
        seen.append(counter.frame_count)
    assert_close(torch.cat(got, 1), torch.cat(expected, 1))
    # a growing context has shapes of its own; once it is full, one graph serves all chunks
    assert seen[4:] == seen[4:5] * len(seen[4:])
    assert seen[4] <= 4


def test_a_compiled_encoder_tells_passes_from_streams():
    encoder = build("kv_conformer", causal=True, num_blocks=1)
    args = batch(31)
    with torch.no_grad():
        expected = encoder(*args)[0]
        encoder.compile(backend="eager")
        assert_close(encoder(*args)[0], expected)
        encoder.forward_chunk(args[0], encoder.init_state(chunk_size=4))
        assert_close(encoder(*args)[0], expected)
        with encoder.chunks(chunk_size=4):
            assert not torch.allclose(encoder(*args)[0], expected, atol=1e-3)
