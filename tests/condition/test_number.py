"""Condition numbers, against float64 SVDs of the values as they are stored."""

import math

import numpy as np
import pytest
import torch

from helpers.spectra import singular_values, with_spectrum
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError

SHAPES = [(64, 48), (48, 64), (40, 40), (200, 8), (8, 200), (17, 16), (3, 2), (2, 2), (3, 3)]
SPECTRA = {
    "one": lambda n: np.ones(n),
    "clustered": lambda n: np.where(np.arange(n) < n // 2, 1.0, 1.0 + 1e-6),
    "power law": lambda n: 1.0 / np.arange(1, n + 1),
    "outlier": lambda n: np.where(np.arange(n) == 0, 50.0, 1.0),
    "one small": lambda n: np.where(np.arange(n) == n - 1, 1e-4, 1.0),
    **{f"kappa 1e{power}": lambda n, power=power: np.logspace(0, -power, n) for power in range(1, 8)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_interval_holds_the_truth_and_is_narrow(shape, spectrum, dtype):
    w = with_spectrum(*shape, SPECTRA[spectrum](min(shape))).to(dtype)
    sigma = singular_values(w)
    truth = sigma[0] / sigma[-1]
    kappa = condition_number(w)
    assert kappa.status == "ok"
    assert kappa.lo <= truth <= kappa.hi and kappa.lo <= kappa.value <= kappa.hi
    assert kappa.hi - kappa.lo <= 1e-3 * kappa.value


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (256, 256), (1000, 30)])
def test_gaussian(shape):
    w = torch.randn(shape)
    sigma = singular_values(w)
    kappa = condition_number(w)
    assert kappa.lo <= sigma[0] / sigma[-1] <= kappa.hi
    assert kappa.value == pytest.approx(sigma[0] / sigma[-1], rel=1e-4)
    assert kappa.sigma_max == pytest.approx(sigma[0], rel=1e-5) and kappa.sigma_min == pytest.approx(
        sigma[-1], rel=1e-4
    )
    assert kappa.log_volume == pytest.approx(np.log(sigma).sum(), abs=1e-3)
    assert kappa.frobenius == pytest.approx(np.sqrt((sigma**2).sum()), rel=1e-6)
    assert kappa.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-5)


def test_hilbert_matrix_has_the_textbook_value():
    """Higham, Accuracy and Stability of Numerical Algorithms: 4.766e5 for n = 5, 1.526e10 for n = 8."""
    for n, expected in ((5, 4.76607e5), (8, 1.52576e10)):
        grid = torch.arange(n, dtype=torch.float64)
        kappa = condition_number(1 / (grid[:, None] + grid + 1))
        assert kappa.value == pytest.approx(expected, rel=1e-5) and kappa.method == ("eig64" if n == 5 else "svd64")


def test_escalates_only_where_the_interval_asks_for_it():
    easy, hard = with_spectrum(60, 40, np.linspace(1, 2, 40)), with_spectrum(60, 40, np.logspace(0, -7, 40))
    assert condition_number(easy).method == "eig64"
    assert condition_number(hard).method == "svd64"
    assert condition_number(easy, rtol=1e-14).method == "svd64"
    loose = condition_number(hard, rtol=0.9)
    assert loose.method == "eig64" and loose.lo <= 1e7 <= loose.hi
    for power, method in ((1, "gram32"), (5, "gram64"), (8, "svd64")):
        assert condition_number(with_spectrum(520, 450, np.logspace(0, -power, 450))).method == method
    for power, method in ((4, "lu32"), (7, "lu64")):
        assert condition_number(with_spectrum(450, 450, np.logspace(0, -power, 450))).method == method


def test_svd_errors_are_within_the_stated_bound():
    """The interval's premise, for float32 on matrices large enough for rounding errors to add up."""
    for m, n in ((512, 512), (1024, 256), (700, 600)):
        w = torch.randn(m, n) * torch.logspace(0, -3, n)
        error = np.abs(torch.linalg.svdvals(w).double().numpy() - singular_values(w)).max()
        bound = (math.sqrt(m) + math.sqrt(n)) * torch.finfo(torch.float32).eps * singular_values(w)[0]
        assert error < bound / 4


def test_orientation_does_not_matter():
    w = torch.randn(30, 70)
    wide, tall = condition_number(w), condition_number(w.mT.contiguous())
    for name in ("value", "lo", "hi", "log_volume", "frobenius"):
        assert getattr(wide, name) == pytest.approx(getattr(tall, name), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float64, (-1074, -1022, -100, 100, 1019)),
        (torch.float32, (-149, -126, -30, 30, 123)),
        (torch.bfloat16, (-133, -126, -30, 30, 123)),
        (torch.float16, (-24, -14, 5, 11)),
    ],
)
def test_powers_of_two_change_nothing(dtype, exponents):
    """Down to matrices of denormals and up to the largest number; the small integers stay exact."""
    integers = torch.randint(-8, 9, (12, 9)).double()
    expected = condition_number(integers.to(dtype))
    for exponent in exponents:
        w = torch.ldexp(integers, torch.tensor(exponent)).to(dtype)
        assert w.abs().max() > 0
        kappa = condition_number(w)
        assert (kappa.value, kappa.lo, kappa.hi) == (expected.value, expected.lo, expected.hi)
        assert (kappa.stable_rank, kappa.status) == (expected.stable_rank, "ok")
        shift = 9 * exponent * math.log(2)
        assert kappa.log_volume == pytest.approx(expected.log_volume + shift, rel=1e-12, abs=1e-9)
        assert kappa.frobenius == pytest.approx(expected.frobenius * 2.0 ** min(exponent, 1023), rel=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1e9, 1e30])
def test_other_factors_change_rounding_only(factor):
    w = torch.randn(50, 40)
    assert condition_number(w * factor).value == pytest.approx(condition_number(w).value, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_a_vector_has_kappa_one(shape):
    w = torch.randn(shape)
    kappa = condition_number(w)
    assert (kappa.value, kappa.lo, kappa.hi, kappa.status) == (1.0, 1.0, 1.0, "ok")
    assert kappa.sigma_max == kappa.sigma_min == pytest.approx(w.norm().item(), rel=1e-6)
    assert kappa.stable_rank == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero(dtype):
    kappa = condition_number(torch.zeros(5, 3, dtype=dtype))
    assert kappa.status == "zero" and kappa.value == kappa.lo == kappa.hi == math.inf
    assert kappa.sigma_max == kappa.sigma_min == kappa.frobenius == 0.0
    assert kappa.log_volume == -math.inf and math.isnan(kappa.stable_rank)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rank_deficient(scale):
    low_rank = torch.randn(20, 5, dtype=torch.float64) @ torch.randn(5, 10, dtype=torch.float64)
    for w in (low_rank * scale, torch.ones(6, 6) * scale, torch.eye(4)[:, [0, 1, 2, 2]] * scale):
        assert np.linalg.matrix_rank(w.double().numpy()) < min(w.shape)
        kappa = condition_number(w)
        assert kappa.status == "rank_deficient" and kappa.value == kappa.hi == math.inf
        assert 1e13 < kappa.lo < math.inf and kappa.log_volume == -math.inf
        assert kappa.frobenius == pytest.approx(w.double().norm().item(), rel=1e-6)


def test_rank_deficient_is_where_numpy_draws_the_line():
    for tiny in (1e-12, 1e-14, 1e-15, 1e-16):
        w = torch.eye(8, dtype=torch.float64)
        w[-1, -1] = tiny
        deficient = np.linalg.matrix_rank(w.numpy()) < 8
        assert condition_number(w).status == ("rank_deficient" if deficient else "ok")
        assert deficient == (tiny < 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite(bad, dtype):
    w = torch.randn(6, 5).to(dtype)
    w[3, 2] = bad
    kappa = condition_number(w)
    assert (kappa.status, kappa.method) == ("nonfinite", "none")
    numbers = (kappa.value, kappa.lo, kappa.hi, kappa.sigma_max, kappa.sigma_min, kappa.log_volume, kappa.frobenius)
    assert all(math.isnan(number) for number in (*numbers, kappa.stable_rank))


def test_leaves_its_input_alone_and_takes_views_and_parameters():
    w = torch.randn(16, 12)
    before = w.clone()
    expected = condition_number(w)
    assert torch.equal(w, before)
    strided = torch.zeros(16, 24)
    strided[:, ::2] = w
    assert condition_number(strided[:, ::2]) == expected
    assert condition_number(torch.nn.Parameter(w)) == expected


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.zeros(3, 3, dtype=torch.int8), "int8"),
        (torch.zeros(3, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3), "2-D"),
        (torch.zeros(2, 3, 3), "2-D"),
        (torch.zeros(0, 3), "2-D"),
        (torch.zeros(3, 3, device="meta"), "meta"),
        (np.zeros((3, 3)), "ndarray"),
    ],
)
def test_not_a_matrix(bad, word):
    with pytest.raises(KappaTuneError, match=word):
        condition_number(bad)


@pytest.mark.parametrize("rtol", [0, -1e-3, 1, 2.0, math.nan, "0.1", True, None])
def test_bad_rtol(rtol):
    with pytest.raises(KappaTuneError, match="rtol"):
        condition_number(torch.eye(3), rtol=rtol)


def gaussian_kappas(m: int, n: int, trials: int, seed: int = 0) -> np.ndarray:
    """kappa of `trials` Gaussian (m, n) matrices, m >= n, from bidiagonal matrices that have the same law.

    Householder reflections turn a Gaussian matrix into independent chi variables: m, ..., m-n+1 degrees of freedom on
    the diagonal, n-1, ..., 1 above it (Silverstein, Ann. Probab. 13, 1985). All trials at once, in columns.
    """
    rng = np.random.default_rng(seed)
    diagonal = np.sqrt(rng.chisquare(np.arange(m, m - n, -1.0)[:, None], (n, trials)))
    above = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1.0)[:, None], (n - 1, trials)))
    x = rng.standard_normal((n, trials))
    for _ in range(250):
        y = diagonal * x
        y[:-1] += above * x[1:]
        x = diagonal * y
        x[1:] += above * y[:-1]
        x /= np.linalg.norm(x, axis=0)
    largest = bidiagonal_norm(diagonal, above, x)
    x = rng.standard_normal((n, trials))
    for _ in range(12):
        y = np.empty_like(x)
        y[0] = x[0] / diagonal[0]
        for i in range(1, n):
            y[i] = (x[i] - above[i - 1] * y[i - 1]) / diagonal[i]
        x[-1] = y[-1] / diagonal[-1]
        for i in range(n - 2, -1, -1):
            x[i] = (y[i] - above[i] * x[i + 1]) / diagonal[i]
        x /= np.linalg.norm(x, axis=0)
    return largest / bidiagonal_norm(diagonal, above, x)


def bidiagonal_norm(diagonal: np.ndarray, above: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = diagonal * x
    y[:-1] += above * x[1:]
    return np.linalg.norm(y, axis=0)


def test_simulation_equals_dense_gaussian_matrices():
    for m, n in ((16, 16), (20, 16), (64, 16)):
        dense = [np.linalg.cond(np.random.default_rng(i).standard_normal((m, n))) for i in range(1000)]
        assert np.median(gaussian_kappas(m, n, 1000)) == pytest.approx(np.median(dense), rel=0.1)


@pytest.mark.parametrize(
    ("n", "extra"),
    [(n, extra) for n in (8, 16, 64, 256, 1024) for extra in (0, 1, 2, 8, n // 2, n, 7 * n)]
    + [(4096, extra) for extra in (0, 1, 8, 10240)],
)
def test_null_is_the_median_of_gaussian_matrices(n, extra):
    simulated = np.median(gaussian_kappas(n + extra, n, 400 if extra < 2 else 100))
    assert null_condition(n + extra, n) == pytest.approx(simulated, rel=0.15)
    assert null_condition(n, n + extra) == null_condition(n + extra, n)


def test_null_comes_to_its_limits():
    ratio = 0.25
    edges = (1 + math.sqrt(ratio)) / (1 - math.sqrt(ratio))
    assert null_condition(10**7, 4 * 10**7) == pytest.approx(edges, rel=1e-3)
    # the median x of Edelman's law P(kappa / n < x) = exp(-2 / x - 2 / x^2)
    median = null_condition(10**6, 10**6) / 10**6
    assert math.exp(-2 / median - 2 / median**2) == pytest.approx(0.5, abs=1e-3)
    assert null_condition(1, 50) == null_condition(50, 1) == null_condition(1, 1) == 1.0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (-1, 2)])
def test_null_of_no_shape(shape):
    with pytest.raises(KappaTuneError, match="shape"):
        null_condition(*shape)
