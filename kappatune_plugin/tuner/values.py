"""What is kept of one trained unit: each adapter's values, the base model's own, and the names they are saved under.

A key in an adapter is `<module>.kappatuned_<unit>.kappatune_values.weight`, or `.lora_A` and `.lora_B`; in the model
the adapter's name stands before the last part. transformers puts that name after the first component that begins with
the method's prefix, so the prefix stands there once; TRL copies what is called `.default.`, so the name stands inside.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.tuner.register import PREFIX
from kappatune_plugin.weights.units import WeightUnit

if TYPE_CHECKING:
    from kappatune_plugin.tuner.layer import KappaTuneLayer

VALUES = f"{PREFIX}values"
# what adapters were saved under before, and what holds the same now
_OLD = re.compile(r"\.kappatune_(\w+)\.kappatune_(master|base)(\.[^.]+)?$")
_NOW = {"master": "weight", "base": "base"}


def renamed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` with the names of today for those that adapters were saved under before."""

    def name(old: re.Match[str]) -> str:
        return f".kappatuned_{old[1]}.{VALUES}{old[3] or ''}.{_NOW[old[2]]}"

    return {_OLD.sub(name, key): value for key, value in state_dict.items()}


def held(values: Tensor) -> Tensor:
    """What this process has of trained values: all, or its range, flat."""
    return shards.read_block(values, ()) if shards.is_partitioned(values) else values.detach()


class Values(nn.Module):
    """What one adapter trains of one unit: `Full`, or a low-rank pair.

    Attributes:
        base: fingerprint of the base model's values that training started from, one int64. It is saved with the
            adapter.

    The fingerprint stays where it is when the model is moved: FSDP2 by accelerate moves a model to the meta device and
    takes everything in its state dict for a divided parameter. There the fingerprint, which every rank has, is left
    out.
    """

    def __init__(self, layer: "KappaTuneLayer") -> None:
        super().__init__()
        # through __dict__, since a registered layer would be its own grandchild
        self.__dict__["layer"] = layer
        self.register_buffer("base", torch.tensor([layer.fingerprint]))

    @property
    def leaves(self) -> tuple[nn.Parameter, ...]:
        """See `slices.alias.Trained`."""
        return tuple(self._parameters.values())

    def target(self) -> Tensor:
        """See `slices.alias.Trained`."""
        raise NotImplementedError

    def line(self) -> tuple[nn.Parameter, Tensor | None]:
        """The parameter that the change of the weight is linear in, and its values where nothing is changed.

        None stands for zeros.
        """
        raise NotImplementedError

    def whole(self, base: Tensor | None = None) -> Tensor:
        """The values in the unit's shape as stored, detached. What they are made of must not be divided over ranks.

        Args:
            base: the base model's own values, where the caller has them: packed ones are dequantized each time.
        """
        raise NotImplementedError

    def part(self, wanted: Sequence[shards.Range]) -> Tensor:
        """The flat range `wanted[rank]` of the values. Collective where anything is divided over ranks."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> "Values":
        base = self.base
        super()._apply(*args, **kwargs)
        self.base = base
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layer.parameter.is_meta:
            del destination[f"{prefix}base"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        if f"{prefix}base" in missing:
            missing.remove(f"{prefix}base")


class Full(Values):
    """All values of a unit are trained: `weight`, in the unit's shape as its parameter stores it."""

    def __init__(self, layer: "KappaTuneLayer") -> None:
        super().__init__(layer)
        self.weight = nn.Parameter(layer.original.whole(layer.parameter))

    def target(self) -> Tensor:
        """See `slices.alias.Trained`."""
        return self.weight

    def line(self) -> tuple[nn.Parameter, Tensor | None]:
        """See `Values`."""
        return self.weight, self.layer.original.values

    def whole(self, base: Tensor | None = None) -> Tensor:
        """See `Values`."""
        return self.weight.detach()

    def part(self, wanted: Sequence[shards.Range]) -> Tensor:
        """See `Values`."""
        return shards.redistribute(held(self.weight), shards.block_ranges(self.weight, ()), wanted)


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
