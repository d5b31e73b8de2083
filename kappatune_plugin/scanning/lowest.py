"""Only what a selection needs to know: which matrices have the lowest kappa, not the kappa of all others."""

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
# matrices measured with one bound, at least: a new one has to wait for all of them
SMALLEST_WAVE = 16
# where intervals overlap at the boundary: narrower by this, and then as narrow as float64 gives
NARROWER, NARROWEST = 1e-3, 1e-12


def can_settle(order: str, rank_by: str) -> bool:
    """Whether less than the whole table is enough: for the lowest kappa, and for random draws."""
    return order != "highest" and rank_by in BOUNDED


def settle(
    units: Sequence[WeightUnit], measure: Measure, rtol: float, budget: Budget, order: str, rank_by: str, seed: int
) -> list[UnitReport]:
    """A row for each unit, in order: enough of them settled to tell what `select` takes, the others "above".

    Units are measured in waves, those first that are expected to be lowest. The bound of a wave is what the rows
    before it say is certainly not below the last one taken. Waves don't depend on how many threads or processes
    measure, so neither do the rows.

    Args:
        measure: (units, rtol, above) -> their rows; see `measure.measure`.
        order, rank_by: of those that `can_settle` allows.
    """
    # kappa is at least 1: what is known of all before any is read
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
    """kappa over the value to rank by."""
    return null_condition(*shape) if rank_by == "kappa_over_null" else 1.0


def _expected(unit: WeightUnit, rank_by: str) -> float:
    return null_condition(*unit.shape) / _scale(unit.shape, rank_by)


def _waves(units: Sequence[WeightUnit], rank_by: str, budget: Budget) -> Iterator[list[WeightUnit]]:
    """The units, most promising first: kappa mostly follows shape. As many as are wanted, and then ever more."""
    # relative to its shape no unit promises more than another; small ones give the first bound at the least cost
    expected = sorted(units, key=lambda unit: (_expected(unit, rank_by), math.prod(unit.shape), unit.name))
    size = wanted_count(budget, len(units)) if budget.kind in ("count", "share") else SMALLEST_WAVE
    if budget.kind == "kappa":
        size = len(units)
    begin, size = 0, max(size, SMALLEST_WAVE)
    while begin < len(expected):
        yield expected[begin : begin + size]
        begin, size = begin + size, begin + size


def _bound(rows: Iterable[UnitReport], rank_by: str, budget: Budget, matrices: int) -> float:
    """What a unit that matters is not above, by what is known now: of `rank_by`'s values."""
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
    """Make the intervals that straddle the boundary narrower, until they don't or float64 can't tell them apart."""
    for narrower in (rtol * NARROWER, NARROWEST):
        names = _straddling(list(rows.values()), budget, rank_by)
        if not names:
            return
        found = measure([unit for unit in units if unit.name in names], narrower, lambda unit: math.inf)
        rows.update((row.name, row) for row in found)


def _straddling(rows: Sequence[UnitReport], budget: Budget, rank_by: str) -> set[str]:
    """Rows whose interval doesn't tell on which side of the boundary they are; equal values are settled by name."""
    values = rank_values(rows, rank_by)
    known = sorted((row for row in rows if row.status == "ok"), key=lambda row: (values[row.name], row.name))
    if budget.kind == "kappa":
        return {row.name for row in known if row.lo <= budget.value < row.hi}
    if budget.kind != "params":
        cuts = [wanted_count(budget, len(rows))]
    else:
        fitting = sum(total <= budget.value for total in accumulate(math.prod(row.shape) for row in known))
        # which one is the first that doesn't fit matters too
        cuts = [fitting, fitting + 1]
    found: set[str] = set()
    for cut in cuts:
        found |= _across(known[:cut], known[cut:], rank_by)
    return found


def _across(below: Sequence[UnitReport], above: Sequence[UnitReport], rank_by: str) -> set[str]:
    """The rows of both sides whose intervals overlap with one of the other side, unless they are the same."""
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
