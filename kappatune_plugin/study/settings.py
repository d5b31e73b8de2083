"""How methods are compared, and what came of one method."""

from dataclasses import dataclass
from typing import Any

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.study.methods import Method


@dataclass(frozen=True)
class Settings:
    """How methods are compared.

    Attributes:
        seeds: of data order, initialization and random selections; the first chooses the learning rate.
        learning_rates: the grid, the same for every method.
        every: steps between measurements.
        smooth: steps that the smoothed training loss is the mean of.
        target_loss: smoothed training loss to compare at; None for the highest of the runs' lowest, which all reach.
        stop_at_target: end every run there: nothing is compared after equal steps then.
        widen: how many rates to add at most, one at a time, for a method whose best is at an edge of its grid.

    Raises:
        KappaTuneError: numbers that can't be right.
    """

    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    every: int
    smooth: int
    target_loss: float | None = None
    stop_at_target: bool = False
    widen: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.seeds:
            problems.append("seeds: at least 1; 2 or more give an interval.")
        if not self.learning_rates or any(not rate > 0 for rate in self.learning_rates):
            problems.append(f"learning_rates: {list(self.learning_rates)} are not numbers above 0, such as 3e-4,1e-3.")
        for key in ("every", "smooth"):
            if getattr(self, key) < 1:
                problems.append(f"{key}: {getattr(self, key)} is not a number of steps from 1 on.")
        if self.target_loss is not None and not self.target_loss > 0:
            problems.append(f"target_loss: {self.target_loss:g} is no loss above 0 that a run could reach.")
        if self.stop_at_target and self.target_loss is None:
            problems.append("stop_at_target: the target has to be known beforehand: give target_loss.")
        if self.widen < 0 or (self.widen and len(set(self.learning_rates)) < 2):
            problems.append("widen: how many rates to add, from 0 on, to a grid of 2 learning_rates at least.")
        if problems:
            raise KappaTuneError("\n  - ".join(["compare:", *problems]))


@dataclass(frozen=True)
class Tried:
    """A method at its best learning rate.

    Attributes:
        runs: one a seed, as `train_run` gives them.
        grid: learning rate -> the first seed's run.
        matched: the measurements at the target, one a seed; None where a run doesn't reach it.
    """

    method: Method
    learning_rate: float
    runs: list[dict[str, Any]]
    grid: dict[float, dict[str, Any]]
    matched: list[dict[str, Any] | None]
