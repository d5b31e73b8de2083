"""One trained unit inside a PEFT model."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.fingerprint import unit_hash
from kappatune_plugin.weights.units import WeightUnit, unit_block

NOT_WRITTEN = (
    "was changed by an optimizer step that the base model never got: its optimizer is not a torch.optim.Optimizer that "
    "holds the trained values (DeepSpeed's doesn't), and no transformers Trainer runs it. Call "
    "model.base_model.write_through() after each step, on all ranks."
)


class KappaTuneLayer(nn.Module, BaseTunerLayer):
    """The trainable values of one unit, a child of the module that owns the base parameter.

    `kappatune_master[adapter]` holds the values being trained (float32 by default), `original` those of the base
    model. The base parameter's slice always holds the truth: the active adapter's values, or the original ones while
    adapters are disabled or none of the active ones trains this unit.

    `kappatune_base[adapter]` is a fingerprint of `original`, saved with the adapter, so that values trained on one
    base are never written into another.

    `resting` takes it out of training for a time: no gradient, no optimizer state, its values stay.
    """

    adapter_layer_names = ("kappatune_master",)
    other_param_names = ("kappatune_base",)

    def __init__(self, owner: nn.Module, attribute: str, unit: WeightUnit) -> None:
        super().__init__()
        # through __dict__, since a registered owner would be its own grandchild
        self.__dict__["owner"] = owner
        self.attribute = attribute
        self.unit = unit
        self.kappatune_master = nn.ParameterDict()
        self.fingerprint = unit_hash(self.parameter, unit)
        self.kappatune_base = Fingerprints(self)
        self.original = Original(self.parameter, unit)
        self.merged_adapters = []
        self._active_adapter = []
        self._written_version: int | None = None
        self.resting = False
        self.register_state_dict_pre_hook(_check_written)
        self.register_load_state_dict_post_hook(_take_over_loaded)

    @property
    def parameter(self) -> Tensor:
        """The base parameter as its owner holds it now: whole, or this process's part of it."""
        return self.owner._parameters[self.attribute]

    @property
    def block(self) -> Tensor:
        """View of a whole base parameter's slice, of the base's dtype."""
        return unit_block(self.parameter, self.unit)

    @property
    def master(self) -> Tensor | None:
        """The active adapter's values of this unit; None where it has none."""
        name = self.active_adapters[0] if self.active_adapters else None
        return self.kappatune_master[name] if name in self.kappatune_master else None

    @property
    def moved(self) -> bool:
        """Whether the active values may have changed in place since they were last written into the base."""
        master = self.master
        return master is not None and (self.original.divided or master._version != self._written_version)

    @property
    def trained(self) -> Tensor | None:
        """See `binding.Bindable`.

        Raises:
            KappaTuneError: an optimizer step moved the values and nobody wrote them into the base.
        """
        master = self.master
        if master is None or self.disable_adapters or self.merged or self.resting:
            return None
        # the versions of divided values say nothing
        if self.moved and not self.original.divided:
            raise KappaTuneError(f"{self.unit.name} {NOT_WRITTEN}")
        if not master.requires_grad:
            return None
        shards.gather_while_running(self.owner, master)
        return master

    def add(self, adapter: str) -> None:
        """Start `adapter` at the base model's values."""
        self.kappatune_master[adapter] = nn.Parameter(self.original.whole(self.parameter))
        self.kappatune_base[adapter] = torch.tensor([self.fingerprint])

    @torch.no_grad()
    def write(self, adapter: str | None = None) -> None:
        """Write the values that should hold now, or those of `adapter`, into the base parameter.

        Collective where the base or the values are divided over ranks.
        """
        master = self.kappatune_master[adapter] if adapter else self.master
        if self.parameter.is_meta or (master is not None and master.is_meta):
            return
        self.original.divide(self.parameter)
        if master is None or self.disable_adapters:
            self.write_original()
        else:
            wanted = shards.block_ranges(self.parameter, self.unit.index)
            values = shards.redistribute(_held(master), shards.block_ranges(master, ()), wanted)
            shards.write_block(self.parameter, self.unit.index, values)
        self._written_version = None if master is None else master._version

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
        names = [name for name in adapter_names or self.active_adapters if name in self.kappatune_master]
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
        if adapter_name in self.kappatune_master:
            master = self.kappatune_master[adapter_name]
            if not self.parameter.is_meta and not shards.is_partitioned(master):
                master.data = master.data.to(device or self.parameter.device)
            self.write()


class Original:
    """The base model's own values of one unit, as this process holds them.

    Attributes:
        values: all of them in the parameter's shape, or flat this process's range.
        divided: whether it is a range.
    """

    def __init__(self, parameter: Tensor, unit: WeightUnit) -> None:
        self._index = unit.index
        self.divided = shards.is_partitioned(parameter)
        self.values = None if parameter.is_meta else shards.read_block(parameter, unit.index)

    def whole(self, parameter: Tensor) -> Tensor:
        """All of them, on every rank; zeros for a `parameter` that isn't here yet. Collective if divided."""
        shape = shards.block_shape(parameter, self._index)
        if self.values is None:
            return torch.zeros(shape, dtype=parameter.dtype)
        if not self.divided:
            return self.values.clone()
        everything = [(0, shape.numel())] * ranks.world()
        held = shards.block_ranges(parameter, self._index)
        return shards.redistribute(self.values, held, everything).clone().view(shape)

    def divide(self, parameter: Tensor) -> None:
        """Once FSDP2 has divided `parameter` keep only this process's range. Collective that once."""
        if self.divided or not shards.is_partitioned(parameter):
            return
        count = shards.block_shape(parameter, self._index).numel()
        first_only = shards.first_rank_loads()
        held = [(0, 0) if first_only and each else (0, count) for each in range(ranks.world())]
        values = torch.empty(0, dtype=parameter.dtype) if held[ranks.rank()] == (0, 0) else self.values
        wanted = shards.block_ranges(parameter, self._index)
        self.values = shards.redistribute(values.to(parameter.device), held, wanted).clone()
        self.divided = True


class Fingerprints(BufferDict):
    """What `kappatune_base` holds. It stays where it is and as it is when the model is moved.

    FSDP2 by accelerate moves a model to the meta device and takes everything in its state dict for a divided
    parameter: there the fingerprints, which every rank has, are left out.
    """

    def __init__(self, layer: KappaTuneLayer) -> None:
        super().__init__(persistent=True)
        self.__dict__["layer"] = layer

    def _apply(self, *args: Any, **kwargs: Any) -> "Fingerprints":
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.layer.parameter.is_meta:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + adapter in state_dict for adapter in self):
            super()._load_from_state_dict(state_dict, prefix, *args)


def check_finite(layers: Sequence[KappaTuneLayer], adapter_names: list[str] | None = None) -> None:
    """Raise KappaTuneError if the layers' values of the active adapter, or of these, aren't all finite.

    Collective where values are divided over ranks: then it is raised on all of them.
    """
    wrong, divided = [], False
    for layer in layers:
        for name in adapter_names or layer.active_adapters:
            if name in layer.kappatune_master:
                master = layer.kappatune_master[name]
                divided = divided or shards.is_partitioned(master)
                if not torch.isfinite(_held(master)).all():
                    wrong.append(f"{layer.unit.name} of adapter '{name}'")
    if divided:
        wrong = [each for part in ranks.exchange(wrong) for each in part]
    if wrong:
        raise KappaTuneError(f"{wrong[0]} has values that aren't finite: not merged.")


def _held(values: Tensor) -> Tensor:
    return shards.read_block(values, ()) if shards.is_partitioned(values) else values.detach()


def _is_here(layer: KappaTuneLayer, master: Tensor) -> bool:
    held = (layer.parameter, master)
    return not any(value.is_meta or shards.is_partitioned(value) for value in held)


def _check_written(layer: KappaTuneLayer, prefix: str, keep_vars: bool) -> None:
    """Before values are saved: the base must hold them, or what was evaluated is not what is saved."""
    master = layer.master
    if master is None or layer.disable_adapters or master.is_meta or not _is_here(layer, master):
        return
    if not torch.equal(layer.block, master.detach().to(layer.block.dtype)):
        raise KappaTuneError(
            f"{layer.unit.name}: the trained values and the base model differ, so training steps were not written "
            "through. Call model.base_model.write_through() after each optimizer step."
        )


def _take_over_loaded(layer: KappaTuneLayer, incompatible_keys: Any) -> None:
    """After values are loaded: refuse those of another base, write the rest."""
    for adapter, found in layer.kappatune_base.items():
        if found.item() != layer.fingerprint:
            raise KappaTuneError(
                f"Adapter '{adapter}' was trained on another base model: {layer.unit.name} differs from the weights "
                "it started from. Load the base that adapter_config.json names, in the dtype it was trained in."
            )
    layer.write()
