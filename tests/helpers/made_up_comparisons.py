"""Comparisons that nobody ran, to be shown."""

import io

from rich.console import Console

from kappatune_plugin.study.summary import over_seeds
from kappatune_plugin.study.tables import comparison_tables


def entry(name: str, accuracy: list[float], rise: list[float], reached: bool = True) -> dict:
    """A method with these test accuracies and rises of the control loss, a value a seed."""
    at = {
        "step": over_seeds([8.0] * len(accuracy)),
        "task_accuracy": over_seeds(accuracy),
        "control_loss_change": over_seeds(rise),
        "replay_error": over_seeds([0.0] * len(accuracy)),
    }
    return {
        "name": name,
        "learning_rate": 1e-3,
        "at_edge_of_grid": False,
        "trainable": over_seeds([1000.0]),
        "seconds": over_seeds([1.0]),
        "training_mib": over_seeds([2.0]),
        "lowest_loss": over_seeds([0.4] * len(accuracy)),
        "matched": at if reached else None,
        "final": at,
        "course": [at],
    }


def made_up(*entries: dict, seeds: int = 3) -> dict:
    """The content of a compare.json with these methods."""
    return {
        "settings": {"seeds": list(range(seeds)), "every": 4},
        "target_loss": 0.5,
        "steps": 8,
        "parameters": 4000,
        "before": {"task_accuracy": 0.5, "a_ppl": 2.0},
        "recipe": {"model_name_or_path": "m"},
        "methods": list(entries),
    }


def text(content: dict) -> str:
    """The tables of a comparison as a terminal shows them."""
    out = Console(file=io.StringIO(), width=120)
    for part in comparison_tables(content):
        out.print(part)
    return out.file.getvalue()
