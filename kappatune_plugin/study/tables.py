"""compare.json as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kappatune_plugin.console import number, short_number

# key of a measure -> heading, how to show it
MEASURES = {
    "task_accuracy": ("task\naccuracy", "{:.1%}"),
    "task_answer_accuracy": ("written\nanswers", "{:.1%}"),
    "task_loss": ("task\nloss", "{:.3f}"),
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
