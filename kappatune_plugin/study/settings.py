"""How methods are compared, and what came of one method."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from kappatune_plugin.schema import Block, Number, Whole
from kappatune_plugin.study.methods import Method


class Frontier(Block):
    """How finished runs are scaled back, W0 + scale * (W - W0), to see who learns most within a limit of forgetting.

    Raises:
        KappaTuneError: numbers that can't be right.
    """

    scales: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = Field(
        default=(0.25, 0.5, 0.75), description="At which each finished run is measured, beside 0 and 1."
    )
    limits: tuple[Annotated[Number, Field(gt=0)], ...] = Field(
        default=(0.01, 0.02, 0.05, 0.1),
        description="Of the rise of each control's loss, in nats a token: methods are compared within each.",
    )
    per_matrix: bool = Field(
        default=False, description="Within each limit also with a scale for each matrix, fitted to held-out rows."
    )

    @property
    def measured(self) -> list[float]:
        """The scales above 0 at which everything is measured, in order."""
        return sorted({*self.scales, 1.0})


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
    frontier: Frontier | None = Field(
        default=None, description="How finished runs are scaled back; null for not at all."
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
