"""The commands `kappatune compare` and `kappatune sweep`: load, run, write, show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappatune_plugin.console import console, number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import check_writable, write_json
from kappatune_plugin.interpolation.dial import PER_MATRIX
from kappatune_plugin.recipe.recipe import Recipe, load_recipe
from kappatune_plugin.run.settings import setting_problem
from kappatune_plugin.selection.budget import budget, parse_budget
from kappatune_plugin.study import DEFAULT_SCALES
from kappatune_plugin.study.bench import Bench, check_comparable
from kappatune_plugin.study.compare import compare
from kappatune_plugin.study.methods import parse_methods, split_list
from kappatune_plugin.study.plots import budget_plot, frontier_plot, limits_plot, matched_plot, task_measure
from kappatune_plugin.study.settings import Frontier, Settings
from kappatune_plugin.study.summary import task_at_limits
from kappatune_plugin.study.tables import comparison_tables

GRID = (0.3, 1.0, 3.0)
MEASUREMENTS = 10
OFF = "off"


@dataclass(frozen=True)
class Asked:
    """The arguments of `compare` or `sweep`.

    Attributes:
        config, overrides: the recipe.
        seeds: number of seeds, starting at the recipe's.
        learning_rates: the grid as written; None for the command's default.
        every, smooth, target_loss, stop_at_target, widen: as in `Settings`; `every` None for a tenth of the run.
        validation: share of the training rows to hold out.
        output_dir: None for the recipe's with the command's name appended.
        scales, limits: as in `Frontier`, as written; `scales` "off" to scale nothing back; `limits` None for the
            recipe's forgetting.max_delta, or the default without one.
        kl: as in `Bench`.
    """

    config: Path
    overrides: Sequence[str]
    seeds: int = 3
    learning_rates: str | None = None
    every: int | None = None
    smooth: int = 10
    target_loss: float | None = None
    validation: float = 0.1
    output_dir: Path | None = None
    stop_at_target: bool = False
    widen: int = 0
    scales: str = DEFAULT_SCALES
    limits: str | None = None
    kl: bool = True


def compare_session(asked: Asked, methods: str) -> dict[str, Any]:
    """Compare `methods`, show the tables, and write compare.json, frontier.png, matched.png and
    limits.png.

    Returns:
        The content of compare.json.
    """
    chosen = parse_methods(methods)
    ranks = [method.settings[key] for method in chosen for key in ("rank_by", "within") if key in method.settings]
    bench, settings, folder = _prepare(asked, GRID, "compare", ranks)
    content = compare(bench, chosen, settings, folder)
    write_json(folder / "compare.json", content)
    _show(comparison_tables(content))
    left = ["compare.json"]
    if task_measure(content) and _has_controls(content) and not settings.stop_at_target:
        frontier_plot(content, folder / "frontier.png")
        left.append("frontier.png")
    if content["target_loss"] is not None and _has_controls(content):
        matched_plot(content, folder / "matched.png")
        left.append("matched.png")
    left += _limits_plot(content, folder)
    _say_where(folder, left)
    return content


def sweep_session(asked: Asked, budgets: str) -> dict[str, Any]:
    """Train with each of `budgets` ("10%,25%"), show tables and a recommendation, write sweep.json, budgets.png and
    limits.png.

    Returns:
        The content of sweep.json.

    Raises:
        KappaTuneError: a budget that can't be read, or is given twice.
    """
    each = split_list(budgets)
    for k in each:
        parse_budget(budget(k))
    bench, settings, folder = _prepare(asked, (1.0,), "sweep")
    order = bench.recipe.kappatune.order
    content = compare(bench, parse_methods(",".join(f"{order}:k={k}" for k in each)), settings, folder)
    content["methods"].sort(key=lambda method: method["trainable"]["mean"])
    name, why = recommend(content)
    content["recommendation"] = {"method": name, "why": why}
    write_json(folder / "sweep.json", content)
    _show([*comparison_tables(content), why])
    left = ["sweep.json"]
    if task_measure(content) and _has_controls(content):
        budget_plot(content, folder / "budgets.png", name)
        left.append("budgets.png")
    left += _limits_plot(content, folder)
    _say_where(folder, left)
    return content


def _prepare(asked: Asked, grid: Sequence[float], what: str, ranks: Sequence[str] = ()) -> tuple[Bench, Settings, Path]:
    recipe = load_recipe(asked.config, asked.overrides)
    check_comparable(recipe)
    args = recipe.training_args
    if problem := setting_problem(args):
        raise KappaTuneError(problem)
    rates = _rates(asked.learning_rates, args.learning_rate, grid)
    seeds = tuple(range(args.seed, args.seed + asked.seeds))
    every = 1 if asked.every is None else asked.every
    frontier = _frontier(asked, recipe)
    as_asked = {key: getattr(asked, key) for key in ("smooth", "target_loss", "stop_at_target", "widen")}
    # before the model is loaded, so that mistakes show at once
    settings = Settings(seeds=seeds, learning_rates=rates, every=every, frontier=frontier, **as_asked)
    if args.max_steps > 0:
        _check_smooth(settings.smooth, args.max_steps)
    folder = asked.output_dir or Path(f"{args.output_dir}-{what}")
    check_writable(folder)
    bench = Bench.load(asked.config, asked.overrides, asked.validation, ranks, asked.kl)
    _check_smooth(settings.smooth, bench.steps)
    if asked.every is None:
        settings = settings.model_copy(update={"every": max(1, bench.steps // MEASUREMENTS)})
    return bench, settings, folder


def _check_smooth(smooth: int, steps: int) -> None:
    if smooth > steps:
        raise KappaTuneError(
            f"smooth: a mean over {smooth} steps, and a run has {steps}: write --smooth {steps} or less."
        )


def _rates(text: str | None, recipes: float, grid: Sequence[float]) -> tuple[float, ...]:
    if text is None:
        return tuple(recipes if factor == 1 else float(f"{factor * recipes:.2g}") for factor in grid)
    return _numbers("learning_rates", text, "3e-4,1e-3,3e-3")


def _numbers(key: str, text: str, example: str) -> tuple[float, ...]:
    try:
        numbers = sorted({float(each) for each in text.split(",")})
    except ValueError as error:
        raise KappaTuneError(f"{key}: '{text}' are not numbers. Write {example}.") from error
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise KappaTuneError(f"{key}: '{text}' are not all above 0 and finite. Write {example}.")
    return tuple(numbers)


def _frontier(asked: Asked, recipe: Recipe) -> Frontier | None:
    """How finished runs are scaled back; None where nothing is asked for, or no control says what was forgotten."""
    config = recipe.forgetting
    if asked.scales == OFF or config is None or not config.controls():
        return None
    scales = _numbers("scales", asked.scales, f"{DEFAULT_SCALES} or {OFF}")
    # 1 is always measured
    chosen: dict[str, Any] = {"scales": tuple(scale for scale in scales if scale != 1)}
    if asked.limits is not None:
        chosen["limits"] = _numbers("limits", asked.limits, "0.02,0.05")
    elif config.max_delta is not None:
        chosen["limits"] = (config.max_delta,)
    # a recipe with a limit says how it would be kept
    if config.max_delta is not None:
        chosen["per_matrix"] = config.interpolate in (None, PER_MATRIX)
    return Frontier(**chosen)


def _limits_plot(content: Mapping[str, Any], folder: Path) -> list[str]:
    """limits.png, if any run was scaled back; what it left."""
    if not task_at_limits(content):
        return []
    limits_plot(content, folder / "limits.png")
    return ["limits.png"]


def _has_controls(content: Mapping[str, Any]) -> bool:
    return any(key.endswith("_ppl") for key in content["before"])


def _show(parts: Sequence[Any]) -> None:
    out = console()
    for part in parts:
        out.print(part, highlight=False)


def _say_where(folder: Path, left: Sequence[str]) -> None:
    console().print(f"Left in {folder}: {' and '.join(left)}.", highlight=False, soft_wrap=True)


# what counts as equal where one seed gives no interval: a point of accuracy, a hundredth of a nat
TOLERANCE = 0.01


def recommend(content: Mapping[str, Any]) -> tuple[str | None, str]:
    """The smallest budget that learns the task as well as the best one, and the reason as a sentence.

    As well means that its mean is within the half-width of the best one's 95% interval: the usual rule, to prefer the
    simplest model that can't be distinguished from the best. A smaller budget forgets less at no cost then.

    Args:
        content: of sweep.json; its methods go from the smallest budget to the largest.

    Returns:
        The method's name (None if nothing was measured that could decide), and the sentence.
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
