"""The weights of a model in memory, whole or partitioned over ranks."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.distributed.unsupported import OFFLOADED, offloads
from kappatune_plugin.distributed.work import deal, rounds
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.fingerprint import BaseHashes, base_hashes, fingerprints, samples_of
from kappatune_plugin.weights.quantized import dequantized, expert_block, quantized_form
from kappatune_plugin.weights.source import Load, Source, path_name
from kappatune_plugin.weights.units import WeightUnit, as_matrix, find_units, place_of, unit_matrix


class ModelSource(Source):
    """A model in memory, on any device, whole or partitioned over ranks (ZeRO-3, FSDP2).

    Attributes:
        model: the model.
        divided: whether some rank doesn't hold all of it.
    """

    def __init__(self, model: nn.Module) -> None:
        offloaded = next((name for name, module in model.named_modules() if offloads(module)), None)
        if offloaded is not None:
            raise KappaTuneError(OFFLOADED.format(name=offloaded or "The model"))
        self.name = _model_name(model)
        self.units = find_units(model, quantized=True)
        self.parameters = [name for name, _ in model.named_parameters()]
        self.contents = {}
        self._hashes: BaseHashes | None = None
        self.model = model
        partitioned = any(shards.is_partitioned(parameter) for parameter in model.parameters())
        self.divided = partitioned or shards.first_rank_loads()
        forms = {unit.name: quantized_form(model.get_parameter(unit.parameter)) for unit in self.units}
        self._forms = {name: form[0] for name, form in forms.items() if form is not None}
        if self._forms and self.divided:
            raise KappaTuneError(
                "A quantized model that is partitioned over ranks (ZeRO-3, FSDP2) can't be ranked. Use DDP or ZeRO-2, "
                "or load it unquantized."
            )

    def dtype(self, unit: WeightUnit) -> str:
        form = self._forms.get(unit.name)
        return f"{form}, dequantized" if form else dtype_name(self.model.get_parameter(unit.parameter).dtype)

    def load(self, unit: WeightUnit) -> Tensor:
        if unit.name in self._forms:
            return as_matrix(self._dequantized(unit), unit)
        return unit_matrix(self.model, unit)

    def _dequantized(self, unit: WeightUnit) -> Tensor:
        if unit.index:
            return expert_block(self.model.get_parameter(unit.parameter), unit.index)
        owner, name = place_of(unit.parameter)
        return dequantized(self.model.get_submodule(owner), name)

    def base_hashes(self) -> BaseHashes:
        """See `Source`. They are made once: a source is of its model as it was at the first call."""
        if self._hashes is None and self._forms:
            samples = [samples_of(unit, self.load(unit)) for unit in self.units]
            self._hashes = fingerprints(self.units, dict(ChainMap(*samples)))
        elif self._hashes is None:
            self._hashes = base_hashes(self.model, self.units)
        return self._hashes

    def work(self, units: Sequence[WeightUnit]) -> Iterator[tuple[WeightUnit, Load]]:
        if shards.first_rank_loads():
            mine = deal(units, 1)[0] if ranks.rank() == 0 else []
            yield from ((unit, partial(self.load, unit)) for unit in mine)
        elif not self.divided:
            yield from super().work(units)
        else:
            # all ranks get their unit of a round before any starts to measure
            for each in rounds(units, ranks.world()):
                yield from [mine for owner, unit in enumerate(each) if (mine := self._gather(unit, owner))]

    def _gather(self, unit: WeightUnit, owner: int) -> tuple[WeightUnit, Load] | None:
        """The unit and its values on the rank `owner`, None elsewhere. Collective."""
        block = shards.whole_block(self.model.get_parameter(unit.parameter), unit.index, owner)
        return None if block is None else (unit, partial(as_matrix, block, unit))


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _model_name(model: nn.Module) -> str:
    """The model's name in reports: its hub name, the last part of its folder's path, or its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return path_name(name)
