"""Block Lanczos: the largest eigenvalues of a symmetric operator, from products with it alone.

Golub and Underwood, "The block Lanczos method for computing eigenvalues", 1977; with full reorthogonalization (Parlett,
The Symmetric Eigenvalue Problem, ch. 13), which is cheap for a basis of a few dozen vectors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# from this many basis vectors on, only every third step checks convergence, which solves an eigenproblem of that size
LARGE_BASIS = 32


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs of an operator on R^n, largest last.

    Attributes:
        values: (j,), float64, ascending.
        residuals: (j,), float64: norm of operator(x) - value * x for each unit vector x, by the Lanczos recurrence.
        basis: (n, j), orthonormal, in the operator's precision.
        coordinates: (j, j), float64: the vectors are basis @ coordinates.
    """

    values: Tensor
    residuals: Tensor
    basis: Tensor
    coordinates: Tensor

    def largest(self, count: int) -> Tensor:
        """Vectors of the `count` largest values, (n, count), float64, largest first; nearly orthonormal."""
        return (self.basis @ self.coordinates[:, -count:].flip(1).to(self.basis.dtype)).double()

    @property
    def relative_residual(self) -> float:
        """Residual of the largest pair over its value."""
        return (self.residuals[-1] / self.values[-1]).item()


def block_lanczos(
    operator: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float
) -> RitzPairs | None:
    """Ritz pairs of a symmetric positive definite `operator` from the Krylov space of `start`.

    Args:
        operator: (n, b) -> (n, b), in the precision of `start`.
        start: (n, b), random, of full rank.
        steps: number of products at most.
        tolerance: stop when the relative residual of the largest pair is below this.

    Returns:
        None if the operator broke down: a product isn't finite.
    """
    n, width = start.shape
    steps = min(steps, n // width)
    basis = start.new_empty(n, width * (steps + 1))
    basis[:, :width] = torch.linalg.qr(start)[0]
    projected = torch.zeros(width * steps, width * steps, dtype=torch.float64)
    for step in range(steps):
        begin, end = step * width, (step + 1) * width
        product = operator(basis[:, begin:end])
        # twice is enough (Parlett)
        first = basis[:, :end].mT @ product
        product = product - basis[:, :end] @ first
        second = basis[:, :end].mT @ product
        product = product - basis[:, :end] @ second
        column = (first + second).double().cpu()
        if not torch.isfinite(column).all():
            return None
        projected[:end, begin:end] = column
        projected[begin:end, :end] = column.mT
        block, remainder = torch.linalg.qr(product)
        last = step == steps - 1
        if last or end <= LARGE_BASIS or step % 3 == 0:
            pairs = _ritz_pairs(projected[:end, :end], remainder.double().cpu(), basis[:, :end], width)
            if last or (step >= 2 and pairs.relative_residual < tolerance):
                return pairs if math.isfinite(pairs.relative_residual) else None
        basis[:, end : end + width] = block
    return None


def _ritz_pairs(projected: Tensor, remainder: Tensor, basis: Tensor, width: int) -> RitzPairs:
    values, coordinates = torch.linalg.eigh((projected + projected.mT) / 2)
    residuals = torch.linalg.vector_norm(remainder @ coordinates[-width:], dim=0)
    return RitzPairs(values, residuals, basis, coordinates)
