"""The weights of a checkpoint on disk. Its model is built without values, for names and shapes only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.distributed.work import deal
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.checkpoint_names import CheckpointNames
from kappatune_plugin.weights.fingerprint import BaseHashes, fingerprints, samples_of
from kappatune_plugin.weights.quantized import FLOAT8_BLOCK, SCALES, dequantize_float8
from kappatune_plugin.weights.safetensors_files import TensorFiles
from kappatune_plugin.weights.source import Source, path_name
from kappatune_plugin.weights.units import WeightUnit, as_matrix, find_units

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# operations of transformers' loader, as reversed for saving, that leave each expert's matrix unchanged
STACKING = {"SplitModulelist", "Chunk"}


class Unusable(Exception):
    """The units' values can't be read from the files; the message says why."""


@dataclass(frozen=True)
class _Place:
    """Where a unit is: the tensor, the index of its part in it (empty: all of it), and its scales if it is float8."""

    tensor: str
    index: tuple[int | slice, ...] = ()
    scales: str | None = None


class SafetensorsSource(Source):
    """A checkpoint in safetensors files, with one tensor in memory at a time. Experts may be stored fused or apart."""

    def __init__(self, path: str, files: TensorFiles, model: nn.Module) -> None:
        """`model` has the checkpoint's architecture; its values are never used."""
        parameters = {name: shards.layout(parameter) for name, parameter in model.named_parameters()}
        empty = next((name for name, parameter in parameters.items() if not parameter.numel()), None)
        if empty is not None:
            # no unit, so that nothing would compare its shape with the stored one's
            raise Unusable(f"its config.json leaves {empty} no values")
        self.name = path_name(path)
        self.units = find_units(model)
        self.parameters = list(parameters)
        self.contents = {}
        self.files = files
        self._architecture = f"{model.config.to_json_string()} {transformers.__version__}"
        self._float8_block = _float8_block(model)
        finder = _Finder(model, files)
        self._places = {unit.name: finder.place(unit) for unit in self.units}

    def dtype(self, unit: WeightUnit) -> str:
        stored = self.files.tensors[self._places[unit.name].tensor].dtype
        return DTYPES.get(stored) or f"{STORED_FLOAT8[stored]}, dequantized"

    def load(self, unit: WeightUnit) -> Tensor:
        place = self._places[unit.name]
        if place.index:
            block = self.files.read(place.tensor, place.index[0])[place.index[1:]]
        else:
            block = self.files.read(place.tensor)
        if block.element_size() == 1:
            block = dequantize_float8(block, self.files.read(place.scales), self._float8_block)
        return as_matrix(block, unit)

    def identity(self) -> str:
        return self.files.identity(self._architecture)

    def memory_limit(self) -> int:
        """Four float64 copies of the largest tensor for each thread, or less if less is free."""
        largest = max(math.prod(stored.shape) for stored in self.files.tensors.values())
        return min(torch.get_num_threads() * 4 * 8 * largest, super().memory_limit())

    def base_hashes(self) -> BaseHashes:
        return fingerprints(self.units, self.samples())

    def samples(self) -> dict[str, Tensor]:
        """The `samples_of` all units. Collective: each rank reads its share."""
        mine = deal(self.units, ranks.world())[ranks.rank()]
        parts = ranks.exchange([samples_of(unit, self.load(unit)) for unit in mine])
        return {name: values for part in parts for samples in part for name, values in samples.items()}


def _float8_block(model: nn.Module) -> Sequence[int]:
    settings = getattr(model.config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) else vars(settings or object)
    return settings.get("weight_block_size") or FLOAT8_BLOCK


class _Finder:
    """Finds the units of `model` among the tensors of files."""

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        self._tensors = files.tensors
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names = CheckpointNames(model)
        self._prefix = getattr(model, "base_model_prefix", "")
        self._quantized = bool(getattr(model.config, "quantization_config", None))
        self._aliases: dict[int, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._aliases.setdefault(id(parameter), []).append(name)

    def place(self, unit: WeightUnit) -> _Place:
        """Where `unit` is. Raises Unusable if that can't be said for certain."""
        operations = self._names.operations(unit.parameter)
        if operations - STACKING if unit.index else operations:
            raise Unusable(f"{unit.name} is stored in another form ({', '.join(sorted(operations))})")
        shape = tuple(shards.layout(self._parameters[unit.parameter]).shape)
        if unit.index and (own := self._stored(unit.name)):
            return self._checked(own, unit.shape)
        holders = self._aliases[id(self._parameters[unit.parameter])]
        found = [name for holder in holders if (name := self._stored(self._names.whole(holder)))]
        if not found:
            raise Unusable(f"no file holds {unit.name} under that name")
        if len(found) > 1:
            raise Unusable(f"{found[0]} and {found[1]} are one weight, stored twice")
        return self._checked(found[0], shape, unit.index)

    def _stored(self, name: str) -> str | None:
        """The name in the files, which may lack or add the prefix of the model's base (`model.`); None if not there."""
        bare = name.removeprefix(f"{self._prefix}.")
        return next((each for each in (name, bare, f"{self._prefix}.{name}") if each in self._tensors), None)

    def _checked(self, name: str, shape: tuple[int, ...], index: tuple[int | slice, ...] = ()) -> _Place:
        stored = self._tensors[name]
        if stored.shape != shape:
            raise Unusable(f"{name} has shape {list(stored.shape)} where its model has {list(shape)}")
        if stored.dtype in DTYPES:
            return _Place(name, index)
        if stored.dtype not in STORED_FLOAT8 or index:
            raise Unusable(f"{name} is stored as {stored.dtype}")
        scales = next((name + ending for ending in SCALES if name + ending in self._tensors), None)
        if scales is None:
            problem = f"{name} is stored as {stored.dtype} without scales ({name}{SCALES[0]} or {SCALES[1]})"
            if self._quantized:
                # transformers may know where that kind of checkpoint keeps them
                raise Unusable(problem)
            raise KappaTuneError(f"{problem}: what it stands for can't be told. Scan the unquantized checkpoint.")
        return _Place(name, index, scales)
