"""factorize_kv against numpy, brute force and awkward moments."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from layers import SIZE, Source

from espnet_kv.convert.factorize import factorize_kv

RANKS = [1, 2, 3, 5, 8, 12, 15, 16]


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, SIZE, SIZE, dtype=torch.float64)
    return k, v


def moment(rng, count: int = 400) -> torch.Tensor:
    x = Source(rng).frames(1, count)[0]
    return x.T @ x / count


def error(k, v, rank, second_moment, judged_by) -> float:
    """E |(W - up down) x|^2 for x of the moment judged_by, by the plain formula."""
    down, up_k, up_v = factorize_kv(k, v, rank, second_moment)
    lost = torch.cat([k - up_k @ down, v - up_v @ down])
    return float(torch.einsum("oi,ij,oj->", lost, judged_by, lost))


@pytest.mark.parametrize("rank", RANKS)
def test_without_a_moment_it_is_numpys_svd(rank):
    k, v = weights()
    singular = np.linalg.svd(np.concatenate([k.numpy(), v.numpy()]), compute_uv=False)
    identity = torch.eye(SIZE, dtype=torch.float64)
    for given in (None, identity):
        np.testing.assert_allclose(
            error(k, v, rank, given, identity), (singular[rank:] ** 2).sum(), atol=1e-12
        )


@pytest.mark.parametrize("rank", RANKS)
def test_it_is_the_whitened_svd(rng, rank):
    """The textbook way, which needs an inverse: W S = A s B', up = A s, down = B' S^-1."""
    k, v = weights()
    m = moment(rng)
    root = np.linalg.cholesky(m.numpy())
    a, s, bt = np.linalg.svd(np.concatenate([k.numpy(), v.numpy()]) @ root, full_matrices=False)
    expected = (a[:, :rank] * s[:rank]) @ bt[:rank] @ np.linalg.inv(root)
    down, up_k, up_v = factorize_kv(k, v, rank, m)
    np.testing.assert_allclose((torch.cat([up_k, up_v]) @ down).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("size", [1e-1, 1e-3])
def test_no_neighbour_is_better(rng, rank, size):
    k, v = weights()
    m, w = moment(rng), torch.cat([k, v])
    down, up_k, up_v = factorize_kv(k, v, rank, m)
    up = torch.cat([up_k, up_v])
    best = error(k, v, rank, m, m)
    for _ in range(50):
        lost = w - (up + size * torch.randn_like(up)) @ (down + size * torch.randn_like(down))
        assert torch.einsum("oi,ij,oj->", lost, m, lost) > best


def test_more_rank_is_never_worse(rng):
    k, v = weights()
    m = moment(rng)
    errors = [error(k, v, rank, m, m) for rank in range(1, SIZE + 1)]
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize("rank", RANKS[:-1])
def test_activations_are_kept_better_than_by_plain_svd(rng, rank):
    """On the frames of the fit by construction, on others of the same source in fact."""
    k, v = weights()
    source = Source(rng)
    seen, unseen = source.frames(1, 400)[0], source.frames(1, 400)[0]
    m, other = seen.T @ seen / 400, unseen.T @ unseen / 400
    assert error(k, v, rank, m, m) <= error(k, v, rank, None, m)
    assert error(k, v, rank, m, other) < 0.9 * error(k, v, rank, None, other)


@pytest.mark.parametrize("rank", [SIZE, SIZE + 1, 2 * SIZE])
def test_at_full_rank_nothing_is_lost(rng, rank):
    k, v = weights()
    for given in (None, moment(rng), moment(rng, 3)):
        down, up_k, up_v = factorize_kv(k, v, rank, given)
        assert down.shape == (rank, SIZE) and up_k.shape == up_v.shape == (SIZE, rank)
        torch.testing.assert_close(up_k @ down, k, rtol=0, atol=1e-8)
        torch.testing.assert_close(up_v @ down, v, rtol=0, atol=1e-8)


def test_a_moment_of_zeros_says_nothing():
    k, v = weights()
    for plain, given in zip(
        factorize_kv(k, v, 5), factorize_kv(k, v, 5, torch.zeros(SIZE, SIZE)), strict=True
    ):
        torch.testing.assert_close(given, plain, rtol=0, atol=0)


@pytest.mark.parametrize("seen", [1, 2, 5])
def test_frames_of_few_directions_need_as_few_numbers(rng, seen):
    """A singular moment: what the data takes is exact, and what is left of the rank is used."""
    k, v = weights()
    x = torch.randn(seen, SIZE, dtype=torch.float64, generator=rng)
    m = x.T @ x
    down, up_k, _ = factorize_kv(k, v, seen, m)
    # directions never seen weigh 1e-12 of the largest: what they may cost shows at its root
    torch.testing.assert_close(x @ down.T @ up_k.T, x @ k.T, rtol=1e-4, atol=1e-4)
    identity = torch.eye(SIZE, dtype=torch.float64)
    wider = [error(k, v, rank, m, identity) for rank in range(seen, SIZE + 1)]
    assert wider[-1] < 1e-16 and all(b < a for a, b in pairwise(wider))


@pytest.mark.parametrize("condition", [1e6, 1e12, 1e18, 1e30])
def test_an_ill_conditioned_moment_blows_nothing_up(rng, condition):
    k, v = weights()
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=rng)).Q
    m = (turn * torch.logspace(0, -np.log10(condition), SIZE, dtype=torch.float64)) @ turn.T
    for rank in RANKS:
        parts = factorize_kv(k, v, rank, m)
        whole = torch.cat([k, v])
        # an orthogonal projection of W: no larger than W itself
        assert torch.cat(parts[1:]).matmul(parts[0]).norm() <= whole.norm() * (1 + 1e-9)
        assert error(k, v, rank, m, m) <= error(k, v, rank, None, m) + 1e-11 * float(m.trace())


def test_single_precision_comes_back_as_it_came(rng):
    k, v = (w.float() for w in weights())
    m = moment(rng)
    parts = factorize_kv(k, v, 5, m.float())
    assert {part.dtype for part in parts} == {torch.float32}
    for part, exact in zip(parts, factorize_kv(k.double(), v.double(), 5, m), strict=True):
        torch.testing.assert_close(part.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_same_comes_out_every_time(rng):
    k, v = weights()
    m = moment(rng)
    for first, second in zip(factorize_kv(k, v, 5, m), factorize_kv(k, v, 5, m), strict=True):
        assert torch.equal(first, second)
