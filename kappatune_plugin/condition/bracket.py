"""Intervals around the extreme singular values of A, (m, n) with m >= n, from an approximate factor of A^T A.

Upper ends of sigma_min and lower ends of sigma_max are norms of products with A itself in float64, so they hold up to
the rounding of float64. The other ends rest on the residuals of those products, on Lehmann's bound and on the factor's
measured defect (see `ritz_bounds`). They hold unless the Krylov space of a random block missed an extreme singular
value, or the random probes missed most of the defect.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kappatune_plugin.condition.factor import Factor, products
from kappatune_plugin.condition.lanczos import RitzPairs, block_lanczos
from kappatune_plugin.condition.ritz_bounds import EPS, eigenvalues_below, largest_singular_value, lowest_eigenvalue

# a block of 4 finds up to 4 equal singular values; if 40 steps don't converge, a more precise factor is needed
BLOCK, STEPS = 4, 40
# Davidson corrections before a more precise factor is tried: each costs a tenth of that
CORRECTIONS = 8
PROBES = 16
# the norm of the largest of 16 products with Gaussian vectors is below ||E|| / 1.8 with probability 1e-6 for E of rank
# one, the worst case: P(|N(0, 1)| < 1 / 1.8)^16
PROBE_SAFETY = 1.8
# a factor with a larger defect says too little about A's eigenvalues
LARGEST_DEFECT = 0.25


@dataclass(frozen=True)
class Bracket:
    """Intervals (lower, upper) that hold a matrix's sigma_max and sigma_min."""

    sigma_max: tuple[float, float]
    sigma_min: tuple[float, float]

    @property
    def kappa(self) -> tuple[float, float]:
        """The interval of sigma_max / sigma_min; its upper end is inf where sigma_min may be 0."""
        lo, hi = self.sigma_max[0] / self.sigma_min[1], math.inf
        if self.sigma_min[0] > 0:
            hi = self.sigma_max[1] / self.sigma_min[0]
        # two roundings
        return lo * (1 - 4 * EPS), hi * (1 + 4 * EPS)

    def narrower_than(self, rtol: float) -> bool:
        lo, hi = self.kappa
        return hi - lo <= rtol * lo


def bracket(
    a: Tensor, factor: Factor, top: RitzPairs, frobenius: float, rtol: float, generator: torch.Generator
) -> Bracket | None:
    """Intervals whose quotient has relative width `rtol` where this factor is precise enough, wider ones elsewhere.

    Args:
        top: Ritz pairs of A^T A, for sigma_max.
        frobenius: ||A||_F.

    Returns:
        None if the factor broke down.
    """
    start = gaussian(a, BLOCK, factor.dtype, generator)
    inverse = block_lanczos(factor.solve, start, STEPS, rtol / 3)
    if inverse is None:
        return None
    low = torch.linalg.qr(inverse.largest(BLOCK))[0]
    high = top.largest(1)
    x = torch.cat([low, high / torch.linalg.vector_norm(high)], dim=1)
    below = _below(a, factor, inverse, low, generator)
    if below is None or not torch.isfinite(x).all():
        return None
    ax, gx = products(a, x)
    value = torch.linalg.vector_norm(ax[:, BLOCK]).square()
    largest = largest_singular_value(value, torch.linalg.vector_norm(gx[:, BLOCK] - value * x[:, BLOCK]))
    space = _Space(low, ax[:, :BLOCK], gx[:, :BLOCK])
    smallest = _smallest(a, factor, space, below, inverse.relative_residual, frobenius, rtol)
    return Bracket((largest[0].item(), largest[1].item()), smallest)


def at_least(a: Tensor, factor: Factor, top: RitzPairs, frobenius: float, generator: torch.Generator) -> float:
    """A lower bound on kappa from two inverse iterations: ||A u|| / ||A v|| for unit vectors u, v."""
    inverse = block_lanczos(factor.solve, gaussian(a, BLOCK, factor.dtype, generator), 2, 0.0)
    if inverse is None:
        return 1.0
    # enough of the start vector is left in the Ritz vector to hide a small ||A x||; one more step removes it
    low = factor.solve(inverse.largest(1).to(factor.dtype)).double()
    x = torch.cat([top.largest(1), low], dim=1)
    norms = torch.linalg.vector_norm(products(a, x)[0], dim=0) / torch.linalg.vector_norm(x, dim=0)
    longest, shortest = norms.tolist()
    return longest / shortest * (1 - 8 * EPS * frobenius / shortest) if shortest > 0 else math.inf


def gaussian(a: Tensor, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Gaussian numbers, (n, width), on the device of `a`; the same numbers on every device."""
    return torch.randn(a.shape[1], width, generator=generator, dtype=torch.float64).to(a.device, dtype)


@dataclass(frozen=True)
class _Space:
    """An orthonormal basis, (n, b), with its products A @ basis and A^T A @ basis."""

    basis: Tensor
    a: Tensor
    gram: Tensor


def _below(a: Tensor, factor: Factor, inverse: RitzPairs, low: Tensor, generator: torch.Generator) -> Tensor | None:
    """Lower bounds on the BLOCK + 1 smallest eigenvalues of A^T A, (BLOCK + 1,); 0 where the factor is too imprecise,
    None if it broke down."""
    z = gaussian(a, PROBES, factor.dtype, generator)
    x = factor.probe(z)
    if not torch.isfinite(x).all():
        return None
    defect = factor.defect(z, *products(a, x))
    images = torch.linalg.qr(factor.image(low.to(factor.dtype)))[0]
    shrinks = []
    for lowest in range(BLOCK + 1):
        eta = PROBE_SAFETY * torch.linalg.vector_norm(defect, dim=0).max().item()
        # a NaN defect must not count as a small one
        shrinks.append(factor.shrink(eta) if eta < LARGEST_DEFECT else 0.0)
        image = images[:, lowest : lowest + 1]
        defect = defect - image @ (image.mT @ defect)
    values, residuals = (part[-BLOCK - 1 :].flip(0) for part in (inverse.values, inverse.residuals))
    shrinks = torch.tensor(shrinks, dtype=torch.float64)
    return eigenvalues_below(values, residuals, shrinks, torch.finfo(factor.dtype).eps).to(a.device)


def _smallest(
    a: Tensor, factor: Factor, space: _Space, below: Tensor, hidden: float, frobenius: float, rtol: float
) -> tuple[float, float]:
    """The interval of sigma_min, improved until its relative width is `rtol` or all corrections are used."""
    floor = torch.tensor(4 * EPS * frobenius**2, dtype=torch.float64)
    best = 0.0
    for correction in range(CORRECTIONS + 1):
        theta, residuals = _rayleigh_ritz(space)
        found = lowest_eigenvalue(theta, residuals.mT @ residuals, below, torch.tensor(hidden), floor)
        best, upper = max(best, found.item()), math.sqrt(theta[0].item())
        done = math.sqrt(best) * (1 + rtol) >= upper
        if done or correction == CORRECTIONS or not below.any():
            break
        space = _widened(a, factor, space, residuals)
    # rounding of the float64 norm ||A x|| for a unit vector x
    error = 8 * EPS * frobenius / upper if upper > 0 else 0.0
    return math.sqrt(best) * max(0.0, 1 - error), upper * (1 + error)


def _rayleigh_ritz(space: _Space) -> tuple[Tensor, Tensor]:
    """The BLOCK smallest Ritz values of A^T A on the space, (BLOCK,), and their residual vectors, (n, BLOCK).

    From the singular values of A @ basis, not from the eigenvalues of its Gram matrix: squaring would cost half the
    digits of sigma_min.
    """
    _, sigma, right = torch.linalg.svd(torch.linalg.qr(space.a)[1])
    rotation = right.mT.flip(1)[:, :BLOCK]
    theta = sigma.flip(0)[:BLOCK] ** 2
    return theta, space.gram @ rotation - space.basis @ rotation * theta


def _widened(a: Tensor, factor: Factor, space: _Space, residuals: Tensor) -> _Space:
    """The space extended by M^-1 of the residuals (Davidson, J. Comput. Phys. 17, 1975)."""
    scale = torch.linalg.vector_norm(residuals, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    step = factor.solve((residuals / scale).to(factor.dtype)).double()
    for _ in range(2):
        step = torch.linalg.qr(step - space.basis @ (space.basis.mT @ step))[0]
    ax, gx = products(a, step)
    pairs = ((space.basis, step), (space.a, ax), (space.gram, gx))
    return _Space(*(torch.cat(pair, dim=1) for pair in pairs))
