"""Low-rank approximation of several linear maps by one shared latent, each in its own norm.

Shape letters: N maps, n their outputs, D their inputs, r rank.
"""

import torch
from torch import Tensor

from espnet_kv.convert.linalg import left_vectors, symmetric_root

# L-BFGS iterations; the start, the solution for one common norm, is already close to the optimum
STEPS = 50
# regularisation of inverted matrices: relative to their diagonal, and the smallest diagonal
RIDGE, TINY = 1e-10, 1e-100


def common_rows(maps: Tensor, moments: Tensor) -> Tensor:
    """Input directions in descending order of importance, by SVD with the mean moment.

    Args:
        maps: (N, n, D).
        moments: (N, D, D), second moments of the inputs of each map.

    Returns:
        (D, D), rows orthonormal with respect to the mean moment. The first r rows are the optimal
        latent of rank r if all moments are equal.
    """
    root = symmetric_root(moments.mean(dim=0))
    stacked = maps.flatten(0, 1)
    directions = left_vectors(stacked @ root, stacked.size(1)).T @ stacked
    sizes = (directions @ root).norm(dim=1, keepdim=True)
    return directions / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)


def best_rows(maps: Tensor, moments: Tensor, rank: int) -> Tensor:
    """(r, D) P that minimises sum_n min_U E |(maps_n - U P) x|^2, x of second moment moments_n.

    The minimum is local: L-BFGS over P starts at the solution for the mean moment (`common_rows`).
    The optimal U and the gradient have closed forms, so that no data are needed.
    """
    start = common_rows(maps, moments)[:rank]
    weighted = maps @ moments  # (N, n, D)
    total = (weighted * maps).sum()
    if total <= TINY:
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
    def error_and_gradient() -> Tensor:
        weighted_rows = rows @ moments  # (N, r, D)
        gram = weighted_rows @ rows.T
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=TINY)
        gram = gram + ridge[:, None, None] * torch.eye(rank, dtype=rows.dtype, device=rows.device)
        cross = weighted @ rows.T  # (N, n, r)
        ups = torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
        residual = weighted - ups @ weighted_rows
        rows.grad = -2 * (ups.transpose(1, 2) @ residual).sum(dim=0) / total
        return 1 - (ups * (2 * cross - ups @ gram)).sum() / total

    before = error_and_gradient()
    optimizer.step(error_and_gradient)
    return rows.detach() if error_and_gradient() < before else start


def best_ups(maps: Tensor, roots: Tensor, rows: Tensor) -> Tensor:
    """(N, n, r) U that minimises E |(maps_n - U_n rows) x|^2, x of second moment roots_n^2."""
    return maps @ roots @ torch.linalg.pinv(rows @ roots)


def error_by_rank(maps: Tensor, moments: Tensor) -> Tensor:
    """(D + 1,): sum_n min_U E |(maps_n - U P_r) x|^2 with P_r the first r of `common_rows`."""
    roots = symmetric_root(moments)
    weighted = maps @ roots
    basis = torch.linalg.qr((common_rows(maps, moments) @ roots).transpose(1, 2)).Q
    explained = (weighted @ basis).square().sum(dim=(0, 1))  # (D,)
    return torch.cat([explained.flip(0).cumsum(0).flip(0), explained.new_zeros(1)])
