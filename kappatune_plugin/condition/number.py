"""The condition number of one matrix: a tensor in, kappa with an interval around it out.

kappa = sigma_max / sigma_min, over the min(m, n) singular values of an (m, n) matrix.
"""

import math

import torch
from torch import Tensor

from kappatune_plugin.condition.batched import condition_numbers
from kappatune_plugin.condition.by_factors import FLOAT32_RTOL, by_factors
from kappatune_plugin.condition.exact import from_eigenvalues, from_svd
from kappatune_plugin.condition.kappa import Kappa, check_input, without_singular_values

# no scaling is needed where the largest magnitude is within 2^-20 ... 2^20: float32 can square and sum such values
LARGEST_EXPONENT = 20
# up to this many columns all eigenvalues of A^T A take no longer than a factor with its iterations
EIGEN_COLUMNS = 384


@torch.no_grad()
def condition_number(w: Tensor, rtol: float = 1e-3, above: float = math.inf) -> Kappa:
    """The condition number of `w`, (m, n), float64, float32, bfloat16 or float16 on any device; any scale.

    An SVD is avoided where a triangular factor is enough: LU for square matrices, A^T A = L L^T for others, in float32.
    Lanczos with the factor finds the extreme singular values; products with `w` itself in float64 put an interval
    around them (see `bracket`). If that is wider than `rtol`, the factor is made in float64; if it still is, a float64
    SVD decides.

    Args:
        rtol: largest width of [lo, hi] relative to kappa, between 0 and 1. A float64 SVD's interval may be wider.
        above: stop as soon as kappa is certainly above this. `lo` and `value` are then the certain lower bound, `hi` is
            inf, and numbers that weren't found out are nan. For ranking, where only the lowest matter.

    Raises:
        KappaTuneError: not a 2-D floating-point matrix with values, or `rtol` out of range.
    """
    check_input("condition_number", w, 2, rtol)
    if w.device.type == "mps":
        # Apple's GPUs have no float64
        w = w.cpu()
    if w.device.type == "cuda":
        return condition_numbers(w[None], rtol, above)[0]
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
        return by_factors(tall, exponent, dtypes, rtol, above)
    return from_eigenvalues(tall, exponent, rtol) or from_svd(tall, exponent)
