"""The criteria to rank weight matrices by, and which matrices a budget takes."""

import math
import random
from collections import Counter
from collections.abc import Sequence

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.budget import Budget
from kappatune_plugin.selection.criteria import ON_ROWS, RANKS
from kappatune_plugin.selection.report import ABOVE, UnitReport

RANDOM = ("random", "shape_matched_random")
ORDERS = ("lowest", "highest", *RANDOM)
# criteria for which a lower bound on kappa gives a lower bound
BOUNDED = ("kappa", "kappa_over_null")


class Unsettled(KappaTuneError):
    """The report was made for a smaller selection, and lacks condition numbers that this one needs."""


class NotMeasured(KappaTuneError):
    """The report doesn't have the values to rank by, whatever the budget."""


def rank_values(rows: Sequence[UnitReport], rank_by: str) -> dict[str, float]:
    """Name -> the ranking value, for the rows that are "ok".

    Raises:
        NotMeasured: the report doesn't have these values.
    """
    try:
        return {row.name: RANKS[rank_by](row) for row in rows if row.status == "ok"}
    except KeyError as error:
        raise NotMeasured(f"rank_by: {rank_by}: the report has no such values. {how_to_measure(rank_by)}") from error


def how_to_measure(rank_by: str) -> str:
    """How to get a report with the values of `rank_by`, for errors."""
    if rank_by in ON_ROWS:
        return (
            "They are measured on a task's rows: `kappatune sft` with a recipe that has this rank_by leaves a "
            "kappa_report.json with them, `with_gain` and `with_expert_use` add them to a report in Python."
        )
    return f"Scan again with rank_by {rank_by} (`kappatune scan MODEL --rank_by {rank_by}`)."


def ranked(rows: Sequence[UnitReport], rank_by: str, highest: bool = False) -> list[UnitReport]:
    """The rows that are "ok", lowest or highest first, ties by name. If the report has rows that are only "above", only
    the rows that are certainly lower than those.

    Raises:
        Unsettled: the report doesn't have the highest, or not by this criterion.
    """
    values, bound = rank_values(rows, rank_by), math.inf
    unknown = [row for row in rows if row.status == ABOVE]
    if unknown and (highest or rank_by not in BOUNDED):
        raise Unsettled(f"only the lowest kappa are known, not the {'highest ' if highest else ''}{rank_by}")
    if unknown:
        bound = min(lower_end(row, rank_by) for row in unknown)
    sign = -1 if highest else 1
    known = [row for row in rows if row.status == "ok" and values[row.name] < bound]
    return sorted(known, key=lambda row: (sign * values[row.name], row.name))


def lower_end(row: UnitReport, rank_by: str) -> float:
    """Lower bound of the ranking value."""
    return row.lo / row.null if rank_by == "kappa_over_null" else row.lo


def choose(
    rows: Sequence[UnitReport], budget: Budget, order: str, rank_by: str, seed: int
) -> tuple[list[UnitReport], list[UnitReport]]:
    """The rows that `budget` takes, in that order, and the ranking they come from.

    Raises:
        Unsettled: rows that are only "above" may be among them.
        KappaTuneError: the budget asks for more than there is, or takes nothing.
    """
    # a random draw needs no ranking, but its reasons name ranks if they are known
    needless = order == "random" and budget.kind != "kappa" and any(row.status == ABOVE for row in rows)
    ranking = [] if needless else ranked(rows, rank_by, order == "highest")
    if order in RANDOM:
        return _draw(rows, ranking, budget, order, seed), ranking
    return ranking[: count(rows, ranking, budget, order)], ranking


def count(rows: Sequence[UnitReport], ordered: Sequence[UnitReport], budget: Budget, order: str) -> int:
    """How many of `ordered` the budget takes; at least 1. `rows` are all of the report's."""
    unknown = any(row.status == ABOVE for row in rows) and order != "random"
    if budget.kind in ("count", "share"):
        wanted = wanted_count(budget, len(rows))
        if wanted > len(ordered) and unknown:
            raise Unsettled(f"only the {len(ordered)} lowest are known")
        if wanted > len(ordered) and budget.kind == "count":
            raise KappaTuneError(f"k = {budget} is more than there is: {len(ordered)} matrices can be selected")
        return min(wanted, len(ordered))
    if budget.kind == "params":
        return _count_fitting(ordered, budget, unknown)
    return _count_within(rows, ordered, budget, order)


def wanted_count(budget: Budget, matrices: int) -> int:
    """K for a budget of kind "count" or "share" and a report of `matrices` rows, whatever their status."""
    return int(budget.value) if budget.kind == "count" else max(1, int(budget.value * matrices))


def _count_fitting(ordered: Sequence[UnitReport], budget: Budget, unknown: bool) -> int:
    number = total = 0
    for row in ordered:
        total += math.prod(row.shape)
        if total > budget.value:
            break
        number += 1
    if unknown and number == len(ordered):
        raise Unsettled(f"only the {len(ordered)} lowest are known, of {total:,} parameters")
    if number == 0:
        first = ordered[0]
        raise KappaTuneError(
            f"k: {budget} are too few: the first weight in this order, {first.name}, has {math.prod(first.shape):,}. "
            "Give at least that many."
        )
    return number


def _count_within(rows: Sequence[UnitReport], ordered: Sequence[UnitReport], budget: Budget, order: str) -> int:
    bounds = [row.lo for row in rows if row.status == ABOVE]
    if bounds and min(bounds) <= budget.value:
        raise Unsettled(f"only kappa up to {min(bounds):.4g} are known")
    kappas = [row.kappa for row in ordered]
    if order == "highest":
        number, asked = sum(each >= budget.value for each in kappas), "from"
        nearest = f"highest is {max(kappas):.4g}"
    else:
        number, asked = sum(each <= budget.value for each in kappas), "up to"
        nearest = f"lowest is {min([*kappas, *bounds]):.4g}"
    if number == 0:
        raise KappaTuneError(
            f"k: no weight matrix has kappa {asked} {float(budget.value):g}: the {nearest}. "
            "Choose another threshold, or a number of matrices such as 75."
        )
    return number


def _draw(
    rows: Sequence[UnitReport], ranking: Sequence[UnitReport], budget: Budget, order: str, seed: int
) -> list[UnitReport]:
    """The rows of a random order, as drawn; they may include rows that are only "above"."""
    # sorted by name, so that rounding of kappa doesn't change the draw
    drawn = sorted(rows, key=lambda row: row.name)
    random.Random(seed).shuffle(drawn)
    drawn = [row for row in drawn if row.status in ("ok", ABOVE)]
    if order == "random":
        within = ranking if budget.kind == "kappa" else drawn
        return drawn[: count(rows, within, budget, order)]
    wanted = Counter(row.shape for row in ranking[: count(rows, ranking, budget, order)])
    taken = []
    for row in drawn:
        if wanted[row.shape] > 0:
            wanted[row.shape] -= 1
            taken.append(row)
    return taken
