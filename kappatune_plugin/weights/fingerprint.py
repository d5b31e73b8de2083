"""The fingerprint of a base model: a hash of samples of its weights that doesn't depend on how they are stored."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.weights.units import WeightUnit, as_matrix, find_units, unit_block

SAMPLES_PER_SIDE = 8
NO_SAMPLES = torch.empty(0, dtype=torch.bfloat16)


def unit_hash(parameter: Tensor, unit: WeightUnit) -> int:
    """The fingerprint of one unit: a signed 64-bit integer over at most 64 of its values. See `base_hash`."""
    digest = hashlib.blake2b(_comparable(_samples_over_ranks([(parameter, unit)])), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


def base_hash(model: nn.Module, units: Iterable[WeightUnit] | None = None) -> str:
    """The fingerprint of a model's weights: 16 hexadecimal digits over the units' names, shapes and some values.

    It is the same for a checkpoint loaded in float32 and in bfloat16, for fused and separate experts, and for weights
    partitioned over ranks (collective then). It is the same for a bfloat16 checkpoint loaded in float16, but not for a
    float32 one, which is rounded twice.

    Args:
        units: all of the model's, if they are known already: finding them takes a while on a large model.
    """
    units = sorted(find_units(model) if units is None else units, key=lambda unit: unit.name)
    return _digest(units, _samples_over_ranks([(model.get_parameter(unit.parameter), unit) for unit in units]))


def fingerprint(units: Iterable[WeightUnit], samples: Mapping[str, Tensor]) -> str:
    """The `base_hash` of a model with these units, from the `sample` of each (unit name -> sample)."""
    units = sorted(units, key=lambda unit: unit.name)
    return _digest(units, torch.cat([NO_SAMPLES, *(samples[unit.name] for unit in units)]))


def _digest(units: Iterable[WeightUnit], samples: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for unit in units:
        digest.update(f"{unit.name} {unit.shape}\n".encode())
    digest.update(_comparable(samples))
    return digest.hexdigest()


def sample(matrix: Tensor) -> Tensor:
    """At most 8 x 8 values on a grid over a (rows, columns) matrix, as bfloat16 on the CPU."""
    rows, columns = (math.ceil(size / SAMPLES_PER_SIDE) for size in matrix.shape)
    return matrix.detach()[::rows, ::columns].flatten().to("cpu", torch.bfloat16)


def holds_other_values(parameter: Tensor, unit: WeightUnit, samples: Tensor) -> bool:
    """Whether this process's part of the unit differs from the matrix that `samples` were taken of."""
    if parameter.is_meta:
        return False
    numbers, values = _own_samples(parameter, unit)
    return _comparable(values) != _comparable(samples[numbers])


def _samples_over_ranks(units: Sequence[tuple[Tensor, WeightUnit]]) -> Tensor:
    """The samples of all (parameter, unit) pairs, concatenated, whole or partitioned over ranks."""

    def here() -> Tensor:
        return torch.cat([NO_SAMPLES, *(sample(as_matrix(unit_block(each, unit), unit)) for each, unit in units)])

    if shards.first_rank_loads():
        return ranks.from_first(here() if ranks.rank() == 0 else None)
    if not any(shards.is_partitioned(parameter) for parameter, _ in units):
        return here()
    parts = ranks.exchange([_own_samples(*each) for each in units])
    return torch.cat([_in_order(of_unit) for of_unit in zip(*parts, strict=True)])


def _own_samples(parameter: Tensor, unit: WeightUnit) -> tuple[Tensor, Tensor]:
    """The values of `sample` that lie in this process's part of a parameter: (their positions, the values)."""
    rows, columns = (torch.arange(0, size, math.ceil(size / SAMPLES_PER_SIDE)) for size in unit.shape)
    positions = (rows[:, None] * unit.shape[1] + columns).flatten()
    if unit.out_axis:
        inner = shards.block_shape(parameter, unit.index)[2:].numel()
        outer, kernel = columns // inner, columns % inner
        positions = ((outer * unit.shape[0] + rows[:, None]) * inner + kernel).flatten()
    low, high = shards.block_ranges(parameter, unit.index)[ranks.rank()]
    values = shards.read_block(parameter, unit.index).flatten()
    numbers = ((positions >= low) & (positions < high)).nonzero().flatten()
    return numbers, values[(positions[numbers] - low).to(values.device)].to("cpu", torch.bfloat16)


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The values of all ranks' `_own_samples`, in order; values that several ranks hold count once."""
    found = {number: value for part in parts for number, value in zip(part[0].tolist(), part[1], strict=True)}
    return torch.stack([found[number] for number in sorted(found)])


def _comparable(values: Tensor) -> bytes:
    """Bytes of bfloat16 values, those below float16's normal range as zero: float16 doesn't hold them exactly."""
    values = torch.where(values.abs() < torch.finfo(torch.float16).tiny, 0, values)
    return values.view(torch.int16).numpy().tobytes()
