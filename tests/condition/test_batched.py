"""The batched engine, against `condition_number` and float64 SVDs. What runs on a GPU runs here on the CPU."""

import math

import numpy as np
import pytest
import torch

from helpers.spectra import singular_values, with_spectrum
from kappatune_plugin.condition import batched
from kappatune_plugin.condition.batched import condition_numbers
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (300, 300), (64, 48), (40, 33), (40, 20), (9, 1), (1, 1)])
def test_equals_one_at_a_time_and_holds_the_truth(shape, dtype):
    w = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for one, kappa in zip(w, condition_numbers(w), strict=True):
        alone, sigma = condition_number(one), singular_values(one)
        assert kappa.status == "ok" and kappa.lo <= sigma[0] / sigma[-1] * (1 + 1e-12)
        assert sigma[0] / sigma[-1] <= kappa.hi * (1 + 1e-12) and kappa.hi - kappa.lo <= 1e-3 * kappa.value
        assert kappa.lo <= alone.hi and alone.lo <= kappa.hi
        for name in ("value", "sigma_max", "sigma_min", "frobenius", "stable_rank"):
            assert getattr(kappa, name) == pytest.approx(getattr(alone, name), rel=1e-3)
        assert kappa.log_volume == pytest.approx(alone.log_volume, abs=2e-3)


SPECTRA = {
    "orthogonal": lambda n: np.ones(n),
    "two clusters": lambda n: np.where(np.arange(n) < n // 2, 1.0, 1e-2),
    "power law": lambda n: 1.0 / np.arange(1, n + 1),
    "outlier": lambda n: np.where(np.arange(n) == 0, 50.0, 1.0 + np.arange(n) / n),
    "one small": lambda n: np.where(np.arange(n) == n - 1, 1e-4, 1.0),
    **{f"kappa 1e{power}": lambda n, power=power: np.logspace(0, -power, n) for power in range(1, 8)},
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 200), (150, 150)])
def test_spectra(name, shape):
    sigma = np.sort(SPECTRA[name](min(shape)))
    truth = sigma[-1] / sigma[0]
    kappas = condition_numbers(torch.stack([with_spectrum(*shape, sigma, seed) for seed in range(2)]))
    for kappa in kappas:
        # the matrix has this spectrum but for the rounding of its making
        slack = 1 + 1e-13 * truth
        assert kappa.lo <= truth * slack and truth <= kappa.hi * slack
        assert kappa.hi - kappa.lo <= 1e-3 * kappa.value


def test_goes_on_to_other_factors_where_the_gram_matrix_is_too_ill_conditioned():
    square, tall = with_spectrum(80, 80, np.logspace(0, -9, 80)), with_spectrum(90, 60, np.logspace(0, -9, 60))
    assert condition_numbers(square[None])[0].method == "lu64"
    assert condition_numbers(tall[None])[0].method == "svd64"


def test_a_mixed_stack_keeps_its_order():
    good = torch.randn(48, 40)
    singular = torch.randn(48, 5) @ torch.randn(5, 40)
    bad = good.clone()
    bad[3, 4] = math.nan
    stack = torch.stack([good, torch.zeros(48, 40), bad, singular.double().float(), 1e30 * good, good * 1e-30])
    kappas = condition_numbers(stack)
    assert [kappa.status for kappa in kappas] == [condition_number(w).status for w in stack]
    assert [kappa.status for kappa in kappas[:3]] == ["ok", "zero", "nonfinite"]
    for kappa in (kappas[4], kappas[5]):
        assert kappa.value == pytest.approx(kappas[0].value, rel=1e-5)


def test_stops_above_a_bound():
    w = torch.stack([with_spectrum(60, 60, np.logspace(0, -power, 60)) for power in (1, 2, 4)])
    low, middle, high = condition_numbers(w, above=200.0)
    assert (low.method, middle.method, high.method) == ("gram64", "gram64", "gram64 bound")
    assert 200 < high.lo <= 1e4 and high.hi == math.inf and high.status == "ok"
    assert middle.lo <= 100 * (1 + 1e-9) and middle.hi >= 100 * (1 - 1e-9)
    assert math.isnan(high.sigma_min) and high.frobenius == pytest.approx(w[2].norm().item())
    assert condition_numbers(w[2:], above=200.0)[0].method == "gram64 bound"


def test_splits_what_would_not_fit(monkeypatch):
    w = torch.randn(5, 60, 40)
    whole = condition_numbers(w)
    monkeypatch.setattr(batched, "WORKSPACE_BYTES", 2 * 8 * (60 * 40 + batched.SQUARES_HELD * 40 * 40))
    sizes = []
    one_batch = batched._batch
    monkeypatch.setattr(batched, "_batch", lambda tall, *rest: sizes.append(len(tall)) or one_batch(tall, *rest))
    for kappa, expected in zip(condition_numbers(w), whole, strict=True):
        assert kappa.value == pytest.approx(expected.value, rel=1e-9)
    assert sizes == [2, 2, 1]


def test_inverse_factor_by_halves(monkeypatch):
    monkeypatch.setattr(batched, "LEAF", 7)
    a = torch.randn(2, 50, 33, dtype=torch.float64)
    gram = a.mT @ a
    gram[1] -= 100 * torch.eye(33)
    inverse, broken = batched._inverse_factor(gram)
    assert broken.tolist() == [False, True] and torch.isfinite(inverse).all()
    assert torch.allclose(inverse[0], torch.linalg.inv(torch.linalg.cholesky(gram[0])), atol=1e-9)


def test_an_empty_stack_has_no_condition_numbers():
    assert condition_numbers(torch.zeros(0, 4, 3)) == []


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.int8), "int8"),
        (torch.zeros(3, 3), "stack"),
        (torch.zeros(2, 0, 3), "stack"),
        (torch.zeros(2, 3, 3, device="meta"), "meta"),
        (np.zeros((2, 3, 3)), "ndarray"),
    ],
)
def test_not_a_stack(bad, word):
    with pytest.raises(KappaTuneError, match=word):
        condition_numbers(bad)
