"""States know their bytes, and hold nothing besides."""

import gc
import math

import psutil
import pytest
import torch
from small_encoders import BLOCKS, FEATURES, SIZE, assert_close, encode, encoders
from streams import STREAMED, Feeder, reachable, streaming, utterances

from espnet_kv.cache import EncoderState
from espnet_kv.cache.codec import FLOATS, INTEGERS
from espnet_kv.heap import return_freed_memory

streamed = pytest.mark.parametrize("attention", STREAMED)
cache_dtypes = pytest.mark.parametrize("cache_dtype", [None, *FLOATS, *INTEGERS])
HEADS, D_K, KERNEL = 4, SIZE // 4, 7

# vectors of a frame in one layer: how many, of how many numbers (the table of the README)
VECTORS = {
    "mha": (2 * HEADS, D_K),
    "gqa": (2 * 2, D_K),
    "mqa": (2 * 1, D_K),
    "mla": (1, 5),
    "mha-input": (1, SIZE),
}
FEATURE_MAP = {"linear": D_K, "decay": D_K, "hedgehog": 2 * D_K}


def vector_bytes(size: int, cache_dtype: str | None) -> int:
    """int8 with a scale of two bytes, int4 with one for every 32 numbers."""
    scales = {"int8": 1, "int4": math.ceil(size / 32)}.get(cache_dtype, 0)
    bits = {None: 32, "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}[cache_dtype]
    return math.ceil(size * bits / 8) + 2 * scales


@streamed
@cache_dtypes
@pytest.mark.parametrize("left", [0, 2, -1])
def test_bytes_are_what_arithmetic_says(attention, cache_dtype, left):
    encoder = streaming("kv_conformer", 4, left, **STREAMED[attention])
    state = encoder.init_state(2, cache_dtype=cache_dtype)
    for fed in range(0, 110, 11):
        _, state = encoder.forward_chunk(torch.randn(2, 11, FEATURES), state)
        chunks = max(0, (fed + 11 - 7) // 4 + 1) // 4
        held = 4 * (chunks if left < 0 else min(chunks, left))
        if attention in VECTORS:
            count, size = VECTORS[attention]
            expected = 2 * BLOCKS * held * count * vector_bytes(size, cache_dtype)
        else:
            expected = 2 * BLOCKS * HEADS * FEATURE_MAP[attention] * (D_K + 1) * 4
        assert state.nbytes_by_kind() == {
            "attention": expected,
            "conv": 2 * BLOCKS * (KERNEL - 1) * vector_bytes(SIZE, cache_dtype),
            "input": 2 * (fed + 11 - 16 * chunks) * FEATURES * 4,
        }
        assert state.nbytes == state.nbytes_analytic == sum(state.nbytes_by_kind().values())
        assert state.nbytes <= state.capacity_bytes


@encoders
@streamed
def test_nothing_else_is_held(name, attention):
    """Arithmetic knows every kind of encoder, and capacity_bytes every tensor kept alive."""
    encoder = streaming(name, **STREAMED[attention])
    state = encoder.init_state(2)
    for _ in range(5):
        _, state = encoder.forward_chunk(torch.randn(2, 37, FEATURES), state)
        assert state.nbytes == state.nbytes_analytic
        tensors = reachable(state).values()
        assert sum(t.untyped_storage().nbytes() for t in tensors) == state.capacity_bytes


@encoders
@streamed
def test_bounded_storage_is_laid_out_once(name, attention):
    """No growth, and no new storage from chunk to chunk."""
    encoder = streaming(name, 4, 2, **STREAMED[attention])
    state = encoder.init_state()
    storage = [t.data_ptr() for s in state.store.states for t in s.tensors]
    for _ in range(20):
        _, state = encoder.forward_chunk(torch.randn(1, 30, FEATURES), state)
    assert [t.data_ptr() for s in state.store.states for t in s.tensors] == storage


def test_a_slot_more_than_the_left_context():
    """Storage: left context and the chunk itself."""
    state = streaming("kv_conformer", 4, 2).init_state(3)
    kv = sum(s.capacity_bytes for s in state.store.states if s.kind == "attention")
    assert kv == 3 * BLOCKS * (2 + 1) * 4 * 2 * SIZE * 4


def test_unbounded_left_context_grows_by_doubling():
    encoder = streaming("kv_conformer", 4, -1)
    state = encoder.init_state()
    slots = []
    for _ in range(40):
        _, state = encoder.forward_chunk(torch.randn(1, 30, FEATURES), state)
        slots.append(state.slots)
    assert sorted(set(slots)) == [64, 128, 256, 512]
    assert state.slots < 2 * (state.frames[0] + 4)


def test_trim_forgets_the_oldest():
    """An unbounded left context that is trimmed sees what a bounded one sees.

    Without convolutions, which carry further what the frames before saw.
    """
    encoder = streaming("kv_conformer", 4, -1, num_blocks=1, use_cnn_module=False)
    (x,) = utterances(40)
    _, state = encoder.forward_chunk(x[None, : 4 * 20 + 3], encoder.init_state())
    state.trim(8)
    assert state.nbytes == state.nbytes_analytic
    with encoder.chunks(left_chunks=2):
        expected = encode(encoder, x)[20:24]
    ys, _ = encoder.forward_chunk(x[None, 4 * 20 + 3 : 4 * 24 + 3], state)
    assert_close(ys[0], expected)


@pytest.mark.parametrize("attention", ["mha", "mla", "linear"])
def test_a_state_moves_as_a_whole(attention):
    state = streaming("kv_conformer", **STREAMED[attention]).init_state(2)
    assert {t.device.type for t in reachable(state.to(torch.device("meta"))).values()} == {"meta"}


@streamed
def test_coarser_storage_costs_accuracy_in_order(attention):
    """fp32 nothing, then 16, 8 and 4 bits more and more, and none of them everything."""
    encoder = streaming("kv_conformer", 4, 3, **STREAMED[attention])
    xs = utterances(60)
    with torch.no_grad():
        expected = encode(encoder, xs[0])
    error = {}
    for cache_dtype in ("fp32", "fp16", "bf16", "int8", "int4"):
        ys = torch.cat(Feeder(encoder, xs, cache_dtype=cache_dtype).run(size=16).out[0])
        error[cache_dtype] = ((ys - expected).norm() / expected.norm()).item()
    assert error["fp32"] < 1e-5
    assert error["fp16"] < error["bf16"] < error["int4"]
    assert error["fp16"] < error["int8"] < error["int4"] < 0.25
    assert error["int8"] < 0.03


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_streams_join_with_integers(cache_dtype):
    encoder = streaming("kv_conformer", **STREAMED["mla"])
    states = [encoder.init_state(cache_dtype=cache_dtype) for _ in range(2)]
    x = torch.randn(2, 40, FEATURES)
    apart = []
    for i, state in enumerate(states):
        _, state = encoder.forward_chunk(x[i : i + 1, :20], state)
        apart.append(encoder.forward_chunk(x[i : i + 1, 20:], _copy(state))[0])
    together, _ = encoder.forward_chunk(x[:, 20:], EncoderState.join(states))
    assert_close(together, torch.cat(apart))


def _copy(state: EncoderState) -> EncoderState:
    return state.select(range(state.batch_size))


HOUR = 90_000  # frames of 40 ms


def resident_bytes() -> int:
    """Memory of this process now, without files, whose pages the system takes and brings back as it
    likes, without garbage, and without what the allocator keeps of the tests before."""
    gc.collect()
    return_freed_memory()
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "linear"])
def test_an_hour_takes_the_memory_of_ten_minutes(attention):
    """Neither the state nor anything of the process grows."""
    encoder = streaming("kv_conformer", 60, 2, num_blocks=1, **STREAMED[attention])
    state = encoder.init_state()
    noise = torch.randn(1, 4 * 1500, FEATURES)
    held, capacities = {}, set()
    for minute in range(HOUR // 1500):
        _, state = encoder.forward_chunk(noise, state)
        capacities.add(state.store.capacity_bytes)
        if minute in (9, 59):
            held[minute] = resident_bytes()
    assert state.frames[0] >= HOUR - 60
    assert len(capacities) == 1
    assert held[59] <= held[9] + 2**20  # what the tests before left may be freed meanwhile


@pytest.mark.slow
def test_sums_of_an_hour_are_accurate():
    """Against the same encoder in float64, at the end of the hour."""
    encoder = streaming("kv_conformer", 60, 0, num_blocks=1, attention_type="linear")
    exact = streaming("kv_conformer", 60, 0, num_blocks=1, attention_type="linear").double()
    exact.load_state_dict(encoder.state_dict())
    state, exact_state = encoder.init_state(), exact.init_state()
    for _ in range(HOUR // 1500):
        x = torch.randn(1, 4 * 1500, FEATURES) + 1
        ys, state = encoder.forward_chunk(x, state)
        exact_ys, exact_state = exact.forward_chunk(x.double(), exact_state)
    sums, exact_sums = (
        state.store.states[0].tensors[0].double(),
        exact_state.store.states[0].tensors[0],
    )
    assert ((sums - exact_sums).norm() / exact_sums.norm()).item() < 1e-5
    assert_close(ys[0, -60:].double(), exact_ys[0, -60:], tolerance=1e-4)
