"""How matrices are assigned to ranks."""

import heapq
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Matrix(Protocol):
    """Anything of a known shape (rows, columns)."""

    @property
    def shape(self) -> tuple[int, int]: ...


M = TypeVar("M", bound=Matrix)


def cost(matrix: Matrix) -> int:
    """Floating-point operations of a factorization up to a constant: rows * columns * min(rows, columns)."""
    return matrix.shape[0] * matrix.shape[1] * min(matrix.shape)


def deal(matrices: Sequence[M], ranks: int) -> list[list[M]]:
    """One list of matrices for each rank: most expensive first, each to the rank with the least work so far."""
    shares: list[list[M]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for matrix in sorted(matrices, key=lambda matrix: -cost(matrix)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(matrix)
        heapq.heappush(loads, (load + cost(matrix), rank))
    return shares


def rounds(matrices: Sequence[M], ranks: int) -> list[list[M]]:
    """`matrices` in lists of one for each rank, most expensive first, so that those of a list take about as long."""
    by_cost = sorted(matrices, key=lambda matrix: -cost(matrix))
    return [by_cost[start : start + ranks] for start in range(0, len(matrices), ranks)]
