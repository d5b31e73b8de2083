"""Condition numbers by block Lanczos, preconditioned by an LU or Cholesky factor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kappatune_plugin.condition.bracket import BLOCK, at_least, bracket, gaussian
from kappatune_plugin.condition.exact import from_svd
from kappatune_plugin.condition.factor import CholeskyFactor, LUFactor, gram, products, symmetric_product
from kappatune_plugin.condition.kappa import LARGEST_BOUND, Kappa, only_bounded, random_numbers, scaled, settled
from kappatune_plugin.condition.lanczos import block_lanczos
from kappatune_plugin.condition.ritz_bounds import RESIDUALS_HIGH

# a float32 factor's interval is no narrower than about this
FLOAT32_RTOL = 1e-5
# products with A^T A to find its largest eigenvalue: in the factor's precision, and then in float64 if needed
TOP_STEPS, MORE_TOP_STEPS = 80, 160
# enough for a bound
ROUGH_TOP_STEPS = 5
# share of half the interval's width given to sigma_max (its residual counts RESIDUALS_HIGH times in sigma_max^2, half
# of that in sigma_max)
TOP_SHARE = 0.8


def by_factors(tall: Tensor, exponent: int, dtypes: Sequence[torch.dtype], rtol: float, above: float) -> Kappa:
    """Kappa of `tall`, (m, n) with m >= n and largest magnitude below 2^exponent: by a factor in the first of `dtypes`
    that gives an interval of relative width `rtol`, else by a float64 SVD."""
    for dtype in dtypes:
        kappa = _from_factor(tall, exponent, dtype, rtol, above)
        if kappa is not None:
            return kappa
    return from_svd(tall, exponent)


def _from_factor(tall: Tensor, exponent: int, dtype: torch.dtype, rtol: float, above: float) -> Kappa | None:
    """Kappa of `tall`, (m, n) with m >= n, by a factor in `dtype`; None if its interval is wider than `rtol`."""
    a = scaled(tall, exponent, torch.promote_types(tall.dtype, torch.float32))
    generator = random_numbers(tall, rtol)
    square = a.shape[0] == a.shape[1]
    if square:
        factor, operator = LUFactor.of(a.to(dtype)), lambda v: products(a, v)[1]
    else:
        lower = gram(a, dtype)
        factor, operator = CholeskyFactor.of(lower), lambda v: symmetric_product(lower, v)
    if factor is None:
        return None
    frobenius = _frobenius(a)
    method = f"{'lu' if square else 'gram'}{'32' if dtype == torch.float32 else '64'}"
    start = gaussian(a, BLOCK, dtype, generator)
    if above < LARGEST_BOUND:
        rough = block_lanczos(operator, start, ROUGH_TOP_STEPS, 0.0)
        bound = at_least(a, factor, rough, frobenius, generator) if rough is not None else 1.0
        if above < bound < LARGEST_BOUND:
            return only_bounded(bound, frobenius, exponent, method)
    tolerance = TOP_SHARE * rtol / RESIDUALS_HIGH
    top = block_lanczos(operator, start, TOP_STEPS, tolerance)
    if top is None or top.relative_residual > tolerance:
        top = block_lanczos(lambda v: products(a, v)[1], start.double(), MORE_TOP_STEPS, tolerance)
    found = bracket(a, factor, top, frobenius, rtol / 2, generator) if top is not None else None
    if found is None or not found.narrower_than(rtol):
        return None
    # norms of products with Ritz vectors are far nearer to the exact values than the interval's width says
    sigma = found.sigma_max[0], found.sigma_min[1]
    return settled(found.kappa, sigma, factor.log_volume(), frobenius, a.shape[1], exponent, method)


def _frobenius(a: Tensor) -> float:
    """||A||_F: norms of lines in A's own precision, then summed in float64, since all of it in float64 is slow."""
    lines = a if a.is_contiguous() else a.mT
    return torch.linalg.vector_norm(torch.linalg.vector_norm(lines, dim=1).double()).item()
