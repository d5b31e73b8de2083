"""What each method has learned within a limit of forgetting: a picture for a model, a panel for each of its tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from levers import counted
from matplotlib import rc_context
from matplotlib.figure import Figure
from real_tables import LOSS

from kappatune_plugin.study.plots import COLOURS
from kappatune_plugin.study.summary import within_limit

# a strict limit and a loose one: four would hide each other
LIMITS = (0.02, 0.1)


def plot(contents: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The loss on test rows of every method within two limits, mean and 95% interval over seeds.

    Args:
        contents: the words for a task -> the model's comparison on it.
    """
    names = list(dict.fromkeys(method["name"] for each in contents.values() for method in each["methods"]))
    figure = Figure(figsize=(2.2 + 2.6 * len(contents), 1.2 + 0.3 * len(names)), dpi=100, layout="constrained")
    with rc_context({"axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True}):
        panels = figure.subplots(1, len(contents), sharey=True, squeeze=False)[0]
    for axes, (title, content) in zip(panels, contents.items(), strict=True):
        _panel(axes, content, names)
        axes.set_title(f"{title}\n{counted(len(content['settings']['seeds']), 'seed')}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [name.replace(":rank_by=", "\n") for name in names], fontsize=8)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _panel(axes: Any, content: Mapping[str, Any], names: list[str]) -> None:
    methods = {method["name"]: method for method in content["methods"]}
    limits = content["settings"]["frontier"]["limits"]
    for row, limit in enumerate(each for each in LIMITS if each in limits):
        found = [
            (place + 0.3 * (row - 0.5), point[LOSS])
            for place, name in enumerate(names)
            if name in methods and (point := within_limit(methods[name], limits.index(limit))) and point[LOSS]
        ]
        means = [measure["mean"] for _, measure in found]
        halves = [measure["half"] or 0 for _, measure in found]
        style = {"fmt": "os"[row], "color": COLOURS[row], "capsize": 2, "markersize": 4}
        axes.errorbar(means, [place for place, _ in found], xerr=halves, label=f"within {limit:g} nats", **style)
    axes.set_xlabel(f"Loss on test rows (the base: {content['before'][LOSS]:.2f})", fontsize=8)
    axes.tick_params(labelsize=8)
