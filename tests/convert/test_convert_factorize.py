"""factorize_kv against numpy and brute force, and with ill-conditioned moments."""

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


def error(k, v, rank, second_moment, evaluated_on) -> float:
    """E |(W - up down) x|^2 for x of second moment `evaluated_on`, by the plain formula."""
    down, up_k, up_v = factorize_kv(k, v, rank, second_moment)
    lost = torch.cat([k - up_k @ down, v - up_v @ down])
    return float(torch.einsum("oi,ij,oj->", lost, evaluated_on, lost))


@pytest.mark.parametrize("rank", RANKS)
def test_without_a_moment_the_error_is_that_of_numpys_svd(rank):
    k, v = weights()
    singular = np.linalg.svd(np.concatenate([k.numpy(), v.numpy()]), compute_uv=False)
    identity = torch.eye(SIZE, dtype=torch.float64)
    for given in (None, identity):
        np.testing.assert_allclose(
            error(k, v, rank, given, identity), (singular[rank:] ** 2).sum(), atol=1e-12
        )


@pytest.mark.parametrize("rank", RANKS)
def test_the_result_equals_the_whitened_svd(rng, rank):
    """The textbook solution, with an inverse: W S = A s B', up = A s, down = B' S^-1."""
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
    """On the frames of the fit by construction, and in this case on other frames too."""
    k, v = weights()
    source = Source(rng)
    fitted, held_out = source.frames(1, 400)[0], source.frames(1, 400)[0]
    m, other = fitted.T @ fitted / 400, held_out.T @ held_out / 400
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


def test_a_moment_of_zeros_is_ignored():
    k, v = weights()
    for plain, given in zip(
        factorize_kv(k, v, 5), factorize_kv(k, v, 5, torch.zeros(SIZE, SIZE)), strict=True
    ):
        torch.testing.assert_close(given, plain, rtol=0, atol=0)


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_frames_of_n_directions_need_rank_n(rng, directions):
    """Singular moment: directions with data are exact, and remaining rank is used for others."""
    k, v = weights()
    x = torch.randn(directions, SIZE, dtype=torch.float64, generator=rng)
    m = x.T @ x
    down, up_k, _ = factorize_kv(k, v, directions, m)
    # other directions have weight 1e-12 of the largest, so the error is of the order of its root
    torch.testing.assert_close(x @ down.T @ up_k.T, x @ k.T, rtol=1e-4, atol=1e-4)
    identity = torch.eye(SIZE, dtype=torch.float64)
    wider = [error(k, v, rank, m, identity) for rank in range(directions, SIZE + 1)]
    assert wider[-1] < 1e-16 and all(b < a for a, b in pairwise(wider))


@pytest.mark.parametrize("condition", [1e6, 1e12, 1e18, 1e30])
def test_an_ill_conditioned_moment_gives_no_large_weights(rng, condition):
    k, v = weights()
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=rng)).Q
    m = (turn * torch.logspace(0, -np.log10(condition), SIZE, dtype=torch.float64)) @ turn.T
    for rank in RANKS:
        parts = factorize_kv(k, v, rank, m)
        whole = torch.cat([k, v])
        # an orthogonal projection of W: no larger than W itself
        assert torch.cat(parts[1:]).matmul(parts[0]).norm() <= whole.norm() * (1 + 1e-9)
        assert error(k, v, rank, m, m) <= error(k, v, rank, None, m) + 1e-11 * float(m.trace())


def test_single_precision_is_kept(rng):
    k, v = (w.float() for w in weights())
    m = moment(rng)
    parts = factorize_kv(k, v, 5, m.float())
    assert {part.dtype for part in parts} == {torch.float32}
    for part, exact in zip(parts, factorize_kv(k.double(), v.double(), 5, m), strict=True):
        torch.testing.assert_close(part.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_result_is_deterministic(rng):
    k, v = weights()
    m = moment(rng)
    for first, second in zip(factorize_kv(k, v, 5, m), factorize_kv(k, v, 5, m), strict=True):
        assert torch.equal(first, second)
