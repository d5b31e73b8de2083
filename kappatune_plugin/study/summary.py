"""The results of one method of a comparison, summarized over its seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import t

from kappatune_plugin.forgetting.report import HARNESS, finite_or_none
from kappatune_plugin.study.settings import Settings, Tried

MIB = 2**20
# what may say how much was learned at a scale, the best first
LEARNED = ("task_accuracy", "task_loss", "validation_loss")


def summarize(tried: Tried, before: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    """An entry of compare.json's `methods`: what was trained, at which rate, and every measure over the seeds.

    A measure over seeds is {"mean", "half" (of the 95% interval; null for one value), "values" (one a seed; null where
    the run has none)}.
    """
    rates = sorted(tried.grid)
    lowest = [min(smoothed(run["losses"], settings.smooth)) for run in tried.runs]
    return {
        "name": tried.method.name,
        "learning_rate": tried.learning_rate,
        "at_edge_of_grid": len(rates) > 1 and tried.learning_rate in (rates[0], rates[-1]),
        "grid": {f"{rate:g}": _try(tried.grid[rate], before, settings) for rate in rates},
        "trainable": over_seeds([run["trainable"] for run in tried.runs]),
        "seconds": over_seeds([run["seconds"] for run in tried.runs]),
        "training_mib": over_seeds([run["training_bytes"] / MIB for run in tried.runs]),
        "peak_mib": over_seeds([run["peak_bytes"] and run["peak_bytes"] / MIB for run in tried.runs]),
        "lowest_loss": over_seeds([finite_or_none(loss) for loss in lowest]),
        "matched": _at(tried.matched, before),
        # runs that end at the target have no last step in common
        "final": None if settings.stop_at_target else _at([run["points"][-1] for run in tried.runs], before),
        "frontier": _frontier(tried.runs, before),
        "course": [_at(points, before) for points in zip(*(run["points"] for run in tried.runs), strict=False)],
    }


def changes(point: Mapping[str, Any], before: Mapping[str, float]) -> dict[str, float | None]:
    """A measurement with forgetting as a change against `before`, for each control and averaged over them."""
    found: dict[str, float | None] = {"step": point["step"]}
    controls = [key.removesuffix("_ppl") for key in before if key.endswith("_ppl")]
    for key in point:
        if key.startswith(("task_", HARNESS)) or key in ("recall", "replay_error"):
            found[key] = point[key]
    for name in controls:
        for measure in ("loss", "ppl"):
            now = point[f"{name}_{measure}"]
            found[f"{name}_{measure}_change"] = None if now is None else now - before[f"{name}_{measure}"]
        if f"{name}_kl" in point:
            found[f"{name}_kl"] = point[f"{name}_kl"]
    for measure in ("loss_change", "ppl_change", "kl"):
        each = [found[f"{name}_{measure}"] for name in controls if f"{name}_{measure}" in found]
        if each:
            found[f"control_{measure}"] = None if None in each else math.fsum(each) / len(each)
    return found


def over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The mean and its interval over the values that aren't None; None if all are."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    mean, half = interval(there)
    return {"mean": mean, "half": half, "values": list(values)}


def _at(points: Sequence[Mapping[str, Any] | None], before: Mapping[str, float]) -> dict[str, Any] | None:
    """Every measure over the seeds at one point of each run; None if no run reached that point."""
    rows = [None if point is None else changes(point, before) for point in points]
    keys = next((list(row) for row in rows if row), None)
    if keys is None:
        return None
    return {key: over_seeds([None if row is None else row[key] for row in rows]) for key in keys}


def _frontier(runs: Sequence[Mapping[str, Any]], before: Mapping[str, float]) -> dict[str, Any] | None:
    """`measure_frontier` over the seeds, with the base as the first point; None where nothing was scaled."""
    each = [run.get("frontier") for run in runs]
    there = next((one for one in each if one and "points" in one), None)
    if there is None:
        why = next((one["why_not"] for one in each if one), None)
        return why and {"why_not": why}
    keys = list(there["points"][0])
    start = {"scale": 0.0, "rise": 0.0, "chosen_rise": 0.0, **{key: before[key] for key in keys if key in before}}

    def over(take: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]) -> dict[str, Any]:
        rows = [take(one) if one and "points" in one else None for one in each]
        return {key: over_seeds([None if row is None else row[key] for row in rows]) for key in keys}

    def within(place: int) -> dict[str, Any]:
        limit = there["within"][place]
        modes = [mode for mode in ("one", "per_matrix") if limit[mode]]
        found = {mode: over(lambda one, mode=mode: one["within"][place][mode]) for mode in modes}
        return {"limit": limit["limit"], "per_matrix": None, **found}

    points = [over(lambda one, place=place: one["points"][place]) for place in range(len(there["points"]))]
    return {
        "points": [{key: over_seeds([start.get(key)]) for key in keys}, *points],
        "within": [within(place) for place in range(len(there["within"]))],
    }


def task_at_limits(content: Mapping[str, Any]) -> str | None:
    """The key of what was learned at each scale; None if no run was scaled back.

    The task's measure on test rows; the loss on held-out rows for a task that is measured by written answers, which
    take too long to repeat at every scale.
    """
    points = [method["frontier"]["points"][0] for method in content["methods"] if "points" in _of(method)]
    return next((key for key in LEARNED for point in points if key in point), None)


def leaders(content: Mapping[str, Any], place: int, key: str, mode: str = "one") -> tuple[str, list[str]] | None:
    """Who learns most within the limit at `place`, and who can't be told from that method.

    Seeds share their data order, so what decides is the 95% interval of the difference seed by seed.

    Args:
        key: of what was learned, one of `LEARNED`; a loss is better the lower it is.

    Returns:
        The best method's name, and those whose interval holds 0; None if nothing was measured.
    """
    sign = -1 if key.endswith("loss") else 1
    found = {method["name"]: within_limit(method, place, mode) for method in content["methods"]}
    values = {name: point[key]["values"] for name, point in found.items() if point and point.get(key)}
    if not values:
        return None
    best = max(values, key=lambda name: sign * found[name][key]["mean"])
    return best, [name for name in values if name != best and not _told_apart(values[best], values[name])]


def within_limit(method: Mapping[str, Any], place: int, mode: str = "one") -> Mapping[str, Any] | None:
    """A method's measures within the limit at `place`, one scale for all or "per_matrix"; None without them."""
    frontier = _of(method)
    return frontier["within"][place][mode] if "within" in frontier else None


def _of(method: Mapping[str, Any]) -> Mapping[str, Any]:
    # comparisons of before runs were scaled back have none
    return method.get("frontier") or {}


def _told_apart(ones: Sequence[float | None], others: Sequence[float | None]) -> bool:
    differences = [a - b for a, b in zip(ones, others, strict=True) if None not in (a, b)]
    if len(differences) < 2:
        return False
    mean, half = interval(differences)
    return abs(mean) > half


def _try(run: Mapping[str, Any], before: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    """One learning rate with the first seed; "at_target" only for a target given beforehand, "final" only if runs don't
    end there."""
    point, target = run["at_target"], settings.target_loss
    # a run found on disk may have been made for another target
    step = None if target is None else first_crossing(smoothed(run["losses"], settings.smooth), target)
    measured = point is not None and point["step"] == step
    return {
        "validation_loss": run["validation_loss"],
        "at_target": changes(point, before) if measured else None,
        "final": None if settings.stop_at_target else changes(run["points"][-1], before),
    }


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of `values`, and half the width of its 95% interval by Student's t; None for a single value.

    Raises:
        ValueError: no values.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, None
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def or_infinite(loss: float | None) -> float:
    """A loss to be compared with others, where None is one that wasn't finite."""
    return math.inf if loss is None else loss


def smoothed(losses: Sequence[float | None], window: int) -> list[float]:
    """The mean of the last `window` losses after each step; infinite where there are fewer, or one isn't finite (None).

    Not an exponential mean, which needs a correction at its start and never forgets an early loss.
    """
    curve = []
    for end in range(1, len(losses) + 1):
        last = losses[max(0, end - window) : end]
        complete = len(last) == window and all(loss is not None and math.isfinite(loss) for loss in last)
        curve.append(math.fsum(last) / window if complete else math.inf)
    return curve


def first_crossing(curve: Sequence[float], target: float) -> int | None:
    """The first step, counted from 1, after which `curve` is at `target` or below; None if it never is."""
    return next((step for step, value in enumerate(curve, start=1) if value <= target), None)
