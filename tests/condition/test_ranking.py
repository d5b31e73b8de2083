"""The values to rank by, against their definitions on singular values."""

import math

import pytest
import torch
from torch import nn

from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.condition.signal_to_noise import signal_to_noise
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.selection import select


def stack() -> nn.Module:
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(30, 20 + 10 * (i % 3), bias=False) for i in range(9)])
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.mul_(torch.logspace(0, -0.2 * i, 30) * 3**i)
    return model


def slow_snr(sigma: list[float], m: int, n: int) -> float:
    ordered = sorted(sigma)

    def quantile(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    eps = (quantile(0.75) - quantile(0.25)) / 1.349 * (1 + math.sqrt(min(m, n) / max(m, n)))
    return sum(each for each in sigma if each > eps) / sum(each for each in sigma if each <= eps) / max(sigma)


def expected(rank_by: str, weight: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.detach().double()).tolist()
    m, n = weight.shape
    squares = sum(each**2 for each in sigma)
    return {
        "kappa": lambda: max(sigma) / min(sigma),
        "kappa_over_null": lambda: max(sigma) / min(sigma) / null_condition(m, n),
        "log_volume": lambda: sum(map(math.log, sigma)) / len(sigma) - math.log(math.sqrt(squares / len(sigma))),
        "stable_rank": lambda: squares / max(sigma) ** 2,
        "snr": lambda: slow_snr(sigma, m, n),
    }[rank_by]()


@pytest.mark.parametrize("order", ["lowest", "highest"])
@pytest.mark.parametrize("rank_by", ["kappa", "kappa_over_null", "log_volume", "stable_rank", "snr"])
def test_each_rank_is_that_of_its_definition(rank_by, order):
    model = stack()
    values = {name: expected(rank_by, weight) for name, weight in model.named_parameters()}
    exact = sorted(values, key=values.get, reverse=order == "highest")
    report = scan(model, progress=False, k=4, rank_by=rank_by, order=order)
    selection = select(report, k=4, rank_by=rank_by, order=order)
    assert [unit.name for unit in selection.units] == exact[:4] and selection.rank_by == rank_by
    shown = float(selection.reasons[exact[0]].removeprefix(f"taken: {rank_by} ").split()[0])
    assert shown == pytest.approx(values[exact[0]], rel=2e-3)


def test_scale_changes_no_rank_but_spectrums():
    model = stack()
    before = {rank: select(scan(model, progress=False), k=9, rank_by=rank) for rank in ("log_volume", "stable_rank")}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-3)
    for rank, selection in before.items():
        names = [unit.name for unit in select(scan(model, progress=False), k=9, rank_by=rank).units]
        assert names == [unit.name for unit in selection.units]
    matrix = torch.randn(20, 30)
    assert signal_to_noise(matrix / 2) == pytest.approx(2 * signal_to_noise(matrix))
    # no value below the edge of the noise
    assert signal_to_noise(torch.eye(4)) == 4.0


def test_snr_is_only_there_when_asked_for():
    model = stack()
    plain = scan(model, progress=False)
    assert all(row.scores == {} for row in plain.units)
    with pytest.raises(KappaTuneError, match="rank_by snr"):
        select(plain, k=2, rank_by="snr")
    # the cache knows the kappas, which is not enough
    assert all(row.scores["snr"] > 0 for row in scan(model, progress=False, rank_by="snr").units)
    # and is not in the way of who doesn't ask
    assert [row.kappa for row in scan(model, progress=False).units] == [row.kappa for row in plain.units]


def test_kappa_is_no_budget_for_other_ranks():
    with pytest.raises(KappaTuneError, match="goes with rank_by kappa"):
        select(scan(stack(), progress=False), k={"kappa": 3}, rank_by="stable_rank")
