"""How methods are compared, and what came of one method."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from kappatune_plugin.schema import Block, Number, Whole
from kappatune_plugin.study.methods import Method


class Settings(Block):
    """How methods are compared.

    Raises:
        KappaTuneError: numbers that can't be right.
    """

    seeds: tuple[Whole, ...] = Field(
        min_length=1,
        description="Of data order, initialization and random selections; the first chooses the learning rate.",
    )
    learning_rates: tuple[Annotated[Number, Field(gt=0)], ...] = Field(
        min_length=1, description="The grid, the same for every method."
    )
    every: Whole = Field(ge=1, description="Steps between measurements.")
    smooth: Whole = Field(ge=1, description="Steps that the smoothed training loss is the mean of.")
    target_loss: Number | None = Field(
        default=None,
        gt=0,
        description="Smoothed training loss to compare at; null for the highest of the runs' lowest, which all reach.",
    )
    stop_at_target: bool = Field(
        default=False, description="End every run there: nothing is compared after equal steps then."
    )
    widen: Whole = Field(
        default=0,
        ge=0,
        description="How many rates to add at most, one at a time, for a method whose best is at an edge of its grid.",
    )

    def contradictions(self) -> list[str]:
        """What needs another setting."""
        problems = []
        if self.stop_at_target and self.target_loss is None:
            problems.append("stop_at_target: the target has to be known beforehand: give target_loss.")
        if self.widen and len(set(self.learning_rates)) < 2:
            problems.append("widen: it adds to a grid of 2 learning_rates at least.")
        return problems


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
