"""The results of one method of a comparison, summarized over its seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t

from kappatune_plugin.forgetting.report import HARNESS, finite_or_none
from kappatune_plugin.study.settings import Settings, Tried

MIB = 2**20


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
        found[f"{name}_kl"] = point[f"{name}_kl"]
    for measure in ("loss_change", "ppl_change", "kl"):
        each = [found[f"{name}_{measure}"] for name in controls]
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
