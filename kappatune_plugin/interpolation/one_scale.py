"""The largest step along a line of scales that keeps a limit, by false position."""

import math
from collections.abc import Callable

# a scale is exact to this share of what was tried
EXACT = 1 / 64


def largest_within(rises: Callable[[float], float], limit: float, most: float = 1.0, least: float = 0.0) -> float:
    """The largest scale up to `most` whose rise is at most `limit`, to most / 64 from below.

    `least` is a scale known to keep the limit, and is returned where no larger one does.

    The rise is taken to grow about as the square of the scale, as it does near a minimum of the loss: its root is
    interpolated, a step beyond the end that moved last, so that both ends close in. `most` itself is tried first. What
    is returned was measured within the limit, whether the rise grows so or not.
    """
    step = most * EXACT
    kept, broken, high = least, most, rises(most)
    if high <= limit:
        return most
    low = rises(least) if least else 0.0
    beyond = 0.0
    while broken - kept > 1.001 * step:
        share = (math.sqrt(limit) - _root(low)) / (_root(high) - _root(low)) if math.isfinite(high) else 0.5
        tried = kept + share * (broken - kept) + beyond
        tried = min(max(tried, kept + step), broken - step / 2)
        found = rises(tried)
        if found <= limit:
            kept, low, beyond = tried, found, step
        else:
            broken, high, beyond = tried, found, -step
    return kept


def _root(rise: float) -> float:
    return math.sqrt(max(rise, 0.0))
