"""How much a LoRA trains, and the KappaTune budget that trains about as much; from a model's config alone."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.load_model import empty_model
from kappatune_plugin.weights.patterns import filter_units
from kappatune_plugin.weights.units import find_units

DEFAULT_SHARE = "10%"


@dataclass(frozen=True)
class LoraSize:
    """Numbers of parameters.

    Attributes:
        lora: what the LoRA trains, without modules that are trained whole.
        model: the base model's.
        smallest, largest: of the matrices that KappaTune chooses from by default.
    """

    lora: int
    model: int
    smallest: int
    largest: int


def lora_size(model: str, options: dict[str, Any], trust_remote_code: bool = False) -> LoraSize:
    """The sizes for a LoRA of `options`, keywords of peft.LoraConfig, on a model's folder or hub name.

    PEFT itself attaches the LoRA, to a model without values.

    Raises:
        KappaTuneError: the model's config is out of reach, or PEFT can't attach that LoRA.
    """
    try:
        empty = empty_model(model, trust_remote_code)
    except KappaTuneError:
        raise
    except Exception as error:
        # transformers and remote code raise anything where a model can't be built without memory
        reason = f"{type(error).__name__}: {error}"
        raise KappaTuneError(f"the architecture of '{model}' can't be built without its weights ({reason})") from error
    kept, _ = filter_units(find_units(empty))
    sizes = [math.prod(unit.shape) for unit in kept]
    if not sizes:
        raise KappaTuneError(f"'{model}' has no weight matrix to train.")
    total = sum(parameter.numel() for parameter in empty.parameters())
    return LoraSize(_trained(empty, options), total, min(sizes), max(sizes))


def matching_budget(size: LoraSize) -> tuple[Any, str]:
    """The budget k that trains about as much as the LoRA, and in words how it compares."""
    if size.lora >= size.largest:
        return {"params": size.lora}, f"LoRA trained {size.lora:,} parameters"
    sizes = f"{size.smallest:,}" if size.smallest == size.largest else f"{size.smallest:,} to {size.largest:,}"
    return 1, f"LoRA trained {size.lora:,} parameters, one matrix has {sizes}"


def _trained(model: nn.Module, options: dict[str, Any]) -> int:
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig(**{key: value for key, value in options.items() if value is not None})
        with warnings.catch_warnings():
            # of PEFT, about a model that is only counted
            warnings.simplefilter("ignore")
            with_lora = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise KappaTuneError(f"PEFT can't attach this LoRA to the model: {error}") from error
    return sum(parameter.numel() for parameter in with_lora.parameters() if parameter.requires_grad)
