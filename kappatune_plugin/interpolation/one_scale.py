"""The largest step along a line of scales that keeps a limit, by bisection."""

from collections.abc import Callable

# the line is cut in this many parts: a scale is exact to 1/64 of what was tried
STEPS = 6


def largest_within(rises: Callable[[float], float], limit: float, most: float = 1.0, steps: int = STEPS) -> float:
    """The largest scale up to `most` whose rise is at most `limit`, to most / 2^steps from below; 0 for none.

    The rise is taken to grow with the scale, as it does near a minimum of the loss; `most` itself is tried first.
    What is returned was measured within the limit, whether it does or not.
    """
    if rises(most) <= limit:
        return most
    kept, broken = 0.0, most
    for _ in range(steps):
        middle = (kept + broken) / 2
        if rises(middle) <= limit:
            kept = middle
        else:
            broken = middle
    return kept
