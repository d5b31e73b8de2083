"""Figures from the committed comparisons, as docs/RESULTS-small-models.md shows them."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from kappatune_plugin.study.summary import over_seeds
from kappatune_plugin.study.tables import shown


def outcome(content: Mapping[str, Any], name: str) -> str:
    method = method_of(content, name)
    if method["matched"] is None:
        return f"doesn't get there in {content['steps']} steps"
    return f"{rise(content, name)} in {steps(content, name)} steps"


def accuracy(content: Mapping[str, Any], name: str) -> str:
    return shown(method_of(content, name)["final"]["task_accuracy"], "{:.1%}")


def rise(content: Mapping[str, Any], name: str, where: str = "matched") -> str:
    """What a method has forgotten, as the tables show it."""
    return shown(method_of(content, name)[where]["control_loss_change"], "{:+.3f}")


def steps(content: Mapping[str, Any], name: str) -> str:
    """How many steps a method takes to the target."""
    return f"{method_of(content, name)['matched']['step']['mean']:.0f}"


def difference(content: Mapping[str, Any], name: str, other: str) -> str:
    """How much more `name` has forgotten at the target than `other`, paired by seed."""
    return against(method_of(content, name)["matched"], method_of(content, other)["matched"])


def less_than(content: Mapping[str, Any], name: str, other: str) -> str:
    """ "2 of 3": how many runs of `name` have forgotten less at the target than every run of `other`."""
    mine, others = (method_of(content, each)["matched"]["control_loss_change"]["values"] for each in (name, other))
    return f"{sum(value < min(others) for value in mine)} of {len(mine)}"


def method_of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(method for method in content["methods"] if method["name"] == name)


def at_two_rates(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Method -> forgetting at the target with the grid's lowest and highest rate (first seed)."""
    found = {}
    for method in content["methods"]:
        tries = [method["grid"][rate]["at_target"] for rate in sorted(method["grid"], key=float)]
        if len(tries) > 1 and tries[0] and tries[-1]:
            found[f"`{method['name']}`"] = tries[0]["control_loss_change"], tries[-1]["control_loss_change"]
    return found


def against(found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """The paired difference in forgetting, in bold where its interval excludes zero."""
    if reference is None:
        return ""
    pairs = zip(found["control_loss_change"]["values"], reference["control_loss_change"]["values"], strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return ""
    each = over_seeds(differences)
    text = shown(each, "{:+.3f}")
    return f"**{text}**" if each["half"] is not None and abs(each["mean"]) > each["half"] else text


def times_a_third(content: Mapping[str, Any]) -> list[float]:
    """Forgetting at the end with a rate over that with the next lower one, for each method and pair of rates."""
    ratios = []
    for method in content["methods"]:
        ends = [method["grid"][rate]["final"]["control_loss_change"] for rate in sorted(method["grid"], key=float)]
        ratios += [high / low for low, high in pairwise(ends) if low and high]
    return ratios


def gentlest(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Method -> (rate, forgetting at the end), of the rate that forgets least among those whose held-out loss is no
    worse than the worst method's best."""
    grids = {method["name"]: method["grid"] for method in content["methods"]}
    losses = {name: {rate: tried["validation_loss"] for rate, tried in grid.items()} for name, grid in grids.items()}
    bar = max(min(loss for loss in each.values() if loss is not None) for each in losses.values())
    found = {}
    for name, grid in grids.items():
        good = [rate for rate, loss in losses[name].items() if loss is not None and loss <= bar]
        ends = {rate: grid[rate]["final"]["control_loss_change"] for rate in good}
        rate = min(ends, key=lambda rate: ends[rate])
        found[name] = (float(rate), ends[rate])
    return found
