"""Partial scans: they settle no more than a selection needs, and it is the one that the whole table gives."""

import math
import random

import pytest
import torch
from torch import nn

from helpers.made_up_reports import report
from helpers.spectra import hidden_from_seed_0
from kappatune_plugin.condition import batched, by_factors
from kappatune_plugin.condition.kappa import Kappa, random_numbers
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.lowest import settle
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.report import ABOVE, KappaReport, UnitReport
from kappatune_plugin.selection.selection import select
from kappatune_plugin.weights.units import WeightUnit

SHAPES = [(4, 4), (4, 9), (16, 4), (8, 8)]
BUDGETS = [1, 7, 30, "10%", "100%", {"params": 300}, {"params": 2000}, {"kappa": 40}, {"kappa": 149.99}]


class Population:
    """Units of known kappa, measured by intervals as wide as allowed and bounds as low as allowed."""

    def __init__(self, seed: int, count: int = 60) -> None:
        draw = random.Random(seed)
        # many are near or equal, so that the boundary has to be refined
        kappas = [draw.choice([10, 100, 150, 10 + 200 * draw.random(), 100 + draw.random() / 50]) for _ in range(count)]
        self.units = [WeightUnit(f"u{i:03}.weight", draw.choice(SHAPES), f"u{i}") for i in range(count)]
        self.kappas = dict(zip((unit.name for unit in self.units), map(float, kappas), strict=True))
        self.bad = {unit.name for unit in draw.sample(self.units, 4)}
        self.draw, self.measured = draw, []

    def row(self, unit: WeightUnit, rtol: float, above: float) -> UnitReport:
        self.measured.append((unit.name, rtol))
        kappa = self.kappas[unit.name]
        if unit.name in self.bad:
            numbers = Kappa(math.inf, 1e9, math.inf, 1.0, 0.0, -math.inf, 1.0, 1.0, "svd64", "rank_deficient")
        elif kappa > above:
            bound = above + self.draw.random() * (kappa - above)
            numbers = Kappa(bound, bound, math.inf, *[math.nan] * 4, math.nan, "lu32", "ok")
        else:
            # the interval and the value in it depend on the kappa alone, as they would on the matrix
            part = random.Random(kappa).random()
            low = kappa * (1 - rtol * part)
            high = max(low * (1 + rtol), kappa)
            numbers = Kappa((low + high) / 2, low, high, kappa, 1.0, 1.0, 2.0, 1.5, "lu32", "ok")
        return UnitReport.of(unit.name, unit.shape, numbers)

    def measure(self, units, rtol, above) -> list[UnitReport]:
        return [self.row(unit, rtol, above(unit)) for unit in units]

    def full(self) -> KappaReport:
        return report(*self.measure(self.units, 1e-14, lambda unit: math.inf))


def outcome(made_of: KappaReport, **settings) -> set[str] | str:
    """What is selected, or "error"."""
    try:
        return {unit.name for unit in select(made_of, **settings).units}
    except KappaTuneError as error:
        assert "isn't enough for this" not in str(error)
        return "error"


@pytest.mark.parametrize("rank_by", ["kappa", "kappa_over_null"])
@pytest.mark.parametrize("order", ["lowest", "random", "shape_matched_random"])
@pytest.mark.parametrize("k", BUDGETS)
def test_selection_is_that_of_the_whole_table(k, order, rank_by):
    if isinstance(k, dict) and "kappa" in k and rank_by != "kappa":
        pytest.skip("refused")
    settings = {"k": k, "order": order, "rank_by": rank_by, "seed": 3}
    partial = 0
    for seed in range(12):
        population = Population(seed)
        budget = parse_budget(k)
        try:
            rows = settle(population.units, population.measure, 0.1, budget, order, rank_by, 3)
        except KappaTuneError:
            # random draws of more than there is
            assert outcome(population.full(), **settings) == "error"
            continue
        made = KappaReport(rows, {"name": "base", "hash": "0123"}, "float32", {}, settings)
        assert [row.name for row in rows] == [unit.name for unit in population.units]
        assert outcome(made, **settings) == outcome(population.full(), **settings)
        partial += any(row.status == ABOVE for row in rows)
    # where the budget is most of the model, or the draw meets it, everything may be needed
    assert partial > 6 or k in (30, "100%", {"params": 2000}) or order == "shape_matched_random"


def test_only_the_boundary_is_refined():
    population = Population(0, count=400)
    settle(population.units, population.measure, 0.01, parse_budget(20), "lowest", "kappa", 0)
    refined = {name for name, rtol in population.measured if rtol < 0.01}
    # a fifth of them is equal at the boundary, and nearly equal to as many
    assert len(refined) < 200 and len(population.measured) <= 400 + 2 * len(refined)
    rows = settle(population.units, population.measure, 0.01, parse_budget(20), "lowest", "kappa", 0)
    assert sum(row.status == ABOVE for row in rows) > 200


def test_what_one_start_misses_another_finds_where_it_decides(monkeypatch):
    """A matrix of kappa 10.2 that shows 10 to vectors from seed 0, and one of 10.00005: at first they overlap."""

    def hides_at_first(w, rtol):
        return torch.Generator().manual_seed(0) if rtol == 1e-3 else random_numbers(w, rtol)

    for module in (by_factors, batched):
        monkeypatch.setattr(module, "random_numbers", hides_at_first)
    hidden, other = hidden_from_seed_0("bottom", 1.02), hidden_from_seed_0("bottom", 1.0)
    u, sigma, v = torch.linalg.svd(other)
    sigma[-2:] = sigma[0] / 10.00005
    model = nn.ModuleDict({name: nn.Linear(400, 400, bias=False) for name in ("hidden", "other")})
    model["hidden"].weight.data, model["other"].weight.data = hidden, (u * sigma) @ v
    assert condition_number(hidden).hi < 10.02
    rows = {row.name: row for row in scan(model, k=1, rtol=1e-3, progress=False, cache=False).units}
    assert rows["other.weight"].hi < 10.01 and rows["hidden.weight"].lo > 10.19


def test_equal_matrices_are_not_refined():
    population = Population(1)
    population.kappas = {name: 50.0 for name in population.kappas}
    rows = settle(population.units, population.measure, 1e-3, parse_budget(5), "lowest", "kappa", 0)
    assert {rtol for _, rtol in population.measured} == {1e-3}
    expected = [name for name in sorted(population.kappas) if name not in population.bad][:5]
    assert [unit.name for unit in select(report(*rows), k=5).units] == expected


def test_partial_report_says_what_it_cannot_tell():
    population = Population(2)
    rows = settle(population.units, population.measure, 1e-3, parse_budget(7), "lowest", "kappa", 0)
    made = KappaReport(rows, {"name": "base", "hash": "0123"}, "float32", {}, {"k": 7, "order": "lowest"})
    # fewer are known too
    assert outcome(made, k=3) == outcome(population.full(), k=3)
    for settings in (
        {"k": 40},
        {"k": "90%"},
        {"k": {"params": 3000}},
        {"k": {"kappa": 200}},
        {"order": "highest", "k": 2},
        {"order": "random", "k": 40},
        {"rank_by": "stable_rank", "k": 2},
    ):
        with pytest.raises(KappaTuneError, match=r"made to select \{'k': 7.*--full"):
            select(made, **settings)


def stack() -> nn.Module:
    """Large enough for factors, which give bounds; of four shapes, two of them square."""
    torch.manual_seed(0)
    shapes = [(420, 900), (800, 420), (420, 420), (400, 400)]
    return nn.ModuleList([nn.Linear(*shape, bias=False) for _ in range(5) for shape in shapes])


@pytest.mark.parametrize("k", [4, "40%", {"params": "1.5M"}, {"kappa": 6}])
def test_partial_scan_of_a_model(k):
    model = stack()
    sigma = {name: torch.linalg.svdvals(weight.detach().double()) for name, weight in model.named_parameters()}
    exact = sorted(sigma, key=lambda name: sigma[name][0] / sigma[name][-1])
    made = scan(model, progress=False, k=k)
    selection = select(made, k=k)
    assert [unit.name for unit in selection.units] == exact[: len(selection.units)]
    unsettled = [row for row in made.units if row.status == ABOVE]
    assert len(unsettled) == (10 if isinstance(k, dict) and "kappa" in k else 4) and made.made_for == {
        "k": k,
        "order": "lowest",
        "rank_by": "kappa",
        "seed": 0,
    }
    assert all(row.lo <= sigma[row.name][0] / sigma[row.name][-1] for row in unsettled)
    # the same from the cache, whatever is known by then
    scan(model, progress=False)
    assert [unit.name for unit in select(scan(model, progress=False, k=k), k=k).units] == exact[: len(selection.units)]
    assert made == scan(model, progress=False, k=k, cache=False)


def test_partial_report_survives_its_file(tmp_path):
    made = scan(stack(), progress=False, k=4)
    made.save(tmp_path / "report.json")
    assert KappaReport.load(tmp_path / "report.json") == made


def test_asking_for_everything_gives_the_whole_table():
    model = stack()
    assert scan(model, progress=False, k=20) == scan(model, progress=False)
    highest = scan(model, progress=False, k=2, order="highest")
    assert highest.made_for is None and select(highest, k=2, order="highest")
    with pytest.raises(KappaTuneError, match="entropy"):
        scan(model, progress=False, k=2, rank_by="entropy")
