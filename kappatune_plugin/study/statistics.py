"""The arithmetic of a comparison: smoothed curves, where they cross a target, means with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of the 95% interval of the mean; None for fewer than two values.
        values: as they were given.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval: mean ± t(n - 1) s / sqrt(n), s with n - 1 in its denominator.

    Raises:
        ValueError: no values.
    """
    from scipy.stats import t

    count = len(values)
    if not count:
        raise ValueError("no values to average")
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count), tuple(values))


def smoothed(losses: Sequence[float | None], window: int) -> list[float]:
    """The mean of the last `window` losses after each step; infinite where there are fewer, or one isn't finite (None).

    A trailing mean rather than an exponential one: it needs no correction of its start, and a loss far back has no say.
    """
    curve = []
    for end in range(1, len(losses) + 1):
        last = losses[max(0, end - window) : end]
        complete = len(last) == window and all(loss is not None and math.isfinite(loss) for loss in last)
        curve.append(math.fsum(last) / window if complete else math.inf)
    return curve


def first_crossing(curve: Sequence[float], target: float) -> int | None:
    """The first step, counted from 1, after which `curve` is at `target` or below; None if it never is."""
    return next((step for step, value in enumerate(curve, start=1) if value <= target), None)
