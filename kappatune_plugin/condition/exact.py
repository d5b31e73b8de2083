"""Condition numbers from all singular values: by SVD, or by the eigenvalues of the Gram matrix."""

import math

import torch
from torch import Tensor

from kappatune_plugin.condition.kappa import Kappa, scaled, settled, times_power_of_two


def from_eigenvalues(tall: Tensor, exponent: int, rtol: float) -> Kappa | None:
    """Kappa of `tall`, (m, n) with m >= n and largest magnitude below 2^exponent, by the eigenvalues of A^T A in
    float64; None if its interval is wider than `rtol`.

    Faster than an SVD for small matrices, and precise enough for kappa up to about 1e5. An eigenvalue's error is within
    p(n) * eps * ||A^T A|| (LAPACK Users' Guide, 3rd ed., section 4.7.1), the product's within p(m) * eps * ||A||_F^2;
    one p, that of `from_svd`, covers both.
    """
    m, n = tall.shape
    a = scaled(tall, exponent, torch.float64)
    values = torch.linalg.eigvalsh(a.mT @ a)
    squared = torch.linalg.vector_norm(a).item() ** 2
    smallest, largest = values[0].item(), values[-1].item()
    error = _growth(m, n) * torch.finfo(torch.float64).eps * squared
    if smallest <= error:
        return None
    lo, hi = math.sqrt((largest - error) / (smallest + error)), math.sqrt((largest + error) / (smallest - error))
    if hi - lo > rtol * lo:
        return None
    sigma = math.sqrt(largest), math.sqrt(smallest)
    known = values.log().sum().item() / 2, math.sqrt(squared), n, exponent
    return settled((max(1.0, lo), hi), sigma, *known, "eig64")


def from_svd(tall: Tensor, exponent: int) -> Kappa:
    """Kappa of `tall`, (m, n) with m >= n and largest magnitude below 2^exponent, by a float64 SVD.

    The interval rests on its backward stability (LAPACK Users' Guide, 3rd ed., section 4.9.1): every computed singular
    value is within p(m, n) * eps * sigma_max of the exact one, p "a modestly growing function". Here
    p(m, n) = min(sqrt(m) + sqrt(n), max(m, n)): rounding errors grow like the root of the dimension (Higham and Mary,
    SIAM J. Sci. Comput. 41, 2019).
    """
    m, n = tall.shape
    a = scaled(tall, exponent, torch.float64)
    frobenius = torch.linalg.vector_norm(a).item()
    sigma = torch.linalg.svdvals(a)
    largest, smallest = sigma[0].item(), sigma[-1].item()
    eps = torch.finfo(torch.float64).eps
    error = _growth(m, n) * eps * largest
    deficient = n > 1 and smallest <= m * eps * largest
    return Kappa(
        value=math.inf if deficient else largest / smallest,
        lo=max(1.0, (largest - error) / (smallest + error)),
        hi=math.inf if deficient or smallest <= error else (largest + error) / (smallest - error),
        sigma_max=times_power_of_two(largest, exponent),
        sigma_min=times_power_of_two(smallest, exponent),
        log_volume=-math.inf if deficient else sigma.log().sum().item() + n * exponent * math.log(2),
        frobenius=times_power_of_two(frobenius, exponent),
        stable_rank=(frobenius / largest) ** 2,
        method="svd64",
        status="rank_deficient" if deficient else "ok",
    )


def _growth(m: int, n: int) -> float:
    # a vector has one singular value, so its kappa is exactly 1
    return min(math.sqrt(m) + math.sqrt(n), m) if n > 1 else 0.0
