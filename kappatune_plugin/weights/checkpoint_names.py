"""The names that weights in memory have in the checkpoint.

transformers 5 renames and fuses weights while it loads them (a layer's experts become one parameter), and reverses this
when it saves. The same reversed rules give the names here. transformers 4 keeps the checkpoint's names.
"""

from collections.abc import Sequence

import torch
from torch import nn


class CheckpointNames:
    """Translates parameter names of `model` to those that `save_pretrained` would write."""

    def __init__(self, model: nn.Module) -> None:
        self._converters, self._renamings = _reversed_transforms(model)

    def whole(self, parameter: str) -> str:
        """The checkpoint's name of a parameter that is one tensor there too."""
        return self._rename(parameter)

    def expert(self, parameter: str, expert: int, projections: Sequence[str]) -> list[str]:
        """The checkpoint's names of one expert's projections inside the fused `parameter`, in their order.

        If the checkpoint stores the experts fused too (GPT-OSS), they are named as in other architectures:
        `<owner>.<expert>.<projection>.weight`; without the projection where the parameter is called weight (JetMoe).
        """
        for converter in self._converters:
            renamed, source = converter.rename_source_key(parameter)
            targets = converter.target_patterns
            if source is None or len(targets) != len(projections) or not all("*" in target for target in targets):
                continue
            names = [renamed.replace(targets[0], target).replace("*", str(expert)) for target in targets]
            return [self._rename(name) for name in names]
        owner = parameter.rpartition(".")[0]
        prefix = f"{owner}." if owner else ""
        names = [f"{projection.removesuffix('weight')}.weight".lstrip(".") for projection in projections]
        return [self._rename(f"{prefix}{expert}.{name}") for name in names]

    def operations(self, parameter: str) -> set[str]:
        """The operations that `save_pretrained` would apply to `parameter`, by the names of transformers' classes."""
        matching = [each for each in self._converters if each.rename_source_key(parameter)[1] is not None]
        return {type(operation).__name__ for each in matching for operation in each.operations}

    def _rename(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name


def dtypes_to_save(model: nn.Module) -> dict[str, torch.dtype] | None:
    """The checkpoint's name and dtype of each tensor that `save_pretrained` would write; None with transformers 4."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError:
        return None
    values = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        values.pop(name, None)
    values = remove_tied_weights_from_state_dict(values, model)
    # without values, which a large model has once only
    values = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    return {name: value.dtype for name, value in revert_weight_conversion(model, values).items()}


def _reversed_transforms(model: nn.Module) -> tuple[list, list]:
    """The loading rules of `model`'s architecture, reversed as transformers' `revert_weight_conversion` does."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    if not hasattr(model, "base_model_prefix"):
        return [], []
    # a prefix that a checkpoint may or may not have (GPT-2's "transformer.") must not change a unit's name
    rules = get_model_conversion_mapping(model, add_legacy=False)
    rules = [rule.reverse_transform() for rule in reversed(rules) if not isinstance(rule, PrefixChange)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return converters, [rule for rule in rules if isinstance(rule, WeightRenaming)]
