"""The latent that serves several maps at once, each with a norm of its own.

Shape letters: N maps, n their outputs, D their inputs, r rank.
"""

import torch
from torch import Tensor

from espnet_kv.convert.linalg import left_vectors, symmetric_root

# of the search; the latent of one common norm, where it starts, is most of the way
STEPS = 100
# added to what is inverted, relative to its size; and where that is nothing
RIDGE, TINY = 1e-10, 1e-100


def common_rows(maps: Tensor, moments: Tensor) -> Tensor:
    """(D, D): directions of the inputs, the most useful first, by SVD in the mean of the norms.

    Args:
        maps: (N, n, D).
        moments: (N, D, D), of the inputs of each map.

    Returns:
        Rows that are orthonormal in the mean moment; their first r are the best latent of r
        numbers, were that the moment of all.
    """
    root = symmetric_root(moments.mean(dim=0))
    stacked = maps.flatten(0, 1)
    directions = left_vectors(stacked @ root, stacked.size(1)).T @ stacked
    sizes = (directions @ root).norm(dim=1, keepdim=True)
    return directions / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)


def best_rows(maps: Tensor, moments: Tensor, rank: int) -> Tensor:
    """(r, D) P for which sum_n min_U E |(maps_n - U P) x|^2, x of moments_n, is small.

    One SVD solves this for one common moment (`common_rows`). From there on L-BFGS, on P alone:
    the best U are known in closed form, and so is the gradient. No data is touched.
    """
    start = common_rows(maps, moments)[:rank]
    reached = maps @ moments  # (N, n, D)
    whole = (reached * maps).sum()
    if whole <= TINY:
        return start
    rows = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [rows],
        max_iter=STEPS,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def lost_and_gradient() -> Tensor:
        seen = rows @ moments  # (N, r, D)
        gram = seen @ rows.T
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=TINY)
        gram = gram + ridge[:, None, None] * torch.eye(rank, dtype=rows.dtype, device=rows.device)
        crossed = reached @ rows.T  # (N, n, r)
        ups = torch.linalg.solve(gram, crossed.transpose(1, 2)).transpose(1, 2)
        rest = reached - ups @ seen
        rows.grad = -2 * (ups.transpose(1, 2) @ rest).sum(dim=0) / whole
        return 1 - (ups * (2 * crossed - ups @ gram)).sum() / whole

    before = lost_and_gradient()
    optimizer.step(lost_and_gradient)
    return rows.detach() if lost_and_gradient() < before else start


def best_ups(maps: Tensor, roots: Tensor, rows: Tensor) -> Tensor:
    """(N, n, r) U for which E |(maps_n - U_n rows) x|^2 is least, x of moment roots_n^2."""
    return maps @ roots @ torch.linalg.pinv(rows @ roots)


def lost_by_rank(maps: Tensor, moments: Tensor) -> Tensor:
    """(D + 1,): sum_n min_U E |(maps_n - U P_r) x|^2 with P_r the first r of `common_rows`."""
    roots = symmetric_root(moments)
    weighted = maps @ roots
    basis = torch.linalg.qr((common_rows(maps, moments) @ roots).transpose(1, 2)).Q
    gained = (weighted @ basis).square().sum(dim=(0, 1))  # (D,)
    return torch.cat([gained.flip(0).cumsum(0).flip(0), gained.new_zeros(1)])
