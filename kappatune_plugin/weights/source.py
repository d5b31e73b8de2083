"""Where weights are: a source lists the weight matrices of a model and hands them out one at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
from torch import Tensor

from kappatune_plugin.distributed import ranks
from kappatune_plugin.distributed.work import deal
from kappatune_plugin.weights.units import WeightUnit

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
        for unit in deal(units, ranks.world())[ranks.rank()]:
            yield unit, partial(self.load, unit)


def path_name(name: str) -> str:
    """A hub name as it is, a folder without the path to it."""
    return Path(name).resolve().name if Path(name).is_dir() else name
