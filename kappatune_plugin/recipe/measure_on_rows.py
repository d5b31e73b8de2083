"""A `rank_by` that is measured on the training rows of a run: what it needs of a recipe that no other ranking does."""

import copy
from typing import Any

from datasets import Dataset
from torch import nn

from kappatune_plugin.distributed.shards import is_partitioned
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.scanning.experts import with_expert_use
from kappatune_plugin.scanning.gain import with_gain
from kappatune_plugin.selection.criteria import EXPERTS, ON_ROWS
from kappatune_plugin.selection.report import KappaReport, only_ranked
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.tuner.what_to_train import full_report, given_report


def needs_rows(config: KappaTuneConfig) -> bool:
    """Whether `config` ranks by what is measured on rows, and brings neither a selection nor a report that has it."""
    if config.rank_by not in ON_ROWS or config.selection is not None:
        return False
    report = given_report(config)
    return report is None or any(config.rank_by not in row.scores for row in report.units if row.status == "ok")


def config_with_scores(recipe: Recipe, model: nn.Module, tokenizer: Any, train: Dataset) -> KappaTuneConfig:
    """The recipe's config with a kappa report that has the values of its `rank_by`, measured on the rows of `train`.

    Ranked by the use of experts, the report holds their matrices only.

    Raises:
        KappaTuneError: as `with_scores`.
    """
    config = copy.copy(recipe.kappatune)
    report = with_scores(recipe, model, tokenizer, train, full_report(config, model), config.rank_by)
    config.report = only_ranked(report, config.rank_by)
    return config


def with_scores(
    recipe: Recipe, model: nn.Module, tokenizer: Any, train: Dataset, report: KappaReport, rank_by: str
) -> KappaReport:
    """`report`, of `model`, with the values of `rank_by` measured on the rows of `train`.

    Raises:
        KappaTuneError: as `with_gain` and `with_expert_use`, several processes, or a model that is divided.
    """
    if recipe.training_args.world_size > 1 or any(is_partitioned(parameter) for parameter in model.parameters()):
        raise KappaTuneError(
            f"rank_by: {rank_by} is measured in one process that holds the whole model, without ZeRO-3: run the recipe "
            "in one with `--max_steps 1`, then name its kappa_report.json in kappatune.report."
        )
    model.to(recipe.training_args.device)
    measure = with_expert_use if rank_by in EXPERTS else with_gain
    return measure(report, model, tokenizer, train, recipe.gain, recipe.training_args.dataset_text_field)
