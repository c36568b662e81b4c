"""What a frame sees: padding, chunks, causal convolution, dynamic chunk training."""

import pytest
import torch
from small_encoders import (
    BLOCKS,
    FEATURES,
    SIZE,
    assert_close,
    attentions,
    batch,
    build,
    encode,
    encoders,
    outputs,
    position_conf,
    positions,
)

from espnet_kv.attention.chunks import Chunks

SUBSAMPLING, REACH = 4, 7  # conv2d: output t reads input frames 4t to 4t+6
CHUNKINGS = {
    "full": {},
    "chunk1": {"chunk_size": 1},
    "chunk4-left1": {"chunk_size": 4, "left_chunks": 1},
}
KERNELS = {
    "kv_conformer": ("cnn_module_kernel",),
    "kv_branchformer": ("cgmlp_conv_kernel",),
    "kv_e_branchformer": ("cgmlp_conv_kernel", "merge_conv_kernel"),
}
chunkings = pytest.mark.parametrize("chunking", CHUNKINGS.values(), ids=CHUNKINGS)
causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "noncausal"])


@chunkings
@causality
@attentions
@encoders
def test_neighbours_and_padding_change_nothing(name, attention, causal, chunking):
    encoder = build(name, **attention, **chunking, causal=causal)
    x, lengths = batch(95, 190, 31, 7)
    together = outputs(encoder, x, lengths)
    for utterance, length, got in zip(x, lengths, together, strict=True):
        alone = encode(encoder, utterance[:length])
        assert got.isfinite().all()
        assert_close(got, alone)


@pytest.mark.parametrize(
    "chunking", [{"chunk_size": 4, "left_chunks": 1}, {"chunk_size": 3}], ids=str
)
@attentions
@encoders
def test_neighbours_change_nothing_with_absolute_positions(name, attention, chunking):
    encoder = build(name, **attention, **chunking, **position_conf(name, False))
    x, lengths = batch(95, 190, 31)
    for utterance, length, got in zip(x, lengths, outputs(encoder, x, lengths), strict=True):
        assert_close(got, encode(encoder, utterance[:length]))


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@positions
@attentions
@encoders
def test_the_future_beyond_a_chunk_is_not_seen(name, attention, rel_pos, chunk_size):
    conf = {"causal": True, "chunk_size": chunk_size, **position_conf(name, rel_pos)}
    encoder = build(name, **attention, **conf)
    x = torch.randn(187, FEATURES)  # 46 frames after subsampling: the last chunk is ragged
    before = encode(encoder, x)
    for boundary in range(chunk_size, len(before), max(chunk_size, 7 // chunk_size * chunk_size)):
        changed = x.clone()
        changed[SUBSAMPLING * (boundary - 1) + REACH :] += 1
        after = encode(encoder, changed)
        assert_close(after[:boundary], before[:boundary], 1e-6)
        assert (after[boundary] - before[boundary]).abs().max() > 1e-3


@attentions
@encoders
def test_without_causal_convolution_the_future_is_seen(name, attention):
    """What the test above would miss if it compared nothing."""
    encoder = build(name, **attention, chunk_size=4)
    x = torch.randn(187, FEATURES)
    changed = x.clone()
    changed[SUBSAMPLING * 7 + REACH :] += 1
    assert (encode(encoder, changed)[:8] - encode(encoder, x)[:8]).abs().max() > 1e-4


@attentions
@encoders
def test_causal_without_chunks_still_attends_to_everything(name, attention):
    encoder = build(name, **attention, causal=True)
    x = torch.randn(187, FEATURES)
    changed = x.clone()
    changed[150:] += 1
    assert (encode(encoder, changed)[0] - encode(encoder, x)[0]).abs().max() > 1e-6


@positions
@attentions
@encoders
def test_left_chunks_forget_the_past_unless_it_is_summed(name, attention, rel_pos):
    chunk, left = 4, 1
    conf = {**dict.fromkeys(KERNELS[name], 1), **position_conf(name, rel_pos)}
    encoder = build(name, **attention, **conf, chunk_size=chunk, left_chunks=left)
    x = torch.randn(187, FEATURES)
    changed = x.clone()
    changed[: SUBSAMPLING * chunk] += 1  # chunk 0, and through subsampling nothing later
    difference = (encode(encoder, changed) - encode(encoder, x)).abs().amax(-1)
    reach = (left * BLOCKS + 1) * chunk
    assert difference[:reach].min() > 0
    if attention["attention_type"] == "linear":
        assert difference[reach:].min() > 0
    else:
        assert difference[reach:].max() == 0


@attentions
@encoders
def test_chunks_as_long_as_the_utterance_are_no_chunks(name, attention):
    whole = build(name, **attention)
    chunked = build(name, **attention, chunk_size=64, left_chunks=0)
    chunked.load_state_dict(whole.state_dict())
    x, lengths = batch(187, 95)
    assert_close(outputs(chunked, x, lengths), outputs(whole, x, lengths))


@attentions
@encoders
def test_a_one_frame_utterance(name, attention):
    for conf in ({}, {"chunk_size": 4, "left_chunks": 1, "causal": True}):
        encoder = build(name, **attention, **conf)
        assert encode(encoder, torch.randn(REACH, FEATURES)).shape == (1, SIZE)


@attentions
@encoders
def test_uninitialised_memory_is_not_read(name, attention, poisoned_memory):
    encoder = build(name, **attention, chunk_size=4, left_chunks=1, causal=True)
    x, lengths = batch(95, 190, 31)
    assert all(y.isfinite().all() for y in outputs(encoder, x, lengths))


@causality
@attentions
@encoders
def test_dynamic_chunks_train_every_parameter(name, attention, causal):
    conf = {"dynamic_chunk_training": True, "causal": causal}
    encoder = build(name, **attention, **conf).train()
    x, lengths = batch(95, 61)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        y, y_lengths, _ = encoder(x, lengths)
        real = y[torch.arange(y.size(1)) < y_lengths[:, None]]
        assert real.isfinite().all()
        real.pow(3).sum().backward()
        seen.add(round(float(real.detach().abs().sum()), 3))
    assert len(seen) > 3
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@encoders
def test_dynamic_chunks_follow_the_seed_and_end_with_training(name):
    encoder = build(name, dynamic_chunk_training=True)
    plain = build(name)
    plain.load_state_dict(encoder.state_dict())
    x, lengths = batch(95, 61)
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs(encoder, x, lengths), outputs(plain, x, lengths), strict=True)
    )
    encoder.train()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append([encoder(x, lengths)[0].detach() for _ in range(4)])
    assert_close(runs[1], runs[0])


@encoders
def test_a_fixed_chunk_size_holds_in_training(name):
    encoder = build(name, chunk_size=4)
    seen = []
    encoder.encoders[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][1]))
    x, lengths = batch(95)
    encoder.train()(x, lengths)
    encoder.chunk_size, encoder.left_chunks = 8, 2  # decoding may choose others
    encoder.eval()(x, lengths)
    assert [(c.size, c.left) for c in seen] == [(4, -1), (8, 2)]
    assert all(isinstance(c, Chunks) for c in seen)


def test_gradient_checkpoints_see_one_draw():
    """Layers are run again in the backward pass: under the chunks of the forward pass."""
    conf = {"dynamic_chunk_training": True}
    plain = build("kv_e_branchformer", **conf)
    checkpointed = build("kv_e_branchformer", **conf, gradient_checkpoint_layers=[0, 1, 2])
    checkpointed.load_state_dict(plain.state_dict())
    x, lengths = batch(95, 61)
    for seed in range(6):
        gradients = []
        for encoder in (plain, checkpointed):
            torch.manual_seed(seed)
            encoder.zero_grad()
            encoder.train()(x, lengths)[0].pow(3).sum().backward()
            gradients.append([p.grad.clone() for p in encoder.parameters()])
        assert_close(gradients[1], gradients[0], 1e-3)
