"""compare.json as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kappatune_plugin.console import number, short_number
from kappatune_plugin.study.summary import leaders, task_at_limits

# key of a measure -> heading, how to show it
MEASURES = {
    "task_accuracy": ("task\naccuracy", "{:.1%}"),
    "task_answer_accuracy": ("written\nanswers", "{:.1%}"),
    "task_loss": ("task\nloss", "{:.3f}"),
    "validation_loss": ("held-out\nloss", "{:.3f}"),
    "control_loss_change": ("control\nloss", "{:+.3f}"),
    "control_ppl_change": ("control\nperplexity", "{:+.2f}"),
    "control_kl": ("KL on\ncontrol", "{:.3f}"),
    "task_text_kl": ("KL on\ntask text", "{:.2f}"),
    "recall": ("recall", "{:.1%}"),
}


def comparison_tables(content: Mapping[str, Any]) -> list[Table | Text]:
    """Tables at the target loss, after equal steps, and of each method's cost; and notes."""
    seeds = len(content["settings"]["seeds"])
    spread = f"mean ± 95% interval over {seeds} seeds" if seeds > 1 else "one seed: no interval"
    target = content["target_loss"]
    named = "no run has a smoothed training loss" if target is None else f"{target:.4g}"
    at_the_end = [_measures(content, "final", f"After {content['steps']} steps ({spread})")]
    return [
        _measures(content, "matched", f"When the smoothed training loss first reaches {named} ({spread})"),
        *_limits(content, spread),
        *(at_the_end if any(method["final"] for method in content["methods"]) else []),
        _costs(content),
        *_notes(content),
    ]


def shown(measure: Mapping[str, Any] | None, form: str, gap: str = " ") -> str:
    """ "97.0% ± 1.2", "0.053 ± .012" or "-", with `gap` before the sign."""
    if measure is None:
        return "-"
    text = number(form, measure["mean"])
    if measure["half"] is None:
        return text
    share = form.endswith("%}")
    half = form.replace("+", "").format(measure["half"]).removesuffix("%")
    return f"{text}{gap}± {half if share else half.lstrip('0') or '0'}"


def _measures(content: Mapping[str, Any], where: str, title: str) -> Table:
    table = _table(title)
    table.add_column("method", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    keys = [key for key in MEASURES if any(key in (method[where] or {}) for method in content["methods"])]
    for key in keys:
        table.add_column(MEASURES[key][0], justify="right", no_wrap=True)
    for method in content["methods"]:
        found = method[where]
        if found is None:
            lowest = method["lowest_loss"]
            best = f"(lowest {min(_there(lowest)):.3g})" if lowest else "(diverged)"
            table.add_row(method["name"], f"not reached\n{best}", *("" for _ in keys))
            continue
        reached = len(_there(found["step"]))
        steps = f"{found['step']['mean']:.0f}"
        if reached < len(content["settings"]["seeds"]):
            steps += f"\n{reached} of {len(content['settings']['seeds'])} seeds"
        table.add_row(method["name"], steps, *(shown(found.get(key), MEASURES[key][1], "\n") for key in keys))
    return table


def _limits(content: Mapping[str, Any], spread: str) -> list[Table | Text]:
    """What each method has learned within each limit of forgetting, and who learned most; nothing without scales."""
    key = task_at_limits(content)
    if key is None:
        return []
    limits = content["settings"]["frontier"]["limits"]
    what = MEASURES[key][0].replace("\n", " ").capitalize()
    table = _table(f"{what} within a limit of forgetting, everything trained scaled back to it ({spread})")
    for heading in ("method", *(f"{limit:g}\nnats" for limit in limits), "all\nkept"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for method in content["methods"]:
        frontier = method.get("frontier") or {}
        if "points" not in frontier:
            table.add_row(method["name"], *("-" for _ in limits), "-")
            continue
        for mode, label in (("one", method["name"]), ("per_matrix", "  a scale a matrix")):
            points = [each[mode] for each in frontier["within"]]
            if any(points):
                whole = frontier["points"][-1] if mode == "one" else None
                table.add_row(label, *(_at_scale(point, key) for point in [*points, whole]))
    return [table, *(Text(note) for note in _limit_notes(content, key))]


def _at_scale(point: Mapping[str, Any] | None, key: str) -> str:
    if point is None:
        return ""
    return f"{shown(point[key], MEASURES[key][1], chr(10))}\n×{number('{:.2f}', point['scale']['mean'])}"


def _limit_notes(content: Mapping[str, Any], key: str) -> list[str]:
    notes = []
    modes = {"one": "one scale for all", "per_matrix": "a scale a matrix"}
    for mode, words in modes.items():
        alike: dict[str, list[str]] = {}
        for place, limit in enumerate(content["settings"]["frontier"]["limits"]):
            found = leaders(content, place, key, mode)
            if found and len(content["methods"]) > 1:
                alike.setdefault(_most(*found, len(content["settings"]["seeds"])), []).append(f"{limit:g}")
        notes += [f"Within {', '.join(limits)} nats, {words}: {said}" for said, limits in alike.items()]
    notes.append(
        "×: share kept of what was trained, chosen on held-out rows and one half of the control. "
        f"{_unseen(content)} Neither that half nor test rows chose anything."
    )
    reasons = {method["name"]: (method.get("frontier") or {}).get("why_not") for method in content["methods"]}
    return notes + [f"{name} was not scaled back: {why}" for name, why in reasons.items() if why]


def _most(best: str, others: Sequence[str], seeds: int) -> str:
    if seeds < 2:
        return f"{best} learned most (one seed: no interval)."
    if not others:
        return f"{best} learned most, by more than chance (95% interval of each difference, seed by seed)."
    return f"{best} learned most; by the 95% interval of the difference it may be chance against {', '.join(others)}."


def _unseen(content: Mapping[str, Any]) -> str:
    """How far the rise on the half of the control that chose nothing goes beyond a limit."""
    shares = []
    for method in content["methods"]:
        for each in (method.get("frontier") or {}).get("within", ()):
            points = [each[mode] for mode in ("one", "per_matrix") if each[mode] and each[mode]["rise"]]
            shares += [(point["rise"]["mean"] / each["limit"], each["limit"], method["name"]) for point in points]
    if not shares:
        return ""
    share, limit, name = max(shares)
    if share <= 1:
        return "On the other half every method's mean rise is within each limit too."
    return f"On the other half {name} is furthest above its limit: {share * limit:.3g} at {limit:g}."


def _costs(content: Mapping[str, Any]) -> Table:
    table = _table("What each method trains, at its learning rate of lowest validation loss")
    for heading in ("method", "learning\nrate", "trainable\nparameters", "lowest smoothed\ntraining loss", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    table.add_column("gradients and\noptimizer, MiB", justify="right")
    for method in content["methods"]:
        rate = f"{method['learning_rate']:g}" + (" *" if method["at_edge_of_grid"] else "")
        table.add_row(
            method["name"],
            rate,
            f"{method['trainable']['mean']:,.0f}",
            shown(method["lowest_loss"], "{:.3f}"),
            shown(method["seconds"], "{:.1f}"),
            short_number(method["training_mib"]["mean"]),
        )
    return table


def _notes(content: Mapping[str, Any]) -> list[Text]:
    notes = []
    if any(method["at_edge_of_grid"] for method in content["methods"]):
        notes.append("* at an edge of the grid: a wider one (--learning_rates, --widen 2) may find a better rate.")
    matched = {method["name"]: method["matched"] for method in content["methods"]}
    missed = [name for name, at in matched.items() if at is None or None in at["step"]["values"]]
    if missed:
        notes.append(
            f"Not all runs of {', '.join(missed)} reach the target: what they would have forgotten there isn't known. "
            "Train longer (--max_steps), or choose a higher --target_loss."
        )
    errors = [max(_there(at["replay_error"])) for at in matched.values() if at]
    if errors and max(errors) > 0:
        notes.append(
            f"Runs repeated up to the target departed by up to {max(errors):.2g} from their training loss: this "
            "machine's arithmetic doesn't repeat itself."
        )
    if len(content["settings"]["seeds"]) < 2:
        notes.append("One seed gives no interval, and differences may be chance: use --seeds 3 or more.")
    return [Text(note) for note in notes]


def _there(measure: Mapping[str, Any]) -> Sequence[float]:
    return [value for value in measure["values"] if value is not None]


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
