"""PEFT's own LoRA on the matrices that KappaTune selects; its adapters load without this package."""

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.tuner.what_to_train import (
    given_selection,
    report_for_selection,
    selected_units,
    selection_from,
    trained_whole,
)
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.units import WeightUnit


def lora_config(
    model: nn.Module,
    config: KappaTuneConfig,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> LoraConfig:
    """A config of PEFT's LoRA for the matrices that `config` selects of `model`, and for no others.

    Args:
        model: without adapters; it isn't changed.
        config: what to select, and `modules_to_save` and `task_type`, which are handed on.
        r, lora_alpha, lora_dropout, use_rslora: as in `peft.LoraConfig`; `lora_alpha` is `r` where it is None.

    Raises:
        KappaTuneError: a selected matrix is no whole linear layer, such as one expert of a fused parameter, which
            PEFT's LoRA can't name; or `r` isn't between 1 and the smallest dimension of each; or nothing is selected.
    """
    source = ModelSource(model)
    hashes = source.base_hashes()
    selection = given_selection(config, source)
    if selection is None:
        selection = selection_from(report_for_selection(config, source, hashes), config)
    found = {unit.name: unit for unit in source.units}
    units = selected_units(selection, found, hashes, "", trained_whole(config, source))
    owners = [_linear_name(model, unit) for unit in units]
    _check_rank(units, r)
    # PEFT takes a name for every module whose own name ends with it
    endings = tuple(f".{name}" for name in owners)
    others = [name for name, _ in model.named_modules() if name.endswith(endings) and name not in owners]
    return LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        target_modules=owners,
        exclude_modules=others or None,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
    )


def _linear_name(model: nn.Module, unit: WeightUnit) -> str:
    name, _, attribute = unit.parameter.rpartition(".")
    owner = model.get_submodule(name)
    if unit.index or attribute != "weight" or not isinstance(owner, nn.Linear | Conv1D):
        what = "a slice of a fused parameter" if unit.index else f"part of a module of class {type(owner).__name__}"
        raise KappaTuneError(
            f"{unit.name} is {what}, and PEFT's LoRA on single matrices needs whole linear layers. Leave it out "
            f"(`exclude`), or train it without LoRA: get_peft_model(model, KappaTuneConfig(...))."
        )
    return name


def _check_rank(units: list[WeightUnit], r: int) -> None:
    if not units:
        raise KappaTuneError("k: 0 selects no matrix, and LoRA needs one: give k a number from 1.")
    smallest = min(units, key=lambda unit: min(unit.shape))
    if not 1 <= r <= min(smallest.shape):
        raise KappaTuneError(
            f"r is {r}, expected 1 to {min(smallest.shape)}: {smallest.name} has {smallest.shape[0]} rows and "
            f"{smallest.shape[1]} columns. Lower r, or leave such matrices out (`exclude`)."
        )
