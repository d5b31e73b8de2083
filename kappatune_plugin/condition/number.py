"""Condition numbers of weight matrices: a tensor in, kappa with an interval around it out.

kappa = sigma_max / sigma_min, over the min(m, n) singular values of an (m, n) matrix.
"""

import math

import torch
from torch import Tensor

from kappatune_plugin.condition.by_factors import FLOAT32_RTOL, by_factors
from kappatune_plugin.condition.exact import from_eigenvalues, from_svd
from kappatune_plugin.condition.kappa import Kappa, check_input, without_singular_values

# values below 2^20 can be squared and summed in float32, and those of a matrix whose largest is above 2^-20
LARGEST_EXPONENT = 20
# up to this many columns all eigenvalues of A^T A are had as fast as a factor with its iterations
EIGEN_COLUMNS = 384


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
        from kappatune_plugin.condition.batched import condition_numbers

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
