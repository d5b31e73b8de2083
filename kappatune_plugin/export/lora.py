"""The nearest LoRA adapter to what was trained: the largest singular vectors of each change."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.lowrank import stored_turned
from kappatune_plugin.tuner.model import KappaTuneModel
from kappatune_plugin.weights.units import embedding_modules, is_linear, unit_block

MERGE = "Export a plain checkpoint with `--as merged`, which holds everything."
# of the names in an adapter's file
PREFIX = "base_model.model."
# how far a change read back may lie from the one that was written, as a share of its size: float32's rounding
ROUNDING = 1e-4


@dataclass(frozen=True)
class LoraExport:
    """What a LoRA adapter holds of a change.

    Attributes:
        rank: of all its matrices.
        errors: name of a parameter -> ||change - LoRA's|| / ||change||, Frobenius norms; 0 keeps all.
    """

    rank: int
    errors: dict[str, float]


def changes_of(tuned: PeftModel) -> dict[str, Tensor]:
    """Name of each trained parameter -> what was added to it (float32, the parameter's shape).

    Raises:
        KappaTuneError: the adapter isn't this package's, or holds what LoRA has no form for.
    """
    tuner = tuned.base_model
    if not isinstance(tuner, KappaTuneModel):
        raise KappaTuneError(f"The adapter is one of {tuned.active_peft_config.peft_type.value}, not of KappaTune.")
    config = tuned.active_peft_config
    if config.modules_to_save or config.trainable_token_indices:
        raise KappaTuneError(f"The adapter trained whole modules or tokens too, which LoRA can't carry. {MERGE}")
    tied = {id(each.weight) for each in embedding_modules(tuner.model) if isinstance(each, nn.Module)}
    found: dict[str, Tensor] = {}
    for layer in tuner.layers():
        unit, parameter = layer.unit, layer.parameter
        if parameter.ndim > 3 or isinstance(layer.owner, nn.Embedding) or id(parameter) in tied:
            raise KappaTuneError(f"LoRA can't carry the change of {unit.name}, an embedding or a convolution. {MERGE}")
        change = found.setdefault(unit.parameter, torch.zeros(parameter.shape, dtype=torch.float32))
        added = layer.active.whole().float() - layer.original.whole(parameter).float()
        unit_block(change, unit).copy_(added)
    return {name: change for name, change in found.items() if change.any()}


def rank_for(changes: Mapping[str, Tensor], share: float) -> int:
    """The smallest rank at which LoRA keeps `share` of the norm of every change (Frobenius)."""
    ranks = [1]
    for change in changes.values():
        for matrix in change.reshape(-1, *change.shape[-2:]):
            energy = torch.linalg.svdvals(matrix).square().cumsum(0)
            if energy[-1] > 0:
                ranks.append(int((energy < share**2 * energy[-1]).sum()) + 1)
    return max(ranks)


def write_lora(tuned: PeftModel, folder: Path, rank: int | None = None, share: float = 0.99) -> LoraExport:
    """Write the LoRA adapter nearest to what `tuned` was trained to, and read it back; `tuned` is its base then.

    Args:
        rank: of every matrix; default: the smallest that keeps `share` of the norm of each change.

    Raises:
        KappaTuneError: what LoRA can't carry, or a rank that no matrix has.
    """
    changes = _something(changes_of(tuned))
    rank = rank or rank_for(changes, share)
    largest = max(min(change.shape[-2:]) for change in changes.values())
    if not 1 <= rank <= largest:
        raise KappaTuneError(f"--rank is {rank}, expected 1 to {largest}, the rank of the largest change.")
    config, base = tuned.active_peft_config, tuned.unload()
    lora = get_peft_model(base, _config(base, changes, rank, config.base_model_name_or_path, config.task_type))
    for name, layer in _layers(lora).items():
        up, down = _factors(changes[name], rank, layer.get_base_layer())
        layer.lora_A["default"].weight.data = down.to(layer.lora_A["default"].weight.dtype)
        layer.lora_B["default"].weight.data = up.to(layer.lora_B["default"].weight.dtype)
    expected = {name: _error(changes[name], layer) for name, layer in _layers(lora).items()}
    lora.save_pretrained(folder)
    again = PeftModel.from_pretrained(lora.unload(), str(folder))
    found = {name: _error(changes[name], layer) for name, layer in _layers(again).items()}
    if found.keys() != changes.keys() or any(abs(found[name] - expected[name]) > ROUNDING for name in found):
        raise KappaTuneError(f"Read back, the LoRA adapter holds other values than were written. {MERGE}")
    return LoraExport(rank, found)


def as_lora(tuned: PeftModel, rank: float, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """What `peft.convert_to_lora` gives for an adapter of ours: the nearest LoRA adapter, its values by their names.

    Args:
        rank: of every matrix; a float: the smallest at which each keeps this share of the sum of its squared singular
            values.

    Raises:
        KappaTuneError: a rank that no matrix has, an adapter that isn't active, slices, or what LoRA can't carry.
    """
    if adapter_name not in tuned.active_adapters:
        raise KappaTuneError(
            f"Adapter '{adapter_name}' isn't active, '{tuned.active_adapters[0]}' is: model.set_adapter('...') first."
        )
    slices = [layer.unit.name for layer in tuned.base_model.layers() if not layer.supports_lora_conversion()]
    if slices:
        raise KappaTuneError(
            f"{len(slices)} trained matrices are no whole linear layers, such as {slices[0]}, and PEFT's conversion "
            "knows no others. `kappatune export ADAPTER --as lora` writes fused experts too."
        )
    changes, ranks, values = _something(changes_of(tuned)), {}, {}
    largest = min(min(change.shape) for change in changes.values())
    if not (1 <= rank <= largest if isinstance(rank, int) else 0 < rank <= 1):
        raise KappaTuneError(f"rank is {rank}, expected a whole number from 1 to {largest}, or a share up to 1.0.")
    for name, change in changes.items():
        owner = name.removesuffix(".weight")
        ranks[owner] = rank if isinstance(rank, int) else rank_for({name: change}, rank**0.5)
        up, down = _factors(change, ranks[owner], tuned.base_model.model.get_submodule(owner))
        values |= {f"{PREFIX}{owner}.lora_A.weight": down, f"{PREFIX}{owner}.lora_B.weight": up}
    base = tuned.peft_config[adapter_name]
    config = _config(tuned.base_model.model, changes, max(ranks.values()), base.base_model_name_or_path, base.task_type)
    config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)
    return config, values


def _something(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    if not changes:
        raise KappaTuneError("The adapter changes nothing: there is nothing to export.")
    return changes


def _config(
    base: nn.Module, changes: Mapping[str, Tensor], rank: int, name: str | None, task: str | None
) -> LoraConfig:
    modules, parameters = [], []
    for parameter in changes:
        plain = is_linear(base, parameter)
        (modules if plain else parameters).append(parameter.rpartition(".")[0] if plain else parameter)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        target_parameters=parameters or None,
        base_model_name_or_path=name,
        task_type=task,
    )


def _layers(lora: PeftModel) -> dict[str, LoraLayer]:
    """Name of the base's parameter -> PEFT's layer of it."""
    found = {}
    for name, module in lora.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            found[f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def _factors(change: Tensor, rank: int, base: nn.Module) -> tuple[Tensor, Tensor]:
    """LoRA's B and A, as PEFT lays them out: of experts A is (experts x rank, in) and B (out, rank x experts)."""
    turned = stored_turned(base, fused=change.ndim == 3)
    stack = change.reshape(-1, *change.shape[-2:])
    left, sigma, right = torch.linalg.svd(stack.transpose(1, 2) if turned else stack, full_matrices=False)
    kept = min(rank, sigma.shape[1])
    up = torch.zeros(len(stack), left.shape[1], rank)
    down = torch.zeros(len(stack), rank, right.shape[2])
    root = sigma[:, :kept].sqrt()
    up[:, :, :kept] = left[:, :, :kept] * root[:, None, :]
    down[:, :kept] = right[:, :kept] * root[:, :, None]
    return up.permute(1, 2, 0).reshape(left.shape[1], -1).contiguous(), down.flatten(0, 1).contiguous()


def _error(change: Tensor, layer: LoraLayer) -> float:
    kept = layer.get_delta_weight("default").detach().float().reshape(change.shape)
    return float((change - kept).norm() / change.norm())
