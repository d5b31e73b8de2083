"""What training changed in a model: an adapter's values beside its base's, or a checkpoint's beside its base."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.interpolation.change import Change, Changes
from kappatune_plugin.tuner.layer import KappaTuneLayer
from kappatune_plugin.weights.quantized import quantization_of
from kappatune_plugin.weights.units import find_units

# of each method of PEFT the values that its change of a weight is proportional to: scaled by alpha, it is too
PROPORTIONAL = {
    "LORA": r"lora_B|lora_embedding_B",
    "ADALORA": r"lora_E",
    "VERA": r"vera_lambda_b",
    "LOHA": r"hada_w1_a",
    "LOKR": r"lokr_w1|lokr_w1_a",
    "FOURIERFT": r"fourierft_spectrum",
    "RANDLORA": r"randlora_lambda",
    "KAPPATUNE": r"(?!)",
}
# ways to begin LoRA that change the base's own weights: without the adapter they are not the base
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
MERGE = "Merge it (model.merge_and_unload() of PEFT, or kappatune merge) and give the checkpoint."


def changes_of_adapter(model: PeftModel) -> Changes:
    """What the active adapter of `model` changes: a scale for each unit, module, module saved whole, or token rows.

    LoRA and its like are scaled through the one factor that their change is proportional to, so they stay what they
    are. With quantized weights it is the same.

    Raises:
        KappaTuneError: a method whose change can't be scaled so, more than one active adapter, values that aren't
            finite.
    """
    if len(model.active_adapters) != 1:
        raise KappaTuneError(f"One active adapter is scaled back at a time, found {list(model.active_adapters)}.")
    (adapter,) = model.active_adapters
    config = model.peft_config[adapter]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    _check_method(method, config)
    parts: dict[str, list[Change]] = {}
    for name, module in model.named_modules():
        if isinstance(module, KappaTuneLayer) and adapter in module.kappatune_values:
            parts[module.unit.name] = [Change(*module.kappatune_values[adapter].line())]
        else:
            parts |= _beside(name, module, adapter)
    parameter = re.compile(rf"(.+?)\.(?:{PROPORTIONAL[method]})\.{re.escape(adapter)}(?:\.\w+)?")
    for name, values in model.named_parameters():
        if match := parameter.fullmatch(name):
            parts.setdefault(_short(match[1]) + ".weight", []).append(Change(values))
    write = getattr(model.base_model, "write_through", None)
    written = partial(write, everything=True) if write else lambda: None
    return Changes(parts, written, list(model.parameters()))


def changes_of_checkpoint(base: nn.Module, trained: nn.Module) -> Changes:
    """What differs between two whole models of one architecture; `trained` is scaled, `base` only read.

    A scale for each weight matrix (a fused expert's slices each their own), bias and norm that isn't the same in both.

    Raises:
        KappaTuneError: quantized models, another architecture, nothing differs, values that aren't finite.
    """
    if quantization_of(base) or quantization_of(trained):
        raise KappaTuneError("A quantized checkpoint can't be scaled in place: load both models unquantized.")
    before, after = dict(base.named_parameters()), dict(trained.named_parameters())
    others = sorted(
        name for name in before.keys() | after.keys() if _shape(before.get(name)) != _shape(after.get(name))
    )
    if others:
        raise KappaTuneError(
            f"The checkpoint was not trained from this base: {len(others)} of its weights are others or of other "
            f"shape, such as {others[0]}. Give the base that it was trained from."
        )
    slices: dict[str, list[tuple[str, Any]]] = {}
    for unit in find_units(trained):
        slices.setdefault(unit.parameter, []).append((unit.name, unit.index))
    parts = {}
    for parameter, values in after.items():
        for name, index in slices.get(parameter, [(parameter, ())]):
            old, new = (each.detach()[index] if index else each.detach() for each in (before[parameter], values))
            if not torch.equal(old, new.to(old)):
                parts[name] = [Change(values, old, index)]
    return Changes(parts, others=list(after.values()))


def _check_method(method: str, config: Any) -> None:
    if method not in PROPORTIONAL:
        raise KappaTuneError(
            f"What {method} changes can't be scaled inside its adapter; known are {', '.join(PROPORTIONAL)}. {MERGE}"
        )
    found = getattr(config, "init_lora_weights", True)
    if isinstance(found, str) and found.lower().startswith(CHANGES_BASE):
        raise KappaTuneError(f"init_lora_weights: {found} changes the base's own weights. {MERGE}")
    if getattr(config, "use_dora", False):
        raise KappaTuneError(f"DoRA's change is not proportional to any of its values. {MERGE}")
    if getattr(config, "bias", "none") != "none":
        raise KappaTuneError(f"bias: {config.bias} overwrites the base's own biases. {MERGE}")


def _beside(name: str, module: nn.Module, adapter: str) -> Mapping[str, list[Change]]:
    """What PEFT trains beside a method's own layers: modules saved whole, and rows of embeddings."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        base = dict(module.original_module.named_parameters())
        saved = module.modules_to_save[adapter].named_parameters()
        return {f"{_short(name)}.{part}": [Change(values, base[part].detach())] for part, values in saved}
    # tied embeddings share the rows of the first
    if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
        if adapter in module.trainable_tokens_delta:
            rows, original = module.trainable_tokens_delta[adapter], module.trainable_tokens_original[adapter]
            return {f"{_short(name)}.token_rows": [Change(rows, original)]}
    return {}


def _short(name: str) -> str:
    """A module's name in the model that the adapter is on."""
    return name.removeprefix("base_model.model.").removesuffix(".token_adapter")


def _shape(values: Tensor | None) -> Any:
    return None if values is None else tuple(values.shape)
