"""PEFT's own LoRA on the matrices that KappaTune selects; its adapters load without this package."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.tuner.adapter_folder import ADAPTER, check_adapter
from kappatune_plugin.tuner.config import LORA, KappaTuneConfig
from kappatune_plugin.tuner.lowrank import check_rank
from kappatune_plugin.tuner.model import KappaTuneModel
from kappatune_plugin.tuner.saved_selection import REPORT, SELECTION, other_selection
from kappatune_plugin.tuner.what_to_train import Settled, settle
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.quantized import keep_unpacked
from kappatune_plugin.weights.units import is_linear


@dataclass(frozen=True)
class Decided:
    """What an adapter trains, and the kappa report it was chosen from; None if the selection was given."""

    selection: Selection
    report: KappaReport | None

    def save(self, folder: Path) -> None:
        """Write selection.json, and kappa_report.json if there is a report, to a run's folder."""
        self.selection.save(folder / SELECTION)
        if self.report is not None:
            self.report.save(folder / REPORT)


def decided(model: PeftModel, adapter: str = "default") -> Decided | None:
    """What was decided for an adapter that this process began, by `KappaTuneModel` or `lora_config`; else None."""
    tuner = model.base_model
    if isinstance(tuner, KappaTuneModel):
        return Decided(tuner.selections[adapter], tuner.reports[adapter])
    return getattr(model.peft_config[adapter], "decided", None)


def check_resumed(model: PeftModel, folder: Path) -> None:
    """Refuse a checkpoint that trains other matrices than `model`, of which PEFT only warns.

    Raises:
        KappaTuneError: names what differs.
    """
    tuner = model.base_model
    if isinstance(tuner, KappaTuneModel):
        tuner.check_checkpoint(str(folder))
        return
    check_adapter(folder)
    with safe_open(folder / ADAPTER, "pt") as file:
        there = {key.partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    here = {key.partition(".lora_")[0] for key in get_peft_model_state_dict(model)}
    if there != here:
        raise other_selection(there - here, here - there)


def lora_config(model: nn.Module, config: KappaTuneConfig) -> LoraConfig:
    """A config of PEFT's LoRA for the matrices that `config` selects of `model`, and for no others.

    Args:
        model: without adapters. Its weights aren't changed; 4-bit ones stay in the layout that they are trained in when
            they are evaluated on a CPU.
        config: with `adapter="lora"`: what to select, the pairs' settings, `modules_to_save` and `task_type`.

    Raises:
        KappaTuneError: another `adapter`; a selected matrix is no whole linear layer, such as one expert of a fused
            parameter, which PEFT's LoRA can't name; `r` is larger than a dimension of one; or nothing is selected.
    """
    config, found = _settled(model, config)
    refused = [unit for unit in found.units if not is_linear(model, unit.parameter)]
    if refused:
        what = "a slice of a fused parameter" if refused[0].index else "no weight of a whole linear layer"
        raise KappaTuneError(
            f"{refused[0].name} is {what}, and PEFT's LoRA can't train it alone. Leave such matrices out (`exclude`), "
            "or let KappaTune hold the pairs: get_peft_model(model, config)."
        )
    return _plain(model, config, found)


def peft_config_for(model: nn.Module, config: KappaTuneConfig) -> PeftConfig:
    """`config`, or with `adapter: lora` PEFT's own LoRA where it can train all that is selected.

    Raises:
        KappaTuneError: `r` is larger than a dimension of a selected matrix, or nothing is selected.
    """
    if config.adapter != LORA:
        return config
    config, found = _settled(model, config)
    if all(is_linear(model, unit.parameter) for unit in found.units):
        return _plain(model, config, found)
    return config if found.report is None else replace(config, report=found.report, scan_from=None)


def _settled(model: nn.Module, config: KappaTuneConfig) -> tuple[KappaTuneConfig, Settled]:
    """What `config` trains, and a copy of it with the rank in the place of `match`."""
    if config.adapter != LORA:
        raise KappaTuneError(f"adapter is {config.adapter}: write KappaTuneConfig(adapter='lora', ...).")
    source, config = ModelSource(model), copy.copy(config)
    found = settle(config, source, source.base_hashes())
    check_rank(found.units, config.r)
    return config, found


def _plain(model: nn.Module, config: KappaTuneConfig, found: Settled) -> LoraConfig:
    keep_unpacked(model)
    owners = [unit.parameter.rpartition(".")[0] for unit in found.units]
    # PEFT takes a name for every module whose own name ends with it
    endings = tuple(f".{name}" for name in owners)
    others = [name for name, _ in model.named_modules() if name.endswith(endings) and name not in owners]
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout or 0.0,
        use_rslora=bool(config.use_rslora),
        target_modules=owners,
        exclude_modules=others or None,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
    )
    # no field: what is saved is what PEFT alone reads
    plain.decided = Decided(found.selection, found.report)
    return plain
