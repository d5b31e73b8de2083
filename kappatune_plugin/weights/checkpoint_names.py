"""What a weight in memory is called in the checkpoint.

transformers 5 renames and fuses weights while it loads them (a layer's experts become one parameter). It undoes this
when it saves; the same rules, reversed, give the names here. transformers 4 keeps the checkpoint's names.
"""

from collections.abc import Sequence

from torch import nn


class CheckpointNames:
    """Translates parameter names of `model` to those `save_pretrained` would write."""

    def __init__(self, model: nn.Module) -> None:
        self._converters, self._renamings = _reversed_transforms(model)

    def whole(self, parameter: str) -> str:
        """Name of a parameter that is one tensor in the checkpoint too."""
        return self._rename(parameter)

    def expert(self, parameter: str, expert: int, projections: Sequence[str]) -> list[str]:
        """Names of one expert's projections inside the fused `parameter`, in the order in which it holds them.

        Where the checkpoint stores the experts fused as well (GPT-OSS) they get the names that the other
        architectures use: `<owner>.<expert>.<projection>.weight`.
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
        return [self._rename(f"{prefix}{expert}.{projection}.weight") for projection in projections]

    def operations(self, parameter: str) -> set[str]:
        """What `save_pretrained` would do to the values of `parameter`, by transformers' names of the operations."""
        matching = [each for each in self._converters if each.rename_source_key(parameter)[1] is not None]
        return {type(operation).__name__ for each in matching for operation in each.operations}

    def _rename(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name


def _reversed_transforms(model: nn.Module) -> tuple[list, list]:
    """The loading rules of `model`'s architecture, reversed as `revert_weight_conversion` of transformers does."""
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
