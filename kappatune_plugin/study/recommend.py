"""What a sweep over budgets implies."""

from collections.abc import Mapping, Sequence
from typing import Any

from kappatune_plugin.console import number
from kappatune_plugin.study.plots import task_measure

# what counts as equal where one seed gives no interval: a point of accuracy, a hundredth of a nat
TOLERANCE = 0.01


def recommend(content: Mapping[str, Any]) -> tuple[str | None, str]:
    """The smallest budget that learns the task as well as the best one, and why, in words.

    As well: its mean is within the half-width of the best one's 95% interval, the usual rule of preferring the simplest
    model that can't be told from the best. What a smaller budget forgets less comes for free then.

    Args:
        content: of sweep.json; its methods go from the smallest budget to the largest.

    Returns:
        The method's name, None where nothing was measured that could decide.
    """
    task = task_measure(content)
    if task is None:
        return None, "No recommendation: the recipe has no data.test, so nothing says how well the task was learned."
    methods = [method for method in content["methods"] if method["final"][task] is not None]
    if not methods:
        return None, "No recommendation: no run ended with a finite measure of the task."
    sign = -1 if task == "task_loss" else 1
    best = max(methods, key=lambda method: sign * method["final"][task]["mean"])
    allowed = best["final"][task]["half"] or TOLERANCE
    bar = sign * best["final"][task]["mean"] - allowed
    chosen = next(method for method in methods if sign * method["final"][task]["mean"] >= bar)
    return chosen["name"], _words(task, chosen, best, allowed, methods)


def _words(
    task: str, chosen: Mapping[str, Any], best: Mapping[str, Any], allowed: float, methods: Sequence[Mapping[str, Any]]
) -> str:
    def budget(method: Mapping[str, Any]) -> str:
        return method["name"].partition("k=")[2]

    def figure(method: Mapping[str, Any]) -> str:
        mean = method["final"][task]["mean"]
        return f"{mean:.3f}" if task == "task_loss" else f"{mean:.1%}"

    margin = f"{allowed:.3f}" if task == "task_loss" else f"{100 * allowed:.1f} points"
    text = f"Recommended: k: {budget(chosen)}, {task.replace('_', ' ')} {figure(chosen)}"
    if chosen is not best:
        text += f", within {margin} of the best ({figure(best)} at k = {budget(best)})"
    if chosen is methods[-1] and len(methods) > 1 and budget(chosen) != "100%":
        text += ". It is the largest that was tried, and a larger one may learn more"
    rise, other = chosen["final"].get("control_loss_change"), best["final"].get("control_loss_change")
    if rise:
        text += f". Control loss {number('{:+.3f}', rise['mean'])} nats a token"
        if chosen is not best and other:
            text += f", against {number('{:+.3f}', other['mean'])}"
    return text + "."
