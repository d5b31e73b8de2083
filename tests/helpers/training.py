"""Short runs on a CPU: their settings, a recipe trained whole, and what came of it."""

from pathlib import Path

import torch
from transformers import Trainer

from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import RunResult, run_sft
from kappatune_plugin.weights.units import find_units, unit_matrix

# of TRL's configs, for a silent run on this machine that logs each step
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def train(folder: Path, model: Path, *overrides: str, **changes: object) -> RunResult:
    """Run the tiny recipe with `changes`, its files in `folder`, and command line words `overrides` laid over it."""
    path = write_recipe(folder / "recipe.yaml", tiny_recipe(folder, model, **changes))
    return run_sft(load_recipe(path, overrides))


def losses(trainer: Trainer) -> list[float]:
    """The training loss of each logged step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def unit_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the model's weight matrices (rows, columns) by their names."""
    return {unit.name: unit_matrix(model, unit).clone() for unit in find_units(model)}
