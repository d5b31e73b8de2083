"""Comparisons as docs/results holds them: what tables, pictures and tests need, a line for each method.

A measure over seeds is its values alone; its mean and interval are computed again when a file is read.

    python benchmarks/compact.py docs/results/*.json     # files that were written otherwise
"""

import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from kappatune_plugin.files import write_text
from kappatune_plugin.forgetting.report import HARNESS
from kappatune_plugin.study.summary import over_seeds
from kappatune_plugin.study.tables import MEASURES

Point = Mapping[str, Any] | None
# of a measurement, beside the measures that tables show; of a curve over training less, and fewer points
ALSO = ("step", "scale", "rise", "chosen_rise")
CURVE, ON_CURVE = 8, ("step", "task_accuracy", "task_loss", "control_loss_change")
TOTALS, UNUSED = ("trainable", "lowest_loss"), ("seconds", "training_mib", "peak_mib")


def read(path: Path) -> dict[str, Any]:
    """A comparison with all measures as `kappatune compare` writes them; `path` may be compact or not."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {**content, "methods": [_changed(method, _grown) for method in content["methods"]]}


def compact(content: Mapping[str, Any]) -> str:
    """A comparison as JSON with a line for each key and for each method, numbers with six digits."""
    controls = [key.removesuffix("_ppl") for key in content["before"] if key.endswith("_ppl")]
    # of one control the mean over controls is enough
    rises = [f"{name}_loss_change" for name in controls] if len(controls) > 1 else []
    rows = [six_digits(_changed(_needed(method, rises), _values)) for method in content["methods"]]
    methods = ",\n  ".join(map(json.dumps, rows))
    rest = [f"{json.dumps(key)}: {json.dumps(six_digits(value))}" for key, value in content.items() if key != "methods"]
    return ",\n ".join(["{" + rest[0], *rest[1:], f'"methods": [\n  {methods}\n ]']) + "\n}\n"


def six_digits(value: Any) -> Any:
    """`value` with six digits of each number that has more."""
    if isinstance(value, Mapping):
        return {key: six_digits(each) for key, each in value.items()}
    if isinstance(value, list):
        return [six_digits(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _needed(method: Mapping[str, Any], rises: Collection[str]) -> dict[str, Any]:
    """`method` without what no page shows, `rises` being the controls' own in what each rate led to."""
    found = _points(
        {key: value for key, value in method.items() if key not in UNUSED}, lambda each: _of(each, MEASURES)
    )
    grid = {
        rate: {**tried, **{at: _of(tried[at], {*MEASURES, *rises}) for at in ("at_target", "final")}}
        for rate, tried in method["grid"].items()
    }
    course, step = method["course"], -(-len(method["course"]) // CURVE) or 1
    # counted from the end, which is what all leads to
    thinned = [{key: each[key] for key in ON_CURVE if key in each} for each in course[::-step][::-1]]
    return {**found, "grid": grid, "course": thinned}


def _changed(method: Mapping[str, Any], change: Callable[[Point], Any]) -> dict[str, Any]:
    return {**_points(method, change), **change({key: method[key] for key in TOTALS})}


def _points(method: Mapping[str, Any], change: Callable[[Point], Any]) -> dict[str, Any]:
    """`method` with each of its points that has measures over seeds changed."""
    found = {**method, "matched": change(method["matched"]), "final": change(method["final"])}
    found["course"] = [change(each) for each in method["course"]]
    frontier = method.get("frontier") or {}
    if "points" in frontier:
        within = [
            {**each, **{mode: change(each[mode]) for mode in ("one", "per_matrix")}} for each in frontier["within"]
        ]
        found["frontier"] = {"points": [change(each) for each in frontier["points"]], "within": within}
    return found


def _of(point: Point, names: Collection[str]) -> Any:
    kept = {*names, *ALSO}
    return point and {key: value for key, value in point.items() if key in kept or key.startswith(HARNESS)}


def _values(point: Point) -> Any:
    return point and {key: each["values"] if isinstance(each, Mapping) else each for key, each in point.items()}


def _grown(point: Point) -> Any:
    return point and {key: over_seeds(each) if isinstance(each, list) else each for key, each in point.items()}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(Path(name), compact(read(Path(name))))
