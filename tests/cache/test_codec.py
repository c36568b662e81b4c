"""What cache_dtype does to what is stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_encoders import assert_close

from espnet_kv.cache.codec import FLOATS, INTEGERS, build_codec
from espnet_kv.cache.footprint import vector_bytes

codecs = pytest.mark.parametrize("cache_dtype", [*FLOATS, *INTEGERS])


def there_and_back(cache_dtype, x):
    codec = build_codec(cache_dtype, x.size(-1), x.dtype)
    return codec.decode(codec.encode(x), x.dtype)


@codecs
@pytest.mark.parametrize("size", [1, 7, 64])
def test_layout_and_bytes_are_those_of_the_tensors(cache_dtype, size):
    codec = build_codec(cache_dtype, size, torch.float32)
    parts = codec.encode(torch.randn(2, 3, size))
    assert [(part.size(-1), part.dtype) for part in parts] == codec.layout
    assert sum(part.nbytes for part in parts) == 6 * vector_bytes(size, cache_dtype)


def test_without_cache_dtype_nothing_changes():
    x = torch.randn(5, 8)
    assert there_and_back(None, x).data_ptr() == x.data_ptr()
    assert torch.equal(there_and_back("fp32", x), x)
    assert torch.equal(there_and_back(None, x.double()), x.double())


@pytest.mark.parametrize("cache_dtype", INTEGERS)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9))
def test_integers_are_off_by_half_a_step_at_most(cache_dtype, numbers):
    x = torch.tensor([numbers])
    top = 2 ** (INTEGERS[cache_dtype] - 1) - 1
    # a bfloat16 scale is itself off by up to 2^-8: half a step, and that of the largest number
    allowed = x.abs().max() * (0.5 / top + 2**-8) + 1e-28
    assert (there_and_back(cache_dtype, x) - x).abs().max() <= allowed


@codecs
def test_storing_again_changes_nothing_more(cache_dtype):
    """Convolutions store the same frame several times while it is in reach."""
    once = there_and_back(cache_dtype, torch.randn(50, 16))
    assert_close(there_and_back(cache_dtype, once), once, tolerance=1e-6)


@codecs
def test_silence_and_extremes_stay_finite(cache_dtype):
    x = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [3e38, -3e38], [1e5, 1.0]])
    assert there_and_back(cache_dtype, x).isfinite().all()
    assert torch.equal(there_and_back(cache_dtype, x[:1]), x[:1])


@pytest.mark.parametrize("cache_dtype", INTEGERS)
def test_each_vector_has_its_own_scale(cache_dtype):
    x = torch.tensor([[1000.0, 1.0], [0.07, 0.01]])
    assert_close(there_and_back(cache_dtype, x)[1], x[1], tolerance=1e-3)


def test_a_large_number_spoils_the_4_bits_of_its_32_numbers_alone():
    x = torch.tensor([0.07, 0.01] * 40)  # 80 numbers: groups of 32, 32 and 16
    x[40] = 1000.0
    back = there_and_back("int4", x[None])[0]
    assert_close(torch.cat([back[:32], back[64:]]), torch.cat([x[:32], x[64:]]), tolerance=1e-3)
    assert (back[32:40] == 0).all() and back[40] == pytest.approx(1000.0, rel=1e-2)


@pytest.mark.parametrize("cache_dtype", [None, *FLOATS, *INTEGERS])
def test_the_largest_numbers_of_a_half_precision_model_stay_finite(cache_dtype):
    x = torch.tensor([[65504.0, -65504.0, 1.0]], dtype=torch.float16)
    back = there_and_back(cache_dtype, x)
    assert back.dtype == torch.float16
    assert back.isfinite().all()
