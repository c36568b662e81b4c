"""Relative positions, chunk masks and the draw of dynamic chunks."""

import naive
import pytest
import torch

from espnet_kv.attention.chunks import Chunks, draw_chunks
from espnet_kv.attention.softmax import rel_shift


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 5), (4, 9), (7, 3)], ids=str)
def test_rel_shift_lines_positions_up(queries, keys, rng):
    scores = torch.randn(2, 3, queries, keys + queries - 1, generator=rng)
    shifted = rel_shift(scores, keys)
    assert shifted.shape == (2, 3, queries, keys)
    for i in range(queries):
        for j in range(keys):
            assert torch.equal(shifted[:, :, i, j], scores[:, :, i, queries - 1 - i + j])
    assert shifted.data_ptr() == scores[..., queries - 1 :].data_ptr()  # a view


def test_rel_shift_passes_gradients(rng):
    scores = torch.randn(2, 1, 4, 9, dtype=torch.float64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: rel_shift(s, 6), (scores,))


def test_rel_shift_of_a_slice(rng):
    """A view whose storage starts elsewhere."""
    scores = torch.randn(5, 2, 4, 9, generator=rng)
    assert torch.equal(rel_shift(scores[2:], 6), rel_shift(scores[2:].clone(), 6))


SETTINGS = [(1, -1), (1, 0), (1, 3), (4, -1), (4, 0), (4, 2), (16, 1), (25, -1), (64, 2)]
settings = pytest.mark.parametrize(("size", "left"), SETTINGS, ids=str)


@settings
@pytest.mark.parametrize("frames", [1, 4, 19, 33])
def test_visible_is_the_double_loop(size, left, frames):
    numbers = torch.arange(frames)
    visible = Chunks(None, size, left).visible(numbers, numbers)
    assert torch.equal(visible, naive.chunk_visible(frames, size, left))


@settings
@pytest.mark.parametrize("frames", [4, 19])
def test_key_range_is_the_tightest_around_what_is_seen(size, left, frames):
    chunks, visible = Chunks(None, size, left), naive.chunk_visible(frames, size, left)
    for first in range(frames):
        for last in range(first + 1, frames + 1):
            seen = visible[first:last].any(0).nonzero()
            tightest = int(seen.min()), int(seen.max()) + 1
            assert chunks.key_range(first, last, frames) == tightest


def test_draws_are_those_of_u2():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_chunks(80, generator) for _ in range(2000)]
    whole = [d for d in draws if d[0] == 0]
    chunked = [d for d in draws if d[0] > 0]
    assert set(whole) == {(0, -1)}
    assert 0.45 < len(whole) / len(draws) < 0.55
    assert {size for size, _ in chunked} == set(range(1, 26))
    assert 0.45 < sum(left == -1 for _, left in chunked) / len(chunked) < 0.55
    for size, left in chunked:
        assert -1 <= left <= -(-80 // size)


def test_draws_follow_the_seed():
    torch.manual_seed(7)
    first = [draw_chunks(50) for _ in range(9)]
    torch.manual_seed(7)
    assert [draw_chunks(50) for _ in range(9)] == first
    assert all(draw_chunks(1)[0] <= 25 for _ in range(50))
