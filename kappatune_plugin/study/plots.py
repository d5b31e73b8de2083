"""Plots of compare.json and sweep.json, as wide as a README (about 800 pixels)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kappatune_plugin.study.summary import task_at_limits

# colour-blind safe (Okabe and Ito); from the ninth curve on the line style differs too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*<>hp"
LINES = ("-", "--", ":")
WIDTH, LEGEND_BESIDE, DPI = 8.0, 6.2, 100
LINEAR, LONGEST = 0.1, 22
TASKS = {
    "task_accuracy": ("Task accuracy (%)", 100),
    "task_answer_accuracy": ("Task accuracy, written answers (%)", 100),
    "task_loss": ("Task loss (nats a token)", 1),
    "validation_loss": ("Loss on held-out rows (nats a token)", 1),
}


def frontier_plot(content: Mapping[str, Any], path: Path) -> None:
    """What was learned against what was forgotten: one curve over training for each method, means over seeds."""
    task = task_measure(content)
    figure, axes = _figure(4.6, LEGEND_BESIDE)
    label, scale = TASKS[task]
    base = content["before"][task] * scale
    for i, method in enumerate(content["methods"]):
        points = [point for point in method["course"] if point.get(task) and point["control_loss_change"]]
        x = [0.0, *(point["control_loss_change"]["mean"] for point in points)]
        y = [base, *(point[task]["mean"] * scale for point in points)]
        axes.plot(x, y, label=_broken(method["name"]), **_style(i))
    axes.set_xlabel("Forgotten: rise of the control loss (nats a token)")
    ends = [method["course"][-1]["control_loss_change"] for method in content["methods"]]
    _scale(axes, [end["mean"] for end in ends if end])
    axes.set_ylabel(f"Learned: {label[0].lower()}{label[1:]}")
    axes.set_title(
        _title(content, f"One curve a method, a mark every {content['settings']['every']} steps"), loc="left"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    _save(figure, path)


def matched_plot(content: Mapping[str, Any], path: Path) -> None:
    """What each method has forgotten when its training loss first reaches the target: mean and 95% interval."""
    found = [(method, (method["matched"] or {}).get("control_loss_change")) for method in content["methods"]]
    found.sort(key=lambda row: (row[1] is None, row[1]["mean"] if row[1] else 0))
    seeds = len(content["settings"]["seeds"])
    each = [[value for value in (measure or {}).get("values", ()) if value is not None] for _, measure in found]
    labels = [
        _broken(method["name"]) + ("" if len(there) == seeds else f"\n(reached by {len(there)} of {seeds})")
        for (method, _), there in zip(found, each, strict=True)
    ]
    lines = max(label.count("\n") for label in labels) + 1
    figure, axes = _figure(1.2 + (0.14 + 0.11 * lines) * len(found))
    for row, ((_, measure), there) in enumerate(zip(found, each, strict=True)):
        if measure is None:
            continue
        colour = COLOURS[0] if len(there) == seeds else COLOURS[7]
        axes.plot(there, [row] * len(there), "o", color=colour, alpha=0.45, markersize=4, linestyle="none")
        axes.errorbar(measure["mean"], row, xerr=measure["half"], fmt="D", color=colour, capsize=3, markersize=6)
    axes.set_yticks(range(len(found)), labels, fontsize=9)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("Rise of the control loss (nats a token): mean, 95% interval, each seed")
    axes.set_title(
        _title(content, f"Forgotten when the training loss first reaches {content['target_loss']:.3g}"), loc="left"
    )
    _limit_to_means(axes, [measure for _, measure in found if measure])
    _save(figure, path)


def limits_plot(content: Mapping[str, Any], path: Path) -> None:
    """What each method has learned: along the scale of what it changed, and within each limit of forgetting."""
    key = task_at_limits(content)
    label, factor = TASKS[key]
    figure, (above, below) = _figure(7.6, LEGEND_BESIDE, rows=2, sharex=False)
    limits = content["settings"]["frontier"]["limits"]
    scaled = [(i, each) for i, each in enumerate(content["methods"]) if "points" in (each.get("frontier") or {})]
    for row, (i, method) in enumerate(scaled):
        _along_scale(above, method, key, factor, _style(i))
        offset = 0.8 * ((row + 0.5) / len(scaled) - 0.5)
        _within_limits(below, method, key, factor, offset, {**_style(i), "linestyle": "none"})
    for limit in limits:
        above.axvline(limit, color="0.6", linewidth=0.8, linestyle=":")
    above.set_xlabel("Forgotten: rise of the control loss (nats a token), limits dotted")
    # what everything kept forgets may be many times the limits
    above.set_xlim(-0.05 * max(limits), 1.5 * max(limits))
    above.set_title(_title(content, "What was trained, scaled back step by step"), loc="left")
    above.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=9)
    below.set_xticks(range(len(limits)), [f"{limit:g}" for limit in limits])
    below.set_xlabel("Limit of the rise of the control loss (nats a token)")
    below.set_title("Learned within each limit, one scale for all: mean and 95% interval", loc="left")
    for axes in (above, below):
        axes.set_ylabel(f"Learned: {label[0].lower()}{label[1:]}")
    figure.subplots_adjust(hspace=0.4)
    _save(figure, path)


def _along_scale(axes: Axes, method: Mapping[str, Any], key: str, factor: float, style: Mapping[str, Any]) -> None:
    """A method's curve from the base to all that was trained, means over seeds."""
    points = [*method["frontier"]["points"], *(each["one"] for each in method["frontier"]["within"])]
    points = sorted((each for each in points if each[key] and each["rise"]), key=lambda each: each["scale"]["mean"])
    rises, means = ([point[of]["mean"] for point in points] for of in ("rise", key))
    axes.plot(rises, [mean * factor for mean in means], label=_broken(method["name"]), **style)


def _within_limits(
    axes: Axes, method: Mapping[str, Any], key: str, factor: float, offset: float, style: Mapping[str, Any]
) -> None:
    """A mark with its interval beside each limit, `offset` from its tick."""
    measures = [(place, each["one"][key]) for place, each in enumerate(method["frontier"]["within"])]
    there = [(place + offset, measure["mean"], measure["half"] or 0) for place, measure in measures if measure]
    if there:
        places, means, halves = zip(*there, strict=True)
        scaled = [[value * factor for value in values] for values in (means, halves)]
        axes.errorbar(places, scaled[0], yerr=scaled[1], **style, capsize=2)


def budget_plot(content: Mapping[str, Any], path: Path, recommended: str | None) -> None:
    """What was learned and what was forgotten with each budget, with 95% intervals over seeds."""
    task = task_measure(content)
    label, scale = TASKS[task]
    figure, (above, below) = _figure(5.2, rows=2)
    methods = content["methods"]
    for axes, key, factor, title, colour in (
        (above, task, scale, label, COLOURS[0]),
        (below, "control_loss_change", 1, "Rise of the control\nloss (nats a token)", COLOURS[1]),
    ):
        # a budget whose runs diverged has no measure to draw
        there = [(place, method["final"][key]) for place, method in enumerate(methods) if method["final"][key]]
        means = [measure["mean"] * factor for _, measure in there]
        halves = [(measure["half"] or 0) * factor for _, measure in there]
        axes.errorbar([place for place, _ in there], means, yerr=halves, fmt="o-", color=colour, capsize=3)
        axes.set_ylabel(title)
    ticks = [_budget_label(content, method, method["name"] == recommended) for method in methods]
    below.set_xticks(range(len(methods)), ticks)
    below.set_xlim(-0.5, len(methods) - 0.5)
    below.set_xlabel("k (share of the model's parameters trained)")
    above.set_title(_title(content, f"After {content['steps']} steps"), loc="left")
    _save(figure, path)


def _budget_label(content: Mapping[str, Any], method: Mapping[str, Any], recommended: bool) -> str:
    share = method["trainable"]["mean"] / content["parameters"]
    return f"{method['name'].partition('k=')[2]}\n({share:.1%})" + ("\nrecommended" if recommended else "")


def task_measure(content: Mapping[str, Any]) -> str | None:
    """The key of the task's measure; None for a recipe without test rows."""
    return next((key for key in TASKS if key in content["before"]), None)


def _figure(height: float, width: float = WIDTH, rows: int = 1, sharex: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=DPI)
    with rc_context({"axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True}):
        axes = figure.subplots(rows, 1, sharex=sharex)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i // len(COLOURS) % len(LINES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _title(content: Mapping[str, Any], text: str) -> str:
    name = "/".join(Path(str(content["recipe"]["model_name_or_path"])).parts[-2:])
    seeds = len(content["settings"]["seeds"])
    return f"{text}\n{name}, {seeds} seed{'s' if seeds > 1 else ''}"


def _limit_to_means(axes: Axes, measures: Sequence[Mapping[str, Any]]) -> None:
    """Limit the x axis by the measured values: an interval of two or three seeds may be many times wider."""
    values = [value for measure in measures for value in measure["values"] if value is not None]
    if values:
        low, high = min(0.0, *values), max(0.0, *values)
        margin = 0.15 * (high - low) or 0.01
        if _scale(axes, values):
            axes.set_xlim(low - LINEAR / 2, 1.5 * high)
        else:
            axes.set_xlim(low - margin, high + margin)


def _scale(axes: Axes, values: Sequence[float]) -> bool:
    """Make the x axis logarithmic beyond `LINEAR` nats if one method forgets so much that the others would coincide.
    Returns whether it did."""
    if not values or max(values) < 10 * LINEAR:
        return False
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.5, subs=(2, 5))
    axes.set_xlabel(f"{axes.get_xlabel()}\n(logarithmic from {LINEAR:g} on)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    return True


def _broken(name: str) -> str:
    """A long name broken into a line for each setting."""
    return name if len(name) <= LONGEST else name.replace(":", "\n:")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
