"""Which rank measures which matrices."""

import heapq
from collections.abc import Sequence

from kappatune_plugin.units import WeightUnit


def cost(unit: WeightUnit) -> int:
    """Floating-point operations of a factor, without the constant: rows * columns * min(rows, columns)."""
    return unit.shape[0] * unit.shape[1] * min(unit.shape)


def deal(units: Sequence[WeightUnit], ranks: int) -> list[list[WeightUnit]]:
    """`units` in as many hands, longest first, each to the hand with the least work so far."""
    hands: list[list[WeightUnit]] = [[] for _ in range(ranks)]
    loads = [(0, hand) for hand in range(ranks)]
    for unit in sorted(units, key=lambda unit: -cost(unit)):
        load, hand = heapq.heappop(loads)
        hands[hand].append(unit)
        heapq.heappush(loads, (load + cost(unit), hand))
    return hands


def rounds(units: Sequence[WeightUnit], ranks: int) -> list[list[WeightUnit]]:
    """`units`, longest first, one a rank at a time: what is measured side by side takes about as long."""
    longest_first = sorted(units, key=lambda unit: -cost(unit))
    return [longest_first[start : start + ranks] for start in range(0, len(units), ranks)]
