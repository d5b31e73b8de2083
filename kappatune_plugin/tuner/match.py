"""`match`: as many trained values as another method has, by a budget of whole matrices or by the rank of pairs."""

from collections.abc import Sequence

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.tuner.config import LORA, UNIFORM_LORA, KappaTuneConfig
from kappatune_plugin.weights.load_model import trained_without_values
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.units import WeightUnit


def match_budget(config: KappaTuneConfig, source: ModelSource) -> None:
    """With `adapter: full`, put the budget `k` in the place of `match`."""
    if config.match is not None and config.adapter != LORA:
        config.k, config.match = {"params": wanted(config, source)}, None


def match_rank(config: KappaTuneConfig, source: ModelSource, units: Sequence[WeightUnit]) -> None:
    """With `adapter: lora`, put the rank nearest to `match` in its place; set `lora_alpha` where it follows from r."""
    if config.match is not None and units:
        config.r = max(1, round(wanted(config, source) / sum(sum(unit.shape) for unit in units)))
        config.match = None
    if config.adapter == LORA and config.lora_alpha is None:
        config.lora_alpha = float(config.r)


def wanted(config: KappaTuneConfig, source: ModelSource) -> int:
    """The number of values that `match` asks for; LoRA's as PEFT itself attaches it, to a copy without values.

    Raises:
        KappaTuneError: the model can't be built from its config.
    """
    if not isinstance(config.match, str):
        return int(parse_budget(config.match).value)
    rank = int(UNIFORM_LORA.fullmatch(config.match)[1])
    try:
        with torch.device("meta"):
            empty = type(source.model)(source.model.config)
        return trained_without_values(empty, LoraConfig(r=rank, target_modules="all-linear"))[1]
    except (AttributeError, TypeError, ValueError) as error:
        raise KappaTuneError(
            f"match: {config.match}: can't count it for this model ({error}). Give a number."
        ) from error


def is_linear(model: nn.Module, unit: WeightUnit) -> bool:
    """Whether a unit is the weight of a whole linear layer, which PEFT's LoRA can adapt."""
    name, _, attribute = unit.parameter.rpartition(".")
    return not unit.index and attribute == "weight" and isinstance(model.get_submodule(name), nn.Linear | Conv1D)
