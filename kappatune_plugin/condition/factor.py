"""Triangular factors of A^T A, for a matrix A of (m, n) with m >= n, and how far they are from it.

A factor made in float32 is inexact, but its error is measured: with the defect eta, every eigenvalue of A^T A is
bounded from below by the factored matrix's. That makes it a preconditioner whose results can be certified.
"""

from typing import Protocol

import torch
from torch import Tensor

# columns of a block product: large enough for BLAS, small enough to use the symmetry (measured on an AVX-512 CPU, as
# the next two were)
PANEL = 256
# columns of a Cholesky factor handed to LAPACK, which is half as fast, at a time
CHOLESKY_PANEL = 64
# values of A converted at a time
CHUNK = 1 << 20


class Factor(Protocol):
    """A positive definite M near A^T A that can be solved with."""

    dtype: torch.dtype

    def solve(self, v: Tensor) -> Tensor:
        """M^-1 v for (n, b) `v` of the factor's dtype."""

    def probe(self, z: Tensor) -> Tensor:
        """The vectors x whose products `defect` needs to measure the error on `z`, (n, b)."""

    def defect(self, z: Tensor, ax: Tensor, gx: Tensor) -> Tensor:
        """E z, (n, b), where E is what a perfect factor would make 0; ax = A x and gx = A^T A x for x = probe(z)."""

    def image(self, v: Tensor) -> Tensor:
        """The vectors, (n, b), to project out of E's images so that the eigenvectors `v` of M don't count."""

    def shrink(self, eta: float) -> float:
        """The factor s with: eigenvalue i of A^T A >= s * eigenvalue i of M for every i, if ||E|| <= eta.

        With ||P E|| <= eta, where P projects out the images of M's i lowest eigenvectors, it holds for the eigenvalues
        after those i: on the rest of R^n, M is at least its eigenvalue i + 1.
        """

    def log_volume(self) -> float:
        """Sum of the logarithms of A's singular values."""


class CholeskyFactor:
    """A^T A ~ L L^T. E = L^-1 A^T A L^-T - I."""

    def __init__(self, lower: Tensor) -> None:
        self.lower, self.dtype = lower, lower.dtype

    @classmethod
    def of(cls, gram: Tensor) -> "CholeskyFactor | None":
        """Factor A^T A, of which only the lower triangle is read; None if it isn't positive definite in its dtype."""
        lower = gram.tril()
        for left in range(0, len(lower), CHOLESKY_PANEL):
            end = min(left + CHOLESKY_PANEL, len(lower))
            below, corner = lower[left:, left:end], lower[left:end, left:end]
            below.addmm_(lower[left:, :left], lower[left:end, :left].mT, alpha=-1)
            diagonal, info = torch.linalg.cholesky_ex(corner)
            if info.item() != 0:
                return None
            inverse = torch.linalg.solve_triangular(diagonal, torch.eye(end - left).to(diagonal), upper=False)
            below[end - left :] = below[end - left :] @ inverse.mT
            corner.copy_(diagonal)
        return cls(lower)

    def solve(self, v: Tensor) -> Tensor:
        return self.probe(torch.linalg.solve_triangular(self.lower, v, upper=False))

    def probe(self, z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower.mT, z, upper=True)

    def defect(self, z: Tensor, ax: Tensor, gx: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower, gx.to(self.dtype), upper=False) - z

    def image(self, v: Tensor) -> Tensor:
        return (v.mT @ self.lower).mT

    def shrink(self, eta: float) -> float:
        # x^T A^T A x >= (1 - eta) x^T M x, and Courant-Fischer
        return 1 - eta

    def log_volume(self) -> float:
        return self.lower.diagonal().double().log().sum().item()


class LUFactor:
    """A^T ~ P L U for a square A, so M = P L U U^T L^T P^T. E = (P L U)^-T A - I.

    Works for larger condition numbers than a Cholesky factor of A^T A, which squares them.
    """

    def __init__(self, packed: Tensor, pivots: Tensor) -> None:
        self.packed, self.dtype = packed, packed.dtype
        self.order = _permutation(pivots).to(packed.device)

    @classmethod
    def of(cls, a: Tensor) -> "LUFactor | None":
        """Factor a square A; None if a pivot is 0 or not finite."""
        packed, pivots, info = torch.linalg.lu_factor_ex(a.mT)
        return cls(packed, pivots) if info.item() == 0 else None

    def solve(self, v: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(self.packed, v[self.order], upper=False, unitriangular=True)
        return self._solve_transposed(torch.linalg.solve_triangular(self.packed, inner, upper=True))

    def probe(self, z: Tensor) -> Tensor:
        return z

    def defect(self, z: Tensor, ax: Tensor, gx: Tensor) -> Tensor:
        return self._solve_transposed(ax.to(self.dtype)) - z

    def image(self, v: Tensor) -> Tensor:
        return v

    def shrink(self, eta: float) -> float:
        # A = (P L U)^T (I + E), so every singular value is at least (1 - eta) times that of (P L U)^T
        return (1 - eta) ** 2

    def log_volume(self) -> float:
        return self.packed.diagonal().double().abs().log().sum().item()

    def _solve_transposed(self, v: Tensor) -> Tensor:
        """(P L U)^-T v."""
        inner = torch.linalg.solve_triangular(self.packed.mT, v, upper=False)
        inner = torch.linalg.solve_triangular(self.packed.mT, inner, upper=True, unitriangular=True)
        result = torch.empty_like(inner)
        result[self.order] = inner
        return result


def gram(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Lower triangle of A^T A, (n, n), in `dtype`; zeros above the diagonal blocks."""
    m, n = a.shape
    result = torch.zeros(n, n, dtype=dtype, device=a.device)
    rows = m if a.dtype == dtype else max(PANEL, CHUNK // n)
    for top in range(0, m, rows):
        chunk = a[top : top + rows].to(dtype)
        for left in range(0, n, PANEL):
            end = min(left + PANEL, n)
            result[left:end, :end].addmm_(chunk[:, left:end].mT, chunk[:, :end])
    return result


def symmetric_product(lower: Tensor, v: Tensor) -> Tensor:
    """G v for the symmetric G whose lower triangle `lower` is, as `gram` returns it."""
    # as rows, since BLAS takes several times as long for a few columns
    rows = v.mT.contiguous()
    result = torch.empty_like(rows)
    for top in range(0, lower.shape[0], PANEL):
        end = top + PANEL
        result[:, top:end] = rows[:, :end] @ lower[top:end, :end].mT
        if top:
            result[:, :top].addmm_(rows[:, top:end], lower[top:end, :top])
    return result.mT


def products(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A x and A^T A x, (m, b) and (n, b), in the dtype of `x`; A is converted a chunk at a time."""
    m, n = a.shape
    vectors = x.mT.contiguous()
    ax, gx = x.new_empty(x.shape[1], m), torch.zeros_like(vectors)
    rows = max(32, CHUNK // (4 * n))
    for top in range(0, m, rows):
        chunk = a[top : top + rows].to(x.dtype)
        part = ax[:, top : top + rows] = vectors @ chunk.mT
        gx.addmm_(part, chunk)
    return ax.mT, gx.mT


def _permutation(pivots: Tensor) -> Tensor:
    """The order with P^T v = v[order], from LAPACK's sequence of row exchanges."""
    order = list(range(len(pivots)))
    for row, other in enumerate((pivots - 1).tolist()):
        order[row], order[other] = order[other], order[row]
    return torch.tensor(order)
