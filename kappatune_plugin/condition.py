"""Condition numbers of weight matrices: a tensor in, kappa with an interval around it out.

kappa = sigma_max / sigma_min, over the min(m, n) singular values of an (m, n) matrix.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kappatune_plugin.bracket import BLOCK, at_least, bracket, gaussian, proven
from kappatune_plugin.factor import CholeskyFactor, LUFactor, gram, products, symmetric_product
from kappatune_plugin.interval import RESIDUALS_HIGH
from kappatune_plugin.kappa import (
    LARGEST_BOUND,
    STATUSES,
    Kappa,
    check_input,
    from_eigenvalues,
    from_svd,
    only_bounded,
    scaled,
    settled,
    without_singular_values,
)
from kappatune_plugin.lanczos import block_lanczos

__all__ = ["STATUSES", "Kappa", "condition_number"]

# values below 2^20 can be squared and summed in float32, and those of a matrix whose largest is above 2^-20
LARGEST_EXPONENT = 20
# up to this many columns all eigenvalues of A^T A are had as fast as a factor with its iterations
EIGEN_COLUMNS = 384
# a float32 factor's interval is no narrower than about this
FLOAT32_RTOL = 1e-5
# products with A^T A until its largest eigenvalue is known: with a float32 factor, and where that wasn't enough
TOP_STEPS, MORE_TOP_STEPS = 80, 160
# enough for a bound
ROUGH_TOP_STEPS = 5
# sigma_max gets this part of half the interval (its residual counts RESIDUALS_HIGH times in sigma_max^2, so half of
# that in sigma_max)
TOP_SHARE = 0.8


@torch.no_grad()
def condition_number(w: Tensor, rtol: float = 1e-3, above: float = math.inf, proof: bool = False) -> Kappa:
    """The condition number of `w`, (m, n), float64, float32, bfloat16 or float16 on any device; any scale.

    No SVD where a triangular factor does: LU for square matrices, A^T A = L L^T for others, in float32. Lanczos with
    the factor finds the extreme singular values, products with `w` itself in float64 put an interval around them (see
    `bracket`). Where that is wider than `rtol`, the factor is made in float64, and then a float64 SVD.

    Args:
        rtol: width of [lo, hi] relative to kappa that is good enough, between 0 and 1. A float64 SVD's interval is
            what it is, even if wider.
        above: stop as soon as kappa is certainly above this. `lo` and `value` then say how far that is certain, `hi`
            is inf, and so is the number of what isn't known: nan. For ranking, where only the lowest matter.
        proof: let Sylvester's law of inertia check the interval (half the time again), and take the SVD if it can't.

    Raises:
        KappaTuneError: not a 2-D floating-point matrix with values, or `rtol` out of range.
    """
    check_input("condition_number", w, 2, rtol)
    if w.device.type == "mps":
        # Apple's GPUs have no float64
        w = w.cpu()
    if w.device.type == "cuda":
        # imported here because it comes back here with what it can't settle
        from kappatune_plugin.batched import condition_numbers

        return condition_numbers(w[None], rtol, above, proof)[0]
    low, high = (value.item() for value in torch.aminmax(w))
    peak = max(-low, high)
    known = without_singular_values(peak)
    if known is not None:
        return known
    exponent = math.frexp(peak)[1]
    if abs(exponent) <= LARGEST_EXPONENT:
        exponent = 0
    tall = w if w.shape[0] > w.shape[1] else w.mT
    if min(w.shape) > EIGEN_COLUMNS:
        dtypes = (torch.float32, torch.float64) if rtol >= FLOAT32_RTOL else (torch.float64,)
        return by_factors(tall, exponent, dtypes, rtol, above, proof)
    kappa = None if proof else from_eigenvalues(tall, exponent, rtol)
    return kappa or from_svd(tall, exponent)


def by_factors(
    tall: Tensor, exponent: int, dtypes: Sequence[torch.dtype], rtol: float, above: float, proof: bool
) -> Kappa:
    """Kappa of `tall`, (m, n) with m >= n and largest magnitude below 2^exponent: by a factor in the first of `dtypes`
    whose interval is as narrow as `rtol`, else by a float64 SVD."""
    for dtype in dtypes:
        kappa = _from_factor(tall, exponent, dtype, rtol, above, proof)
        if kappa is not None:
            return kappa
    return from_svd(tall, exponent)


def _from_factor(
    tall: Tensor, exponent: int, dtype: torch.dtype, rtol: float, above: float, proof: bool
) -> Kappa | None:
    """Kappa of `tall`, (m, n) with m >= n, by a factor in `dtype`; None if its interval is wider than `rtol`."""
    a = scaled(tall, exponent, torch.promote_types(tall.dtype, torch.float32))
    # the same start vectors for every matrix and device: the same weights give the same report
    generator = torch.Generator().manual_seed(0)
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
    if found is not None and proof:
        found = proven(a, found)
    if found is None or not found.narrower_than(rtol):
        return None
    # products with Ritz vectors are far nearer than the interval says
    sigma = found.sigma_max[0], found.sigma_min[1]
    method += " proven" * proof
    return settled(found.kappa, sigma, factor.log_volume(), frobenius, a.shape[1], exponent, method)


def _frobenius(a: Tensor) -> float:
    """||A||_F: float64 from lines of A in its own precision, of which the sum in float64 is slow."""
    lines = a if a.is_contiguous() else a.mT
    return torch.linalg.vector_norm(torch.linalg.vector_norm(lines, dim=1).double()).item()
