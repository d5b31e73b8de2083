"""The interface Source: lists the weight matrices of a model and loads them one at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
from torch import Tensor

from kappatune_plugin.distributed import ranks
from kappatune_plugin.distributed.work import deal
from kappatune_plugin.weights.fingerprint import BaseHashes
from kappatune_plugin.weights.units import WeightUnit

Load = Callable[[], Tensor]


class Source:
    """The weight matrices of one model.

    Attributes:
        name: the model's name in reports.
        units: every weight matrix, in the model's order.
        parameters: the names of all parameters, including norms and biases.
        contents: unit name -> the hash of its matrix (`cache.content_hash`), where it is known.
    """

    name: str
    units: list[WeightUnit]
    parameters: list[str]
    contents: dict[str, str]

    def dtype(self, unit: WeightUnit) -> str:
        """The dtype in which the unit is stored, such as "bfloat16" or "nf4, dequantized"."""
        raise NotImplementedError

    def load(self, unit: WeightUnit) -> Tensor:
        """The unit's values, a matrix of `unit.shape` in floating point. May be called from several threads."""
        raise NotImplementedError

    def base_hash(self) -> str:
        """The model's fingerprint, as `fingerprint.base_hash` makes it."""
        return self.base_hashes().today

    def base_hashes(self) -> BaseHashes:
        """`base_hash`, and the fingerprint that earlier versions made."""
        raise NotImplementedError

    def identity(self) -> str | None:
        """A hash that changes whenever the weights may have changed; None if only reading them would show that."""
        return None

    def memory_limit(self) -> int:
        """Bytes that measuring may take besides the weights: half of what is free."""
        return psutil.virtual_memory().available // 2

    def work(self, units: Sequence[WeightUnit]) -> Iterator[tuple[WeightUnit, Load]]:
        """The units to measure in this process, most expensive first, each with the function that loads it.

        It is advanced in the main thread, and only when the next unit is about to be measured. A source of partitioned
        weights gathers units here, together with all ranks, and yields only those of its own rank.
        """
        for unit in deal(units, ranks.world())[ranks.rank()]:
            yield unit, partial(self.load, unit)


def path_name(name: str) -> str:
    """A hub name as it is; of a folder's path the last part."""
    return Path(name).resolve().name if Path(name).is_dir() else name
