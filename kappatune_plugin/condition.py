"""Condition numbers of weight matrices: a tensor in, kappa with an interval around it out.

kappa = sigma_max / sigma_min, over the min(m, n) singular values of an (m, n) matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kappatune_plugin.bracket import RESIDUALS_HIGH, Bracket, at_least, bracket, gaussian, proven
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.factor import CholeskyFactor, LUFactor, gram, products, symmetric_product
from kappatune_plugin.lanczos import block_lanczos

STATUSES = ("ok", "zero", "rank_deficient", "nonfinite")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# up to this many columns an SVD is faster than a factor with its iterations
SVD_COLUMNS = 256
# a float32 factor's interval is no narrower than about this
FLOAT32_RTOL = 1e-5
# products with A^T A until its largest eigenvalue is known: with a float32 factor, and where that wasn't enough
TOP_STEPS, MORE_TOP_STEPS = 80, 240
# enough for a bound
ROUGH_TOP_STEPS = 5
# sigma_max gets this part of half the interval (its residual counts RESIDUALS_HIGH times in sigma_max^2, so half of
# that in sigma_max)
TOP_SHARE = 0.8
# what is only known to be above a bound gets no status; up to this bound, that is: above, it might be rank-deficient
LARGEST_BOUND = 1e6


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
        method: what settled it: "lu32", "lu64", "gram32", "gram64" (a factor and its precision), "svd32" or "svd64";
            " bound" or " proven" behind it says so; "none" if no singular values were needed.
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
def condition_number(w: Tensor, rtol: float = 1e-3, above: float = math.inf, proof: bool = False) -> Kappa:
    """The condition number of `w`, (m, n), float64, float32, bfloat16 or float16 on any device; any scale.

    No SVD where a triangular factor does: LU for square matrices, A^T A = L L^T for others, in float32. Lanczos with
    the factor finds the extreme singular values, products with `w` itself in float64 put an interval around them (see
    `bracket`). Where that is wider than `rtol`, the factor is made in float64, and then a float64 SVD.

    An SVD's interval rests on its backward stability (LAPACK Users' Guide, 3rd ed., section 4.9.1): every computed
    singular value is within p(m, n) * eps * sigma_max of the exact one, p "a modestly growing function". Here
    p(m, n) = min(sqrt(m) + sqrt(n), max(m, n)): rounding errors grow like the root of the dimension (Higham and Mary,
    SIAM J. Sci. Comput. 41, 2019), and the root also covers the rounding of float64 input to float32.

    Args:
        rtol: width of [lo, hi] relative to kappa that is good enough, between 0 and 1. A float64 SVD's interval is
            what it is, even if wider.
        above: stop as soon as kappa is certainly above this. `lo` and `value` then say how far that is certain, `hi`
            is inf, and so is the number of what isn't known: nan. For ranking, where only the lowest matter.
        proof: let Sylvester's law of inertia check the interval (half the time again), and take the SVD if it can't.

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
    tall = w if w.shape[0] > w.shape[1] else w.mT
    if min(w.shape) > SVD_COLUMNS:
        dtypes = (torch.float32, torch.float64) if rtol >= FLOAT32_RTOL else (torch.float64,)
        for dtype in dtypes:
            kappa = _from_factor(tall, exponent, dtype, rtol, above, proof)
            if kappa is not None:
                return kappa
        return _from_svd(tall, exponent, torch.float64)
    kappa = _from_svd(tall, exponent, torch.float32)
    if kappa.hi - kappa.lo <= rtol * kappa.value < math.inf and not proof:
        return kappa
    return _from_svd(tall, exponent, torch.float64)


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


def _from_factor(
    tall: Tensor, exponent: int, dtype: torch.dtype, rtol: float, above: float, proof: bool
) -> Kappa | None:
    """Kappa of `tall`, (m, n) with m >= n, by a factor in `dtype`; None if its interval is wider than `rtol`."""
    a = _scaled(tall, exponent, torch.promote_types(tall.dtype, torch.float32))
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
    method = f"{'lu' if square else 'gram'}{'32' if dtype == torch.float32 else '64'}"
    start = gaussian(a, 1, dtype, generator)
    if above < LARGEST_BOUND:
        rough = block_lanczos(operator, start, ROUGH_TOP_STEPS, 0.0)
        bound = at_least(a, factor, rough, generator) if rough is not None else 1.0
        if above < bound < LARGEST_BOUND:
            return _only_bounded(a, bound, exponent, f"{method} bound")
    tolerance = TOP_SHARE * rtol / RESIDUALS_HIGH
    top = block_lanczos(operator, start, TOP_STEPS, tolerance)
    if top is None or top.relative_residual > tolerance:
        top = block_lanczos(lambda v: products(a, v)[1], start.double(), MORE_TOP_STEPS, tolerance)
    found = bracket(a, factor, top, rtol / 2, generator) if top is not None else None
    if found is None or not found.kappa[1] - found.kappa[0] <= rtol * found.kappa[0]:
        return None
    if proof and not proven(a, found):
        return None
    return _settled(a, found, factor.log_volume(), exponent, method + " proven" * proof)


def _only_bounded(a: Tensor, bound: float, exponent: int, method: str) -> Kappa:
    frobenius = torch.linalg.vector_norm(a, dtype=torch.float64).item()
    return Kappa(
        value=bound,
        lo=bound,
        hi=math.inf,
        sigma_max=math.nan,
        sigma_min=math.nan,
        log_volume=math.nan,
        frobenius=_times_power_of_two(frobenius, exponent),
        stable_rank=math.nan,
        method=method,
        status="ok",
    )


def _settled(a: Tensor, found: Bracket, log_volume: float, exponent: int, method: str) -> Kappa:
    frobenius = torch.linalg.vector_norm(a, dtype=torch.float64).item()
    # products with Ritz vectors are far nearer than the interval says
    largest, smallest = found.sigma_max[0], found.sigma_min[1]
    return Kappa(
        value=largest / smallest,
        lo=found.kappa[0],
        hi=found.kappa[1],
        sigma_max=_times_power_of_two(largest, exponent),
        sigma_min=_times_power_of_two(smallest, exponent),
        log_volume=log_volume + a.shape[1] * exponent * math.log(2),
        frobenius=_times_power_of_two(frobenius, exponent),
        stable_rank=(frobenius / largest) ** 2,
        method=method,
        status="ok",
    )


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
