"""How many parameters a LoRA trains, and the KappaTune budget of about that size; from a model's config alone."""

import math
from dataclasses import dataclass
from typing import Any

from kappatune_plugin.errors import KappaTuneError

DEFAULT_SHARE = "10%"


@dataclass(frozen=True)
class LoraSize:
    """Numbers of parameters.

    Attributes:
        lora: trained by the LoRA, without modules that are trained whole.
        model: of the base model.
        smallest, largest: of the matrices that KappaTune chooses from by default.
    """

    lora: int
    model: int
    smallest: int
    largest: int


def lora_size(model: str, options: dict[str, Any], trust_remote_code: bool = False) -> LoraSize:
    """The sizes for a LoRA with `options`, keywords of peft.LoraConfig, on a model's folder or hub name.

    PEFT itself attaches the LoRA to a model without values.

    Raises:
        KappaTuneError: the model's config is out of reach, or PEFT can't attach that LoRA.
    """
    # a recipe whose budget is given is converted without waiting for these
    from peft import LoraConfig

    from kappatune_plugin.weights.load_model import empty_model, trained_without_values
    from kappatune_plugin.weights.patterns import filter_units
    from kappatune_plugin.weights.units import find_units

    try:
        empty = empty_model(model, trust_remote_code)
    except KappaTuneError:
        raise
    except Exception as error:
        # transformers and remote code may raise anything for a model that can't be built without values
        reason = f"{type(error).__name__}: {error}"
        raise KappaTuneError(f"the architecture of '{model}' can't be built without its weights ({reason})") from error
    kept, _ = filter_units(find_units(empty))
    sizes = [math.prod(unit.shape) for unit in kept]
    if not sizes:
        raise KappaTuneError(f"'{model}' has no weight matrix to train.")
    total = sum(parameter.numel() for parameter in empty.parameters())
    try:
        config = LoraConfig(**{key: value for key, value in options.items() if value is not None})
        lora = trained_without_values(empty, config)[1]
    except (ValueError, TypeError, RuntimeError) as error:
        raise KappaTuneError(f"PEFT can't attach this LoRA to the model: {error}") from error
    return LoraSize(lora, total, min(sizes), max(sizes))


def matching_budget(size: LoraSize) -> tuple[Any, str]:
    """The budget k of about the LoRA's size, and a comment that compares the two."""
    if size.lora >= size.largest:
        return {"params": size.lora}, f"LoRA trained {size.lora:,} parameters"
    sizes = f"{size.smallest:,}" if size.smallest == size.largest else f"{size.smallest:,} to {size.largest:,}"
    return 1, f"LoRA trained {size.lora:,} parameters, one matrix has {sizes}"
