"""From Ritz values and residuals to intervals of singular values, for one matrix or (leading dimensions) for many.

All tensors are small (the size of a block) and float64, and no branch depends on a value, so that GPUs needn't wait.
"""

import torch
from torch import Tensor

# unit roundoff of float64
EPS = torch.finfo(torch.float64).eps / 2
# margin for the distance between a Ritz value and its eigenvalue, in residual norms; larger for sigma_max, where one
# vector separates a cluster less well than a block
RESIDUALS_LOW, RESIDUALS_HIGH = 2.0, 4.0
# error of Ritz values of a factor made with unit roundoff u, in units of u times the largest of them
RITZ_ROUNDINGS = 16


def largest_singular_value(value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of sigma_max from the largest Ritz value of A^T A, (...), and the norm of its residual, (...)."""
    return value.sqrt() * (1 - 4 * EPS), (value + RESIDUALS_HIGH * residual).sqrt() * (1 + 4 * EPS)


def eigenvalues_below(values: Tensor, residuals: Tensor, shrinks: Tensor, eps: float) -> Tensor:
    """Lower bounds on the j smallest eigenvalues of A^T A, smallest first, (..., j); 0 where nothing is known.

    Args:
        values, residuals: (..., j), the largest Ritz values of the inverse of a factored matrix M, largest first, and
            the norms of their residuals.
        shrinks: (..., j): eigenvalue i + 1 of A^T A >= shrinks[i] * eigenvalue i + 1 of M, from M's error with its i
            lowest vectors projected out; 0 if unknown. shrinks[0] holds for all of them.
        eps: machine epsilon of M's precision.
    """
    shared = shrinks[..., :1] / (values + residuals)
    # M^-1 in the basis of its first i Ritz vectors and the rest: their coupling moves the rest's largest eigenvalue by
    # at most the squared coupling over the gap
    gaps = (values[..., None] - values[..., None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    coupling = torch.triu(residuals.square()[..., None] / gaps, diagonal=1).sum(-2)
    rest = values + residuals + coupling + RITZ_ROUNDINGS * eps * values[..., :1]
    return torch.maximum(shared, shrinks / rest)


def lowest_eigenvalue(theta: Tensor, residual_gram: Tensor, below: Tensor, hidden: Tensor, floor: Tensor) -> Tensor:
    """Lower bound on the smallest eigenvalue of A^T A, (...); 0 where nothing is known.

    Args:
        theta: (..., j), Ritz values of A^T A, smallest first.
        residual_gram: (..., j, j), R^T R of their residuals R, which are orthogonal to their vectors.
        below: (..., j + 1), as `eigenvalues_below` returns it.
        hidden: (...), relative residual of the factored matrix's lowest Ritz value, a margin for clusters that the
            Krylov space hasn't separated yet.
        floor: (...), rounding error of a residual.
    """
    lowest = theta[..., 0]
    norm = residual_gram[..., 0, 0].clamp_min(0).sqrt()
    near = torch.where(below[..., 0] > 0, lowest - RESIDUALS_LOW * (norm + floor), 0.0)
    bound = torch.maximum(near, below[..., 0])
    # (R + D)^T (R + D) <= (1 + c) R^T R + (1 + 1 / c) ||D||^2, here with c = 0.1
    identity = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    residual_gram = 1.1 * residual_gram + 11 * floor.square()[..., None, None] * identity
    for count in range(1, theta.shape[-1] + 1):
        beta = below[..., count]
        found = _lehmann(theta[..., :count], residual_gram[..., :count, :count], beta)
        bound = torch.where(beta > theta[..., count - 1], torch.maximum(bound, found), bound)
    return (torch.minimum(bound, lowest) * (1 - RESIDUALS_LOW * hidden)).clamp_min(0)


def _lehmann(theta: Tensor, residual_gram: Tensor, beta: Tensor) -> Tensor:
    """Lehmann's lower bound on the smallest eigenvalue, (...), given that eigenvalue j + 1 >= `beta` > theta.

    Parlett, The Symmetric Eigenvalue Problem, ch. 10; -inf where rounding spoils it.
    """
    shifted = torch.diag_embed(theta - beta[..., None])
    squared = shifted @ shifted + residual_gram
    scale = squared.diagonal(dim1=-2, dim2=-1).rsqrt()[..., None]
    lower, info = torch.linalg.cholesky_ex(squared * scale * scale.mT)
    half = torch.linalg.solve_triangular(lower, shifted * scale * scale.mT, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    usable = (info == 0) & inner.isfinite().all(-1).all(-1)
    inner = torch.where(usable[..., None, None], inner, torch.zeros_like(inner))
    largest = torch.linalg.eigvalsh((inner + inner.mT) / 2)[..., -1]
    return torch.where(usable & (largest < 0), beta + 1 / largest, -torch.inf)
