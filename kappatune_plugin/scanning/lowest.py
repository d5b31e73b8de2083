"""Find the matrices of lowest kappa without measuring all: for the others a lower bound on kappa is enough."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.selection.budget import Budget
from kappatune_plugin.selection.ranking import BOUNDED, RANDOM, choose, rank_values, wanted_count
from kappatune_plugin.selection.report import ABOVE, UnitReport
from kappatune_plugin.weights.units import WeightUnit

Above = Callable[[WeightUnit], float]
Measure = Callable[[Sequence[WeightUnit], float, Above], list[UnitReport]]
# fewest matrices measured with one bound: a new bound has to wait for all of them
SMALLEST_WAVE = 16
# where intervals overlap at the boundary: first narrower by this factor, then as narrow as float64 allows
NARROWER, NARROWEST = 1e-3, 1e-12


def can_settle(order: str, rank_by: str) -> bool:
    """Whether the selection needs less than all condition numbers: for the lowest kappa, and for random draws."""
    return order != "highest" and rank_by in BOUNDED


def settle(
    units: Sequence[WeightUnit], measure: Measure, rtol: float, budget: Budget, order: str, rank_by: str, seed: int
) -> list[UnitReport]:
    """A row for each unit, in order: enough of them measured to know what `select` takes, the others "above".

    Units are measured in waves, those expected to be lowest first. The bound of a wave is an upper bound on the last
    value that will be taken, from the rows before it. Waves don't depend on the number of threads or processes, so
    neither do the rows.

    Args:
        measure: (units, rtol, above) -> their rows; see `measure.measure`.
        order, rank_by: of those that `can_settle` allows.
    """
    # before any is read, all that is known is kappa >= 1
    rows = {unit.name: _nothing_known(unit) for unit in units}
    by_kappa = order != "random" or budget.kind == "kappa"

    def find_out(some: Sequence[WeightUnit], bound: float) -> None:
        found = measure(some, rtol, lambda unit: bound * _scale(unit.shape, rank_by))
        rows.update((row.name, row) for row in found)

    if by_kappa:
        for wave in _waves(units, rank_by, budget):
            find_out(wave, _bound(rows.values(), rank_by, budget, len(units)))
        _refine(units, rows, measure, rtol, budget, rank_by)
    while order in RANDOM:
        taken, _ = choose(list(rows.values()), budget, order, rank_by, seed)
        drawn = {row.name for row in taken if row.status == ABOVE}
        if not drawn:
            break
        find_out([unit for unit in units if unit.name in drawn], math.inf)
        if by_kappa:
            _refine(units, rows, measure, rtol, budget, rank_by)
    return [rows[unit.name] for unit in units]


def _nothing_known(unit: WeightUnit) -> UnitReport:
    null, groups = null_condition(*unit.shape), tuple(sorted(unit.groups))
    return UnitReport(unit.name, unit.shape, None, 1.0, None, ABOVE, null, *[None] * 5, "none", groups)


def _scale(shape: tuple[int, int], rank_by: str) -> float:
    """kappa divided by the ranking value."""
    return null_condition(*shape) if rank_by == "kappa_over_null" else 1.0


def _expected(unit: WeightUnit, rank_by: str) -> float:
    return null_condition(*unit.shape) / _scale(unit.shape, rank_by)


def _waves(units: Sequence[WeightUnit], rank_by: str, budget: Budget) -> Iterator[list[WeightUnit]]:
    """The units, lowest expected value first (kappa mostly follows shape): as many as are wanted, then ever more."""
    # with kappa_over_null all are expected alike; small ones give the first bound at the least cost
    expected = sorted(units, key=lambda unit: (_expected(unit, rank_by), math.prod(unit.shape), unit.name))
    size = wanted_count(budget, len(units)) if budget.kind in ("count", "share") else SMALLEST_WAVE
    if budget.kind == "kappa":
        size = len(units)
    begin, size = 0, max(size, SMALLEST_WAVE)
    while begin < len(expected):
        yield expected[begin : begin + size]
        begin, size = begin + size, begin + size


def _bound(rows: Iterable[UnitReport], rank_by: str, budget: Budget, matrices: int) -> float:
    """Upper bound on the ranking value of any matrix still selectable, from the rows so far."""
    if budget.kind == "kappa":
        return float(budget.value)
    highs = ((row.hi / _scale(row.shape, rank_by), math.prod(row.shape)) for row in rows if row.status == "ok")
    left = budget.value if budget.kind == "params" else wanted_count(budget, matrices) - 1
    for high, size in sorted(highs):
        left -= size if budget.kind == "params" else 1
        if left < 0:
            return high
    return math.inf


def _refine(
    units: Sequence[WeightUnit],
    rows: dict[str, UnitReport],
    measure: Measure,
    rtol: float,
    budget: Budget,
    rank_by: str,
) -> None:
    """Narrow the intervals that straddle the boundary, until none does or float64 can't tell them apart.

    A narrower one starts from other vectors. Where the two contradict, one of them missed an extreme singular vector,
    and the larger kappa counts, since lower ends are certain.
    """
    for narrower in (rtol * NARROWER, NARROWEST):
        names = _straddling(list(rows.values()), budget, rank_by)
        if not names:
            return
        found = measure([unit for unit in units if unit.name in names], narrower, lambda unit: math.inf)
        rows.update((row.name, row) for row in found if row.hi is None or row.hi >= rows[row.name].lo)


def _straddling(rows: Sequence[UnitReport], budget: Budget, rank_by: str) -> set[str]:
    """Names of rows whose interval reaches over the boundary of the selection; ties are broken by name."""
    values = rank_values(rows, rank_by)
    known = sorted((row for row in rows if row.status == "ok"), key=lambda row: (values[row.name], row.name))
    if budget.kind == "kappa":
        return {row.name for row in known if row.lo <= budget.value < row.hi}
    if budget.kind != "params":
        cuts = [wanted_count(budget, len(rows))]
    else:
        fitting = sum(total <= budget.value for total in accumulate(math.prod(row.shape) for row in known))
        # the selection also depends on which one is the first that doesn't fit
        cuts = [fitting, fitting + 1]
    found: set[str] = set()
    for cut in cuts:
        found |= _across(known[:cut], known[cut:], rank_by)
    return found


def _across(below: Sequence[UnitReport], above: Sequence[UnitReport], rank_by: str) -> set[str]:
    """Names of rows whose interval overlaps with one of the other side, unless all these intervals are equal."""
    if not below or not above:
        return set()
    low = min(row.lo / _scale(row.shape, rank_by) for row in above)
    high = max(row.hi / _scale(row.shape, rank_by) for row in below)
    if low > high:
        return set()
    rows = [row for row in (*below, *above) if _overlaps(row, low, high, rank_by)]
    different = {(row.lo / _scale(row.shape, rank_by), row.hi / _scale(row.shape, rank_by)) for row in rows}
    return {row.name for row in rows} if len(different) > 1 else set()


def _overlaps(row: UnitReport, low: float, high: float, rank_by: str) -> bool:
    scale = _scale(row.shape, rank_by)
    return row.lo / scale <= high and row.hi / scale >= low
