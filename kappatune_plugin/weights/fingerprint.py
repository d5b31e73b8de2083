"""The fingerprint of a base model: a hash of samples of its weights that doesn't depend on how they are stored."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.weights.units import TASK_HEADS, WeightUnit, as_matrix, find_units, unit_block

SAMPLES_PER_SIDE = 8
# of a matrix with a row a token
FIRST_ROWS = 64
NO_SAMPLES = torch.empty(0, dtype=torch.bfloat16)


def unit_hash(parameter: Tensor, unit: WeightUnit) -> int:
    """The fingerprint of one unit: a signed 64-bit integer over at most 64 of its values. See `base_hash`."""
    digest = hashlib.blake2b(_comparable(_samples_over_ranks([(parameter, unit)])), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


class BaseHashes(NamedTuple):
    """Two fingerprints of one model, of 16 hexadecimal digits each.

    Attributes:
        today: see `base_hash`.
        before: over all matrices; earlier versions wrote it into reports, selections and adapters.
    """

    today: str
    before: str


def base_hash(model: nn.Module) -> str:
    """The fingerprint of a model's weights: 16 hexadecimal digits over its units' names, shapes and some values.

    What no checkpoint holds doesn't count, since it is other random numbers in each process: rows of added tokens (of
    embeddings and output head the first 64 rows count), heads of tasks and poolers (what lies in no numbered layer).

    It is the same for a checkpoint loaded in float32 and in bfloat16, for fused and separate experts, and for weights
    partitioned over ranks (collective then). It is the same for a bfloat16 checkpoint loaded in float16, but not for a
    float32 one, which is rounded twice.
    """
    return base_hashes(model, find_units(model)).today


def base_hashes(model: nn.Module, units: Sequence[WeightUnit]) -> BaseHashes:
    """`base_hash`, and what it was before; `units` are all of the model's. Collective if it is partitioned."""
    all_units = [*units, *_first_rows(units)]
    samples = _samples_over_ranks([(model.get_parameter(unit.parameter), unit) for unit in all_units])
    sizes = [math.prod(len(_grid(size)) for size in unit.shape) for unit in all_units]
    parts = samples.split(sizes) if units else ()
    return fingerprints(units, {unit.name: part for unit, part in zip(all_units, parts, strict=True)})


def fingerprints(units: Sequence[WeightUnit], samples: Mapping[str, Tensor]) -> BaseHashes:
    """The `base_hashes` of a model with these units, from the `samples_of` each."""
    lasting = [unit for unit in units if is_in_layers(unit)] + _first_rows(units)
    return BaseHashes(_digest(lasting, samples), _digest(units, samples))


def samples_of(unit: WeightUnit, matrix: Tensor) -> dict[str, Tensor]:
    """What fingerprints are made of: the `sample` of a unit's matrix by its name, and that of its first rows."""
    first = {rows.name: sample(matrix[: rows.shape[0]]) for rows in _first_rows([unit])}
    return {unit.name: sample(matrix), **first}


def is_in_layers(unit: WeightUnit) -> bool:
    """Whether `unit` lies in a numbered layer: no embedding, output head, pooler or head of a task."""
    return re.search(r"\.\d+\.", f".{unit.name}") is not None and not unit.groups & {"embedding", "head"}


def _first_rows(units: Iterable[WeightUnit]) -> list[WeightUnit]:
    """The first rows of each embedding and output head, as units: tokens are added behind them."""
    matrices = [unit for unit in units if unit.groups & {"embedding", "head"} and not unit.index and not unit.out_axis]
    lasting = [unit for unit in matrices if unit.name.partition(".")[0] not in TASK_HEADS]
    return [
        replace(
            unit,
            name=f"{unit.name}[:{FIRST_ROWS}]",
            shape=(min(unit.shape[0], FIRST_ROWS), unit.shape[1]),
            index=(slice(0, FIRST_ROWS), slice(None)),
        )
        for unit in lasting
    ]


def _digest(units: Iterable[WeightUnit], samples: Mapping[str, Tensor]) -> str:
    units, digest = sorted(units, key=lambda unit: unit.name), hashlib.blake2b(digest_size=8)
    for unit in units:
        digest.update(f"{unit.name} {unit.shape}\n".encode())
    for unit in units:
        digest.update(_comparable(samples[unit.name]))
    return digest.hexdigest()


def _grid(size: int) -> range:
    return range(0, size, math.ceil(size / SAMPLES_PER_SIDE))


def sample(matrix: Tensor) -> Tensor:
    """At most 8 x 8 values on a grid over a (rows, columns) matrix, as bfloat16 on the CPU."""
    rows, columns = (_grid(size).step for size in matrix.shape)
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
    rows, columns = (torch.tensor(_grid(size)) for size in unit.shape)
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
