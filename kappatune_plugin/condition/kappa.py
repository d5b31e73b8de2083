"""The result type Kappa, its constructors, and the checks and scaling that every way to measure shares."""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from kappatune_plugin.errors import KappaTuneError

STATUSES = ("ok", "zero", "rank_deficient", "nonfinite")
# of each element size, to read the bits of values
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# rows whose bits are held as integers of 64 bits at a time
SEEDED_ROWS = 512
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# larger bounds aren't reported as "kappa is above this": such a matrix might be rank-deficient, a status of its own
LARGEST_BOUND = 1e6


@dataclass(frozen=True)
class Kappa:
    """The condition number of one matrix W, and other numbers from its singular values sigma_1 >= ... >= sigma_n.

    Attributes:
        value: kappa; inf for "zero" and "rank_deficient".
        lo, hi: interval that holds the exact kappa. hi is inf where value is; lo is finite for "rank_deficient" (kappa
            is at least that) and inf for "zero".
        sigma_max, sigma_min: largest and smallest singular value, in the units of W.
        log_volume: sum of log sigma_i; -inf for "zero" and "rank_deficient".
        frobenius: ||W||_F.
        stable_rank: ||W||_F^2 / sigma_max^2, between 1 and min(m, n); nan for "zero".
        method: how it was measured: "lu32", "lu64", "gram32", "gram64" (a factor and its precision), "eig64" (all
            eigenvalues of W^T W) or "svd64", with " bound" appended if only a lower bound is known; "none" if no
            singular values were needed.
        status: "ok"; "zero"; "rank_deficient" if sigma_min can't be told from 0 in float64; "nonfinite" if W holds NaN
            or infinity (all numbers are nan then).
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


def check_input(caller: str, w: Tensor, ndim: int, rtol: float) -> None:
    """Raise KappaTuneError unless `w` is a non-empty floating-point tensor of `ndim` dimensions and 0 < `rtol` < 1."""
    if not isinstance(w, Tensor):
        raise KappaTuneError(f"{caller} needs a tensor, found {type(w).__name__}: write torch.as_tensor(w).")
    if w.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise KappaTuneError(f"{caller} needs one of {names}, found {w.dtype}: dequantize or convert it first.")
    if w.ndim != ndim or 0 in w.shape[-2:]:
        advice = "take one matrix, w[i], or w.reshape(rows, columns)." if ndim == 2 else "stack equal shapes."
        what = "2-D matrix" if ndim == 2 else "(b, m, n) stack of matrices"
        raise KappaTuneError(f"{caller} needs a {what} with values, found shape {tuple(w.shape)}: {advice}")
    if w.is_meta:
        raise KappaTuneError(f"{caller} needs values, found a tensor on the meta device: load the weights first.")
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
        raise KappaTuneError(f"rtol: {rtol!r} is not a number between 0 and 1, such as 0.001.")


def without_singular_values(peak: float) -> Kappa | None:
    """The result for a matrix that isn't finite or is all zeros, by its largest magnitude; None for any other."""
    if not math.isfinite(peak):
        return Kappa(*[math.nan] * 8, method="none", status="nonfinite")
    if peak == 0:
        return Kappa(*[math.inf] * 3, 0.0, 0.0, -math.inf, 0.0, math.nan, method="none", status="zero")
    return None


def only_bounded(bound: float, frobenius: float, exponent: int, method: str) -> Kappa:
    """Result when only kappa > bound is known. The matrix is A scaled by 2^exponent; `frobenius` is A's."""
    return Kappa(
        value=bound,
        lo=bound,
        hi=math.inf,
        sigma_max=math.nan,
        sigma_min=math.nan,
        log_volume=math.nan,
        frobenius=times_power_of_two(frobenius, exponent),
        stable_rank=math.nan,
        method=f"{method} bound",
        status="ok",
    )


def settled(
    interval: tuple[float, float],
    sigma: tuple[float, float],
    log_volume: float,
    frobenius: float,
    columns: int,
    exponent: int,
    method: str,
) -> Kappa:
    """Result when kappa is known to lie in `interval`. The matrix is A scaled by 2^exponent; `sigma` (largest and
    smallest), `log_volume` and `frobenius` are A's."""
    largest, smallest = sigma
    return Kappa(
        value=largest / smallest,
        lo=interval[0],
        hi=interval[1],
        sigma_max=times_power_of_two(largest, exponent),
        sigma_min=times_power_of_two(smallest, exponent),
        log_volume=log_volume + columns * exponent * math.log(2),
        frobenius=times_power_of_two(frobenius, exponent),
        stable_rank=(frobenius / largest) ** 2,
        method=method,
        status="ok",
    )


def random_numbers(w: Tensor, rtol: float) -> torch.Generator:
    """A generator on the CPU, seeded by the values of `w`, (m, n), and `rtol`, for its Krylov spaces' start vectors.

    The same weights start alike on any device; nobody can make a matrix whose singular vectors hide from its own. A
    narrower interval starts elsewhere, so that it is a second look too.

    The seed is a sum of all values' bits, each times odd numbers of its row and column, and of those of `rtol`, modulo
    2^64.
    """
    odd = torch.randint(2**62, (sum(w.shape),), generator=torch.Generator().manual_seed(0)).to(w.device) * 2 + 1
    rows, columns = odd.split(list(w.shape))
    (total,) = struct.unpack("q", struct.pack("d", rtol))
    for part, its in zip(w.split(SEEDED_ROWS), rows.split(SEEDED_ROWS), strict=True):
        bits = part.view(INTEGERS[w.element_size()]).long()
        total += int(((bits * columns).sum(1) * its).sum())
    return torch.Generator().manual_seed(total % 2**63)


def scaled(w: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """w * 2^-exponent in `dtype`, exact unless `dtype` is narrower than w's; no copy if there is nothing to do."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    if exponent == 0:
        return wide.to(dtype)
    # in two steps: for denormals the whole factor would overflow
    half = exponent // 2
    wide = wide * 2.0**-half
    return wide.mul_(2.0 ** (half - exponent)).to(dtype)


def times_power_of_two(value: float, exponent: int) -> float:
    """value * 2^exponent; inf on overflow."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
