"""One trained unit inside a PEFT model."""

import warnings
from collections.abc import Sequence, Set
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.distributed.unsupported import OFFLOADED, offloads
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.config import LORA, KappaTuneConfig
from kappatune_plugin.tuner.lowrank import LowRank
from kappatune_plugin.tuner.values import VALUES, Full, Original, Values, held
from kappatune_plugin.weights.fingerprint import is_in_layers, unit_hash
from kappatune_plugin.weights.units import OWN, WeightUnit, unit_block

NOT_WRITTEN = (
    "was changed by an optimizer step that the base model never got: its optimizer is not a torch.optim.Optimizer that "
    "holds the trained values (DeepSpeed's doesn't), and no transformers Trainer runs it. Call "
    "model.base_model.write_through() after each step, on all ranks."
)
MIXED_BATCH = (
    "adapter_names=[...]: the base's own matrices hold one adapter's values at a time, so a batch can't mix adapters. "
    "Call set_adapter(name), or disable_adapter() for the base, and run one batch for each."
)


class KappaTuneLayer(nn.Module, BaseTunerLayer):
    """The trainable values of one unit, a child of the module that owns the base parameter.

    `kappatune_values[adapter]` holds what is trained (float32 by default), all values or a low-rank pair; `original`
    holds the values of the base model. The base parameter's slice always holds the truth: the active adapter's values,
    or the original ones while adapters are disabled or none of the active ones trains this unit.

    A fingerprint of `original` is saved with the adapter, so that values trained on one base are never written into
    another.

    `resting` takes it out of training for a time: no gradient, no optimizer state, its values stay.
    """

    adapter_layer_names = (VALUES,)
    other_param_names = ()

    def __init__(self, owner: nn.Module, attribute: str, unit: WeightUnit) -> None:
        super().__init__()
        # through __dict__, since a registered owner would be its own grandchild
        self.__dict__["owner"] = owner
        self.attribute = attribute
        self.unit = unit
        self.kappatune_values = nn.ModuleDict()
        self.fingerprint = unit_hash(self.parameter, self.stored)
        self.original = Original(self.parameter, self.stored)
        self.merged_adapters = []
        self._active_adapter = []
        self._written: tuple[tuple[int, int], ...] | str | None = None
        self.resting = self.ran = self.reached = False
        self.register_state_dict_pre_hook(_check_written)
        self.register_load_state_dict_post_hook(_take_over_loaded)

    @property
    def parameter(self) -> Tensor:
        """The base parameter as its owner holds it now: whole, or this process's part of it."""
        return self.owner._parameters[self.attribute]

    @property
    def stored(self) -> WeightUnit:
        """The unit as `parameter` holds it."""
        return self.unit

    @property
    def block(self) -> Tensor:
        """View of a whole base parameter's slice, of the base's dtype."""
        return unit_block(self.parameter, self.unit)

    @property
    def active(self) -> Values | None:
        """The active adapter's values of this unit; None where it has none."""
        name = self.active_adapters[0] if self.active_adapters else None
        return self.kappatune_values[name] if name in self.kappatune_values else None

    @property
    def leaves(self) -> tuple[nn.Parameter, ...]:
        """The parameters that an optimizer holds of the active adapter."""
        return () if self.active is None else self.active.leaves

    def held_by(self, ids: Set[int]) -> bool:
        """Whether an optimizer that holds the tensors of these `id`s moves this unit."""
        return any(id(leaf) in ids for leaf in self.leaves)

    @property
    def moved(self) -> bool:
        """Whether the active values may have changed in place since they were last written into the base."""
        return self.active is not None and (self.original.divided or self._state() != self._written)

    @property
    def to_train(self) -> Values | None:
        """See `slices.alias.Bindable`."""
        off = self.disable_adapters or self.merged or self.resting
        return self.active if not off and any(leaf.requires_grad for leaf in self.leaves) else None

    @property
    def trained(self) -> Values | None:
        """`to_train`, whole on this rank.

        Raises:
            KappaTuneError: an optimizer step moved the values and nobody wrote them into the base.
        """
        # the versions of divided values say nothing
        in_use = not (self.disable_adapters or self.merged or self.resting)
        if in_use and self.moved and not self.original.divided:
            why = OFFLOADED if offloads(self.owner) else f"{{name}} {NOT_WRITTEN}"
            raise KappaTuneError(why.format(name=self.unit.name))
        values = self.to_train
        for leaf in self.leaves if values is not None else ():
            shards.gather_while_running(self.owner, leaf)
        return values

    def add(self, adapter: str, config: KappaTuneConfig) -> None:
        """Start `adapter` at the base model's values."""
        self.kappatune_values[adapter] = LowRank(self, config) if config.adapter == LORA else Full(self)

    def take_over(self) -> None:
        """Write values that were loaded into the base.

        Raises:
            KappaTuneError: they were trained on another base.
        """
        for adapter, values in self.kappatune_values.items():
            # what isn't of a layer may be other random numbers in each process, and all of it is replaced
            if values.base.item() != self.fingerprint and is_in_layers(self.unit):
                raise KappaTuneError(
                    f"Adapter '{adapter}' was trained on another base model: {self.unit.name} differs from the weights "
                    "it started from. Load the base that adapter_config.json names, in the dtype it was trained in."
                )
        self.write()

    @torch.no_grad()
    def write(self, adapter: str | None = None) -> None:
        """Write the values that should hold now, or those of `adapter`, into the base parameter.

        Collective where the base or the values are divided over ranks.
        """
        values = self.kappatune_values[adapter] if adapter else self.active
        if self.parameter.is_meta or (values is not None and any(leaf.is_meta for leaf in values.leaves)):
            return
        self.original.divide(self.parameter)
        if values is None or self.disable_adapters:
            self.write_original()
        else:
            wanted = shards.block_ranges(self.parameter, self.unit.index)
            shards.write_block(self.parameter, self.unit.index, values.part(wanted))
        self._written = self._state()

    def _state(self) -> tuple[tuple[int, int], ...]:
        """Another one for other active values, and for the same ones changed in place (but for `.data`)."""
        return tuple((id(leaf), leaf._version) for leaf in self.leaves)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is another tensor, and begins with another version
        return {**self.__dict__, "_written": None if self.moved else "as copied"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._written is not None:
            self._written = self._state()

    def _switch(self) -> None:
        """`write`, unseen by autograd: DPO runs the reference between the policy's forward and its backward.

        By then the values are back; `SliceAlias` refuses a backward where they aren't.
        """
        with torch.autograd._unsafe_preserve_version_counter(self.parameter):
            self.write()

    def write_original(self) -> None:
        """Write the base model's own values back. Collective where the base is divided over ranks."""
        self.original.divide(self.parameter)
        shards.write_block(self.parameter, self.unit.index, self.original.values)

    def get_base_layer(self) -> nn.Module:
        """The module that owns the base parameter."""
        return self.owner

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` takes this unit: a whole linear layer, no slice of fused experts."""
        return isinstance(self.owner, nn.Linear | Conv1D) and not self.unit.index

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Activate one adapter and write its values.

        Raises:
            KappaTuneError: more than one: values replace the base's, so they can't be added up.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise KappaTuneError(
                f"KappaTune runs one adapter at a time, got {names}: each replaces the weights it trained. "
                f"Choose one with model.set_adapter('{names[0]}')."
            )
        super().set_adapter(names, *args, **kwargs)
        self._switch()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the active adapter's values and the base model's own, exactly."""
        super().enable_adapters(enabled)
        self._switch()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget `adapter_name`; the base gets its own values back if it was the active one."""
        super().delete_adapter(adapter_name)
        self.write()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the values in the base as they are and stop training them.

        Raises:
            KappaTuneError: `safe_merge` found a value that isn't finite.
        """
        names = [name for name in adapter_names or self.active_adapters if name in self.kappatune_values]
        if safe_merge:
            check_finite([self], names)
        for name in names:
            self.write(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged_adapters = []
        self.write()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.kappatune_values:
            for leaf in self.kappatune_values[adapter_name].leaves:
                if not self.parameter.is_meta and not shards.is_partitioned(leaf):
                    leaf.data = leaf.data.to(device or self.parameter.device)
            self.write()


def child_name(unit: WeightUnit) -> str:
    """`kappatuned_weight` for a whole parameter, `kappatuned_17_gate_proj` for a slice."""
    if not unit.index:
        return OWN + unit.parameter.rpartition(".")[2]
    return OWN + "_".join(unit.name.removesuffix(".weight").split(".")[-2:])


def check_finite(layers: Sequence[KappaTuneLayer], adapter_names: list[str] | None = None) -> None:
    """Raise KappaTuneError if the layers' values of the active adapter, or of these, aren't all finite.

    Collective where values are divided over ranks: then it is raised on all of them.
    """
    wrong, divided = [], False
    for layer in layers:
        for name in adapter_names or layer.active_adapters:
            for leaf in layer.kappatune_values[name].leaves if name in layer.kappatune_values else ():
                divided = divided or shards.is_partitioned(leaf)
                if not torch.isfinite(held(leaf)).all():
                    wrong.append(f"{layer.unit.name} of adapter '{name}'")
    if divided:
        wrong = [each for part in ranks.exchange(wrong) for each in part]
    if wrong:
        raise KappaTuneError(f"{wrong[0]} has values that aren't finite: not merged.")


def warn_not_finite(tuner: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook before a tuner's state dict is made: warn of trained values that aren't finite.

    Whether a run that diverged goes on is for the settings of its trainer to say. Divided values are left out.
    """
    layers = [module for module in tuner.modules() if isinstance(module, KappaTuneLayer)]
    trained = [layer for layer in layers if layer.active is not None]
    leaves = [(layer.unit.name, leaf) for layer in trained for leaf in layer.leaves]
    here = [(name, leaf) for name, leaf in leaves if not (leaf.is_meta or shards.is_partitioned(leaf))]
    wrong = list(dict.fromkeys(name for name, leaf in here if not torch.isfinite(leaf).all()))
    if wrong:
        warnings.warn(
            f"{len(wrong)} of {len(trained)} trained matrices hold values that aren't finite (NaN or infinite), such "
            f"as {wrong[0]}: training diverged, and they are saved as they are. Go on from a checkpoint before "
            "(resume_from_checkpoint), with a lower learning_rate or max_grad_norm.",
            stacklevel=2,
        )


def check_reached(layers: Sequence[KappaTuneLayer]) -> None:
    """Raise KappaTuneError if a backward pass brought no gradient to units that are to be trained.

    Experts are let through: a batch may have no token for one of them.
    """
    wanted = [layer for layer in layers if any(leaf.requires_grad for leaf in layer.leaves)]
    missed = [layer for layer in wanted if not (layer.resting or layer.reached or _has_gradient(layer))]
    missed = [layer for layer in missed if not _is_expert(layer)]
    if not missed:
        return
    first, some = missed[0], [layer.unit.name for layer in missed[:3]]
    why = (
        "its module ran, and the loss doesn't depend on what it gave"
        if first.ran
        else "no module ran that reads its weight: a tower without inputs, a layer that is skipped, or code that reads "
        "the weight past the module's forward"
    )
    raise KappaTuneError(
        f"{len(missed)} of {len(wanted)} selected matrices got no gradient before the first step, such as "
        f"{first.unit.name}: {why}. They would silently keep the base's values. Add them to "
        f"exclude: [{', '.join(some)}{', ...' if len(missed) > len(some) else ''}] (globs such as '*vision*' will do), "
        "or give them inputs."
    )


def _is_expert(layer: KappaTuneLayer) -> bool:
    return ".experts." in layer.unit.name or (bool(layer.unit.index) and "stack" not in layer.unit.groups)


def _has_gradient(layer: KappaTuneLayer) -> bool:
    return any(leaf.grad is not None for leaf in layer.leaves)


def _is_here(layer: KappaTuneLayer) -> bool:
    return not any(value.is_meta or shards.is_partitioned(value) for value in (layer.parameter, *layer.leaves))


def _check_written(layer: KappaTuneLayer, prefix: str, keep_vars: bool) -> None:
    """Before values are saved: the base must hold them, or what was evaluated is not what is saved."""
    if layer.active is None or layer.disable_adapters or not _is_here(layer):
        return
    there = layer.block
    trained = layer.active.whole().to(there.dtype)
    # NaN is unequal to itself
    if not ((there == trained) | (there.isnan() & trained.isnan())).all():
        raise KappaTuneError(
            f"{layer.unit.name}: the trained values and the base model differ, so training steps were not written "
            "through. Call model.base_model.write_through() after each optimizer step."
        )


def _take_over_loaded(layer: KappaTuneLayer, incompatible_keys: Any) -> None:
    layer.take_over()
