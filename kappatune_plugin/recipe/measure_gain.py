"""`rank_by: gain_over_forgetting` in a run: what it needs of a recipe that no other ranking does."""

import copy
from typing import Any

from datasets import Dataset
from torch import nn

from kappatune_plugin.distributed.shards import is_partitioned
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.scanning.gain import GAIN, with_gain
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.tuner.what_to_train import full_report, given_report


def needs_gain(config: KappaTuneConfig) -> bool:
    """Whether `config` ranks by gain over forgetting and brings neither a selection nor a report that has it."""
    if config.rank_by != GAIN or config.selection is not None:
        return False
    report = given_report(config)
    return report is None or any(GAIN not in row.scores for row in report.units if row.status == "ok")


def config_with_gain(
    recipe: Recipe, model: nn.Module, tokenizer: Any, train: Dataset, report: KappaReport | None = None
) -> KappaTuneConfig:
    """The recipe's config with a kappa report that has the score, measured on `model` and the rows of `train`.

    Args:
        report: of `model`; None scans it, or takes the recipe's.

    Raises:
        KappaTuneError: as `with_gain`, several processes, or a model that is divided.
    """
    if recipe.training_args.world_size > 1 or any(is_partitioned(parameter) for parameter in model.parameters()):
        raise KappaTuneError(
            f"rank_by: {GAIN} is measured in one process that holds the whole model, without ZeRO-3: run the recipe in "
            "one with `--max_steps 1`, then name its kappa_report.json in kappatune.report."
        )
    config = copy.copy(recipe.kappatune)
    report = report or full_report(config, model)
    field = recipe.training_args.dataset_text_field
    model.to(recipe.training_args.device)
    config.report = with_gain(report, model, tokenizer, train, recipe.gain, field)
    return config
