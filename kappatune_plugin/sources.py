"""Where weights are: a source lists the weight matrices of a model and hands them out one at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from kappatune_plugin import distributed
from kappatune_plugin.dealing import deal, rounds
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.quantized import dequantized, quantized_form
from kappatune_plugin.units import WeightUnit, as_matrix, base_hash, find_units, fingerprint, sample, unit_matrix

Load = Callable[[], Tensor]


class Source:
    """The weight matrices of one model, wherever they are.

    Attributes:
        name: what the report calls the model.
        units: every weight matrix, in the model's order.
        parameters: the names of all parameters, of norms and biases too.
        contents: unit name -> the hash of its matrix (`cache.content_hash`), as far as they are known.
    """

    name: str
    units: list[WeightUnit]
    parameters: list[str]
    contents: dict[str, str]

    def dtype(self, unit: WeightUnit) -> str:
        """How the unit is stored: "bfloat16"; for a quantized weight also what its values are ranked as."""
        raise NotImplementedError

    def load(self, unit: WeightUnit) -> Tensor:
        """The unit's values, a matrix of `unit.shape` in floating point. May be called from several threads."""
        raise NotImplementedError

    def base_hash(self) -> str:
        """The fingerprint of all units' weights, as `units.base_hash` makes it."""
        raise NotImplementedError

    def identity(self) -> str | None:
        """Changes whenever the weights may have; None where only reading them would tell."""
        return None

    def memory_limit(self) -> int:
        """Bytes that measuring may take beside the weights: half of what is free."""
        return psutil.virtual_memory().available // 2

    def work(self, units: Sequence[WeightUnit]) -> Iterator[tuple[WeightUnit, Load]]:
        """The units to measure in this process, longest first, each with the function that loads it.

        It is advanced from the main thread, and only when the next unit is about to be measured. A source of divided
        weights gathers a unit here, which takes all ranks, and yields only those of its own rank.
        """
        for unit in deal(units, distributed.world())[distributed.rank()]:
            yield unit, partial(self.load, unit)


class ModelSource(Source):
    """A model in memory, on any device, whole or divided over ranks (ZeRO-3, FSDP2).

    Attributes:
        divided: whether not every rank has all of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = _model_name(model)
        self.units = find_units(model, quantized=True)
        self.parameters = [name for name, _ in model.named_parameters()]
        self.contents = {}
        self._model = model
        partitioned = any(distributed.is_partitioned(parameter) for parameter in model.parameters())
        self.divided = partitioned or distributed.first_rank_loads()
        self._forms = {unit.name: form for unit in self.units if (form := self._form(unit))}
        if self._forms and self.divided:
            raise KappaTuneError(
                "A quantized model that is divided over ranks (ZeRO-3, FSDP2) can't be ranked. Use DDP or ZeRO-2, or "
                "load it unquantized."
            )

    def dtype(self, unit: WeightUnit) -> str:
        form = self._forms.get(unit.name)
        return f"{form}, dequantized" if form else dtype_name(self._model.get_parameter(unit.parameter).dtype)

    def load(self, unit: WeightUnit) -> Tensor:
        if unit.name in self._forms:
            owner, _, name = unit.parameter.rpartition(".")
            return as_matrix(dequantized(self._model.get_submodule(owner), name), unit)
        return unit_matrix(self._model, unit)

    def base_hash(self) -> str:
        if self._forms:
            return fingerprint(self.units, {unit.name: sample(self.load(unit)) for unit in self.units})
        return base_hash(self._model)

    def _form(self, unit: WeightUnit) -> str | None:
        owner = self._model.get_submodule(unit.parameter.rpartition(".")[0])
        form = quantized_form(owner, self._model.get_parameter(unit.parameter))
        return None if form is None else form[0]

    def work(self, units: Sequence[WeightUnit]) -> Iterator[tuple[WeightUnit, Load]]:
        if distributed.first_rank_loads():
            mine = deal(units, 1)[0] if distributed.rank() == 0 else []
            yield from ((unit, partial(self.load, unit)) for unit in mine)
        elif not self.divided:
            yield from super().work(units)
        else:
            # all ranks get their unit of a round before one of them starts to measure
            for each in rounds(units, distributed.world()):
                yield from [mine for owner, unit in enumerate(each) if (mine := self._gather(unit, owner))]

    def _gather(self, unit: WeightUnit, owner: int) -> tuple[WeightUnit, Load] | None:
        """The unit and its values on the rank `owner`, None elsewhere. Collective."""
        block = distributed.whole_block(self._model.get_parameter(unit.parameter), unit.index, owner)
        return None if block is None else (unit, partial(as_matrix, block, unit))


class ScanFrom(Source):
    """A model whose units are measured by the values that a checkpoint of the same model has: one of the unquantized
    weights, for a quantized model."""

    def __init__(self, model: Source, values: Source) -> None:
        self.name, self.units, self.parameters, self.contents = model.name, model.units, model.parameters, {}
        self._model, self._values = model, values
        self._theirs = {unit.name: unit for unit in values.units}
        wrong = [unit.name for unit in self.units if unit.name not in self._theirs]
        wrong += [unit.name for unit in self.units if unit.name not in wrong and self._shape(unit) != unit.shape]
        if wrong:
            raise KappaTuneError(
                f"scan_from: '{values.name}' lacks {len(wrong)} of the {len(self.units)} weight matrices of "
                f"'{model.name}', or has them in another shape, such as {wrong[0]}: give the checkpoint it was made of."
            )

    def dtype(self, unit: WeightUnit) -> str:
        return f"{self._values.dtype(self._theirs[unit.name])} of {self._values.name}"

    def load(self, unit: WeightUnit) -> Tensor:
        return self._values.load(self._theirs[unit.name])

    def base_hash(self) -> str:
        return self._model.base_hash()

    def memory_limit(self) -> int:
        return self._values.memory_limit()

    def _shape(self, unit: WeightUnit) -> tuple[int, int]:
        return self._theirs[unit.name].shape


def open_source(model_or_path: nn.Module | str | os.PathLike, trust_remote_code: bool = False) -> Source:
    """The weights of a model, or of the folder or hub name of one. Collective where ranks run together.

    Raises:
        KappaTuneError: neither, or the model can't be loaded.
    """
    if isinstance(model_or_path, nn.Module):
        source = ModelSource(model_or_path)
        if not source.divided:
            return source
        from kappatune_plugin.safetensors_source import same_on_disk

        return same_on_disk(model_or_path, source) or source
    if isinstance(model_or_path, str | os.PathLike):
        from kappatune_plugin.safetensors_source import checkpoint_source

        return checkpoint_source(os.fspath(model_or_path), trust_remote_code)
    kind = type(model_or_path).__name__
    raise KappaTuneError(f"scan needs a model, or the folder or hub name of one; found {kind}.")


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _model_name(model: nn.Module) -> str:
    """What the report calls the model: its hub name, the last part of its folder, or its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return path_name(name)


def path_name(name: str) -> str:
    """A hub name as it is, a folder without the path to it."""
    return Path(name).resolve().name if Path(name).is_dir() else name
