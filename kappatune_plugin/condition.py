"""Condition numbers of weight matrices: a tensor in, kappa with an interval around it out.

kappa = sigma_max / sigma_min, over the min(m, n) singular values of an (m, n) matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kappatune_plugin.errors import KappaTuneError

STATUSES = ("ok", "zero", "rank_deficient", "nonfinite")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# medians of the Tracy-Widom law (real case) and of sqrt(n) * sigma_min of an n x n Gaussian matrix (Edelman 1988)
TRACY_WIDOM_MEDIAN = -1.2686
EDELMAN_MEDIAN = math.sqrt(1 + 2 * math.log(2)) - 1


@dataclass(frozen=True)
class Kappa:
    """Condition number of one matrix W, with what its singular values sigma_1 >= ... >= sigma_n also tell.

    Attributes:
        value: kappa; inf for "zero" and "rank_deficient".
        lo, hi: the exact kappa of the stored values lies between them; hi is inf where value is, lo is finite for
            "rank_deficient" (at least this large) and inf for "zero".
        sigma_max, sigma_min: largest and smallest singular value, in the units of W.
        log_volume: sum of log sigma_i; -inf for "zero" and "rank_deficient".
        frobenius: ||W||_F.
        stable_rank: ||W||_F^2 / sigma_max^2, between 1 and min(m, n); nan for "zero".
        method: "svd32" or "svd64", the precision that settled it; "none" if no singular values were needed.
        status: "ok"; "zero"; "rank_deficient" where sigma_min can't be told from 0 in float64; or "nonfinite" where W
            holds NaN or infinity. Every number of a "nonfinite" matrix is nan.
    """

    value: float
    lo: float
    hi: float
    sigma_max: float
    sigma_min: float
    log_volume: float
    frobenius: float
    stable_rank: float
    method: str
    status: str


@torch.no_grad()
def condition_number(w: Tensor, rtol: float = 1e-3) -> Kappa:
    """The condition number of `w`, (m, n), float64, float32, bfloat16 or float16 on any device; any scale.

    Singular values come from a float32 SVD, and from a float64 one where the interval is wider than `rtol`. The
    interval rests on the backward stability of the SVD (LAPACK Users' Guide, 3rd ed., section 4.9.1): every computed
    singular value is within p(m, n) * eps * sigma_max of the exact one, p "a modestly growing function". Here
    p(m, n) = min(sqrt(m) + sqrt(n), max(m, n)): rounding errors grow like the root of the dimension (Higham and Mary,
    SIAM J. Sci. Comput. 41, 2019), and the root also covers the rounding of float64 input to float32.

    Args:
        rtol: width of [lo, hi] relative to kappa that is good enough, between 0 and 1. float64's interval is what it
            is, even if wider.

    Raises:
        KappaTuneError: not a 2-D floating-point matrix with values, or `rtol` out of range.
    """
    _check_input(w, rtol)
    if w.device.type == "mps":
        # Apple's GPUs have no float64
        w = w.cpu()
    low, high = (value.item() for value in torch.aminmax(w))
    peak = max(-low, high)
    if not math.isfinite(peak):
        return Kappa(*[math.nan] * 8, method="none", status="nonfinite")
    if peak == 0:
        return Kappa(*[math.inf] * 3, 0.0, 0.0, -math.inf, 0.0, math.nan, method="none", status="zero")
    exponent = math.frexp(peak)[1]
    tall = w if w.shape[0] >= w.shape[1] else w.mT
    kappa = _from_svd(tall, exponent, torch.float32)
    if kappa.hi - kappa.lo <= rtol * kappa.value < math.inf:
        return kappa
    return _from_svd(tall, exponent, torch.float64)


def null_condition(m: int, n: int) -> float:
    """The median condition number of an (m, n) matrix of independent Gaussian values, m, n >= 1.

    kappa mostly reflects shape; kappa / null_condition(m, n) is what training left of it. Rectangular shapes come to
    the edges of the Marchenko-Pastur law, (1 + sqrt(b)) / (1 - sqrt(b)) with b = min / max, square ones to 3.67 n
    (Edelman, SIAM J. Matrix Anal. Appl. 9, 1988). In between and for small shapes, the edges move inwards by the
    median of the Tracy-Widom law: Johnstone, Ann. Statist. 29, 2001 (sigma_max); Feldheim and Sodin, Geom. Funct.
    Anal. 20, 2010 (sigma_min). The last term joins this to Edelman's law; its factor of m - n is fitted to
    simulations. Within 15% from 8 x 8 to 4096 x 4096, as the tests check.

    Raises:
        KappaTuneError: m or n below 1.
    """
    if min(m, n) < 1:
        raise KappaTuneError(f"null_condition: {m} x {n} is no matrix shape: both sides are at least 1.")
    short, long = math.sqrt(min(m, n)), math.sqrt(max(m, n))
    if short == 1:
        return 1.0
    shift, gap = -TRACY_WIDOM_MEDIAN, long - short
    largest = (long + short) ** 2 - shift * (long + short) * (1 / short + 1 / long) ** (1 / 3)
    smallest = gap**2 + shift * gap * (1 / short - 1 / long) ** (1 / 3)
    smallest += (EDELMAN_MEDIAN**2 + 0.21 * abs(m - n)) / min(m, n)
    return math.sqrt(largest / smallest)


def _check_input(w: Tensor, rtol: float) -> None:
    if not isinstance(w, Tensor):
        raise KappaTuneError(f"condition_number needs a tensor, found {type(w).__name__}: write torch.as_tensor(w).")
    if w.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise KappaTuneError(f"condition_number needs one of {names}, found {w.dtype}: dequantize or convert it first.")
    if w.ndim != 2 or w.numel() == 0:
        raise KappaTuneError(
            f"condition_number needs a 2-D matrix with values, found shape {tuple(w.shape)}: "
            "take one matrix, w[i], or w.reshape(rows, columns)."
        )
    if w.is_meta:
        raise KappaTuneError(
            "condition_number needs values, found a tensor on the meta device: load the weights first."
        )
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
        raise KappaTuneError(f"rtol: {rtol!r} is not a number between 0 and 1, such as 0.001.")


def _from_svd(tall: Tensor, exponent: int, dtype: torch.dtype) -> Kappa:
    """Kappa of `tall`, (m, n) with m >= n and largest magnitude below 2^exponent, by an SVD in `dtype`."""
    m, n = tall.shape
    scaled = _scaled(tall, exponent, dtype)
    frobenius = torch.linalg.vector_norm(scaled, dtype=torch.float64).item()
    sigma = torch.linalg.svdvals(scaled).double()
    largest, smallest = sigma[0].item(), sigma[-1].item()
    # a vector has one singular value, so its kappa is 1 whatever the rounding
    growth = min(math.sqrt(m) + math.sqrt(n), m) if n > 1 else 0.0
    error = growth * torch.finfo(dtype).eps * largest
    deficient = n > 1 and smallest <= m * torch.finfo(torch.float64).eps * largest
    return Kappa(
        value=math.inf if deficient else largest / smallest,
        lo=max(1.0, (largest - error) / (smallest + error)),
        hi=math.inf if deficient or smallest <= error else (largest + error) / (smallest - error),
        sigma_max=_times_power_of_two(largest, exponent),
        sigma_min=_times_power_of_two(smallest, exponent),
        log_volume=-math.inf if deficient else sigma.log().sum().item() + n * exponent * math.log(2),
        frobenius=_times_power_of_two(frobenius, exponent),
        stable_rank=(sigma / largest).square().sum().item(),
        method="svd32" if dtype == torch.float32 else "svd64",
        status="rank_deficient" if deficient else "ok",
    )


def _scaled(w: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """w * 2^-exponent in `dtype`: values below 1, rounded only where `dtype` is narrower than w's."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    # denormals need a factor that overflows: two halves don't
    half = exponent // 2
    wide = wide * 2.0**-half
    return wide.mul_(2.0 ** (half - exponent)).to(dtype)


def _times_power_of_two(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
