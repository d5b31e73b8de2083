"""`k: auto`: how many matrices to train, decided while they are trained. Numbers in, decisions out.

The units of the largest budget have their masters from the start; those above the current budget rest, without
gradient and without optimizer state. So growing only lets some of them have gradients: no parameter group, schedule,
data order or checkpoint has to be rebuilt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Block, Number, Whole
from kappatune_plugin.selection.budget import Budget
from kappatune_plugin.selection.settings import BudgetText

AUTO = "auto"
Losses = Sequence[tuple[int, float]]


class AutoBudget(Block):
    """The block `kappatune.auto:` of a recipe with `k: auto`. Raises KappaTuneError, a line for each mistake."""

    start: BudgetText = Field(
        default="2%", description="First budget, as `k` says one; 2% is the paper's 75 of OLMoE's 3,152 matrices."
    )
    most: BudgetText = Field(default="20%", description="Largest budget, as `k` says one.")
    growth: Number = Field(
        default=2.0, gt=1, description="Each step multiplies the number of matrices by this.", examples=["growth: 2"]
    )
    target_loss: Number = Field(
        default=0.0,
        ge=0,
        description="Training loss, in nats, at or below which there is no growth any more; 0 always grows.",
    )
    window: Whole = Field(
        default=20,
        ge=1,
        description="Training steps over which the loss is averaged; a plateau shows after two of them.",
    )
    min_improvement: Number = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="A fall of the average by a smaller share from one window to the next is a plateau.",
        examples=["min_improvement: 0.02"],
    )


@dataclass(frozen=True)
class Decision:
    """What to do now, and why, as a sentence for the user.

    Attributes:
        action: "keep" training as it is; "grow" the budget; "shrink" it to what it was at the last measurement within
            max_delta, go back to the earlier values and grow no more; "stop" there.
    """

    action: str
    reason: str


def decide(
    settings: AutoBudget,
    losses: Losses,
    since: int,
    rise: float,
    max_delta: float,
    can_grow: bool,
    can_shrink: bool = False,
) -> Decision:
    """The rule of `k: auto`, applied after each measurement.

    Args:
        losses: (step, training loss in nats) as they were logged, in order of steps.
        since: the step of the last change of the budget; losses up to it don't count.
        rise: by how much the control loss is above the base's now, in nats a token.
        can_grow: the largest budget isn't reached, and the budget was never shrunk.
        can_shrink: the last measurement within `max_delta` was at a smaller budget.
    """
    if not rise <= max_delta:
        action = "shrink" if can_shrink else "stop"
        return Decision(action, f"the control loss rose by {rise:.3f} nats, more than max_delta {max_delta:g}")
    losses = [(step, loss) for step, loss in losses if step > since]
    last = losses[-1][0] if losses else since
    recent = mean_loss(losses, last - settings.window, last)
    earlier = mean_loss(losses, last - 2 * settings.window, last - settings.window)
    if last - since < 2 * settings.window or recent is None or earlier is None:
        return Decision("keep", f"fewer than {2 * settings.window} steps at this budget")
    if recent <= settings.target_loss:
        return Decision("keep", f"the training loss {recent:.3f} has reached target_loss {settings.target_loss:g}")
    improvement = (earlier - recent) / abs(earlier) if earlier else 0.0
    if improvement >= settings.min_improvement:
        return Decision("keep", f"the training loss still falls: {earlier:.3f} to {recent:.3f}")
    plateau = f"the training loss stays at {recent:.3f} ({earlier:.3f} in the {settings.window} steps before)"
    if not can_grow:
        return Decision("keep", f"{plateau}, and the budget grows no more")
    return Decision("grow", f"{plateau}, and the control loss rose by {rise:.3f} nats, less than {max_delta:g}")


def mean_loss(losses: Losses, after: int, until: int) -> float | None:
    """The mean of the losses logged in the steps `after` < step <= `until`; None if there are none."""
    found = [loss for step, loss in losses if after < step <= until]
    return sum(found) / len(found) if found else None


def levels(start: int, most: int, growth: float) -> list[int]:
    """The numbers of matrices that a run may train, rising from `start` to `most`.

    Raises:
        KappaTuneError: the start is more than the largest.
    """
    if start > most:
        raise KappaTuneError(
            f"kappatune.auto: start is {start} matrices and most is {most}: start with less, or allow more."
        )
    counts = [start]
    while counts[-1] < most:
        counts.append(min(most, math.ceil(counts[-1] * growth)))
    return counts


def prefix_count(units: Sequence[Any], budget: Budget, eligible: int) -> int:
    """How many of the selected `units` (with `.shape` and `.kappa`), from the first, a budget pays for; 1 at least.

    Args:
        eligible: weight matrices of the report, which a share is of.
    """
    if budget.kind == "count":
        count = int(budget.value)
    elif budget.kind == "share":
        count = int(budget.value * eligible)
    elif budget.kind == "kappa":
        count = sum(unit.kappa <= budget.value for unit in units)
    else:
        sizes = [math.prod(unit.shape) for unit in units]
        count = sum(sum(sizes[: end + 1]) <= budget.value for end in range(len(sizes)))
    return max(1, count)
