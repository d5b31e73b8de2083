"""Condition numbers of many matrices of one shape at once: for a GPU, which one matrix at a time leaves idle.

As `condition`, but all in float64 (an H100 multiplies float64 as fast as float32), with products of matrices wherever
there is a choice: an explicit inverse of the Cholesky factor, so that a step is two products; Gram-Schmidt in place of
QR; a fixed number of steps, so that no loop waits for the device. What isn't settled so goes on to `condition`'s
factors one by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kappatune_plugin.condition.bracket import BLOCK, LARGEST_DEFECT, PROBE_SAFETY, PROBES, Bracket, proven
from kappatune_plugin.condition.by_factors import by_factors
from kappatune_plugin.condition.exact import from_eigenvalues, from_svd
from kappatune_plugin.condition.kappa import (
    LARGEST_BOUND,
    Kappa,
    check_input,
    only_bounded,
    scaled,
    settled,
    without_singular_values,
)
from kappatune_plugin.condition.ritz_bounds import EPS, eigenvalues_below, largest_singular_value, lowest_eigenvalue

# fewer columns leave no room for a Krylov space
FEWEST_COLUMNS = 33
# bytes of float64 copies and factors in use at a time, of an 80 GB device
WORKSPACE_BYTES = 8 << 30
# float64 matrices of (n, n) held for each: A^T A, the inverse factor and the parts it is made from
SQUARES_HELD = 4
# rows and columns that LAPACK's unblocked Cholesky gets; the rest is products
LEAF = 128
# products with a block of BLOCK vectors before a look at the convergence, and looks before giving up
STEPS, ROUNDS = 12, 5
# enough for a bound
ROUGH_STEPS = 2
# part of a random vector mixed into each new one, so that there is a new one where the Krylov space ends
FILL = 1e-10


@torch.no_grad()
def condition_numbers(w: Tensor, rtol: float = 1e-3, above: float = math.inf, proof: bool = False) -> list[Kappa]:
    """The condition numbers of `w`, (b, m, n): what `condition_number` tells of each w[i], on any device.

    Args:
        rtol, above, proof: as in `condition_number`.

    Raises:
        KappaTuneError: not a 3-D floating-point tensor with values, or `rtol` out of range.
    """
    check_input("condition_numbers", w, 3, rtol)
    peaks = torch.stack(torch.aminmax(w.flatten(1), dim=1)).abs().amax(0).tolist() if len(w) else []
    found = [without_singular_values(peak) for peak in peaks]
    left = [i for i, known in enumerate(found) if known is None]
    tall = w if w.shape[1] > w.shape[2] else w.mT
    m, n = tall.shape[1:]
    size = max(1, WORKSPACE_BYTES // (8 * (m * n + SQUARES_HELD * n * n)))
    for begin in range(0, len(left), size):
        chosen = left[begin : begin + size]
        exponents = [math.frexp(peaks[i])[1] for i in chosen]
        some = _batch(tall[chosen], exponents, rtol, above, proof) if n >= FEWEST_COLUMNS else [None] * len(chosen)
        for i, exponent, kappa in zip(chosen, exponents, some, strict=True):
            found[i] = _one(tall[i], exponent, rtol, above, proof) if kappa is None else kappa
    return found


def _one(tall: Tensor, exponent: int, rtol: float, above: float, proof: bool) -> Kappa:
    """Kappa of a matrix that is too small for a batch, or not settled by its A^T A."""
    m, n = tall.shape
    if n < FEWEST_COLUMNS:
        kappa = None if proof else from_eigenvalues(tall, exponent, rtol)
        return kappa or from_svd(tall, exponent)
    if m == n:
        return by_factors(tall, exponent, (torch.float64,), rtol, above, proof)
    return from_svd(tall, exponent)


def _batch(tall: Tensor, exponents: Sequence[int], rtol: float, above: float, proof: bool) -> list[Kappa | None]:
    """Kappa of each matrix of `tall`, (b, m, n) with m >= n; None where its interval is wider than `rtol`."""
    found: list[Kappa | None] = [None] * len(tall)
    stack = _factored(tall, exponents)
    chosen = list(range(len(tall)))
    if above < LARGEST_BOUND:
        bounds, norms = stack.at_least().tolist(), stack.frobenius.tolist()
        for i, bound in enumerate(bounds):
            if above < bound < LARGEST_BOUND:
                found[i] = only_bounded(bound, norms[i], exponents[i], "gram64")
        chosen = [i for i in chosen if found[i] is None]
        stack = stack.take(chosen)
    for _ in range(ROUNDS):
        if not chosen:
            break
        brackets = stack.brackets()
        norms, log_volumes = stack.frobenius.tolist(), stack.log_volume.tolist()
        for position, (i, each) in enumerate(zip(chosen, brackets, strict=True)):
            if proof and each.narrower_than(rtol):
                each = proven(stack.a[position], each)
            if each is not None and each.narrower_than(rtol):
                sigma = each.sigma_max[0], each.sigma_min[1]
                method = "gram64" + " proven" * proof
                known = log_volumes[position], norms[position], tall.shape[2], exponents[i]
                found[i] = settled(each.kappa, sigma, *known, method)
        kept = [position for position, i in enumerate(chosen) if found[i] is None]
        chosen = [chosen[position] for position in kept]
        stack = stack.take(kept)
    return found


@dataclass
class _Stack:
    """Matrices A with their factors and the Krylov spaces so far; every field but `noise` has the batch first.

    Attributes:
        a: (b, m, n), float64, values below 1.
        gram: (b, n, n), A^T A.
        inverse: (b, n, n), X with X A^T A X^T near the identity; lower triangular.
        frobenius, log_volume: (b,).
        defect: (b,), bound of ||X A^T A X^T - I||; inf where A^T A has no Cholesky factor.
        low, high: (b, n, BLOCK), where the next Krylov spaces of the smallest and largest singular values start.
        noise: (n, STEPS * BLOCK), unit columns.
    """

    a: Tensor
    gram: Tensor
    inverse: Tensor
    frobenius: Tensor
    log_volume: Tensor
    defect: Tensor
    low: Tensor
    high: Tensor
    noise: Tensor

    def take(self, positions: Sequence[int]) -> "_Stack":
        if len(positions) == len(self.a):
            return self
        index = torch.tensor(positions, dtype=torch.long, device=self.a.device)
        parts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "noise"}
        return replace(self, **{name: part[index] for name, part in parts.items()})

    def solve(self, v: Tensor) -> Tensor:
        """(A^T A)^-1 v, nearly."""
        return self.inverse.mT @ (self.inverse @ v)

    def at_least(self) -> Tensor:
        """Numbers, (b,), that kappa is certainly not below, as in `bracket.at_least`."""
        # the Ritz vector still holds enough of the start to hide a small ||A x||: one more step takes it out
        low = self.solve(_ritz_pairs(self.solve, self.low, self.noise, ROUGH_STEPS).vectors[..., :1])
        high = _ritz_pairs(lambda v: self.gram @ v, self.high, self.noise, ROUGH_STEPS).vectors[..., :1]
        x = torch.cat([high, low], -1)
        norms = torch.linalg.vector_norm(self.a @ x, dim=1) / torch.linalg.vector_norm(x, dim=1)
        longest, shortest = norms.unbind(-1)
        # 0 where that isn't a number
        return torch.nan_to_num(longest / shortest * (1 - 8 * EPS * self.frobenius / shortest), 0.0, 0.0, 0.0)

    def brackets(self) -> list[Bracket]:
        """Intervals of the extreme singular values, from Krylov spaces that start where the last ones ended."""
        inverse = _ritz_pairs(self.solve, self.low, self.noise, STEPS)
        top = _ritz_pairs(lambda v: self.gram @ v, self.high, self.noise, STEPS)
        self.low, self.high = inverse.vectors, top.vectors
        x = torch.cat([inverse.vectors, top.vectors[..., :1]], -1)
        ax = self.a @ x
        gx = self.a.mT @ ax
        value = torch.linalg.vector_norm(ax[..., -1], dim=1).square()
        residual = torch.linalg.vector_norm(gx[..., -1] - value[:, None] * x[..., -1], dim=1)
        inner = ax[..., :BLOCK].mT @ ax[..., :BLOCK]
        theta, rotation = torch.linalg.eigh(torch.nan_to_num(inner, 0.0, 0.0, 0.0))
        low_residual = gx[..., :BLOCK] @ rotation - (x[..., :BLOCK] @ rotation) * theta[:, None]
        parts = (value, residual, theta, low_residual.mT @ low_residual, inverse.values, inverse.residuals)
        return _intervals(*(part.cpu() for part in (*parts, self.defect, self.frobenius)))


def _intervals(
    value: Tensor,
    residual: Tensor,
    theta: Tensor,
    residual_gram: Tensor,
    inverse_values: Tensor,
    inverse_residuals: Tensor,
    defect: Tensor,
    frobenius: Tensor,
) -> list[Bracket]:
    shrinks = torch.where(defect < LARGEST_DEFECT, 1 - defect, 0.0)[:, None].expand_as(inverse_values)
    below = eigenvalues_below(inverse_values, inverse_residuals, shrinks, torch.finfo(torch.float64).eps)
    hidden = inverse_residuals[:, 0] / inverse_values[:, 0]
    bound = lowest_eigenvalue(theta, residual_gram, below, hidden, 4 * EPS * frobenius.square())
    upper = theta[:, 0].clamp_min(0).sqrt()
    error = 8 * EPS * frobenius / upper
    smallest = bound.sqrt() * (1 - error).clamp_min(0), upper * (1 + error)
    ends = torch.stack([*largest_singular_value(value, residual), *smallest], -1).tolist()
    return [Bracket((top_lo, top_hi), (low_lo, low_hi)) for top_lo, top_hi, low_lo, low_hi in ends]


def _factored(tall: Tensor, exponents: Sequence[int]) -> _Stack:
    a = torch.stack([scaled(one, exponent, torch.float64) for one, exponent in zip(tall, exponents, strict=True)])
    gram = _gram(a)
    inverse, broken = _inverse_factor(gram)
    b, n = gram.shape[:2]
    # the same start vectors for every matrix and device: the same weights give the same report
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(n, 2 * BLOCK + PROBES + STEPS * BLOCK, generator=generator, dtype=torch.float64).to(a.device)
    low, high, z, noise = random.split([BLOCK, BLOCK, PROBES, STEPS * BLOCK], 1)
    x = inverse.mT @ z
    errors = torch.linalg.vector_norm(inverse @ (a.mT @ (a @ x)) - z, dim=1)
    defect = torch.where(broken, torch.inf, PROBE_SAFETY * errors.amax(-1))
    return _Stack(
        a=a,
        gram=gram,
        inverse=inverse,
        frobenius=torch.linalg.vector_norm(a, dim=(1, 2)),
        log_volume=-inverse.diagonal(dim1=1, dim2=2).abs().log().sum(-1),
        defect=defect,
        low=low.expand(b, -1, -1),
        high=high.expand(b, -1, -1),
        noise=noise / torch.linalg.vector_norm(noise, dim=0),
    )


def _gram(a: Tensor) -> Tensor:
    """A^T A, (b, n, n): the lower triangle in four block rows, then mirrored."""
    n = a.shape[2]
    gram = a.new_empty(a.shape[0], n, n)
    rows = -(-n // 4)
    for top in range(0, n, rows):
        end = min(top + rows, n)
        gram[:, top:end, :end] = a[:, :, top:end].mT @ a[:, :, :end]
        gram[:, :top, top:end] = gram[:, top:end, :top].mT
    return gram


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """X, (b, n, n) lower triangular, with X G X^T = I, by halves; and where G isn't positive definite, (b,).

    The inverse of [[L11, 0], [L21, L22]] is [[X11, 0], [-X22 L21 X11, X22]]; L21 = G21 X11^T.
    """
    n = gram.shape[-1]
    if n <= LEAF:
        lower, info = torch.linalg.cholesky_ex(gram)
        broken, identity = info != 0, torch.eye(n, dtype=gram.dtype, device=gram.device)
        lower = torch.where(broken[:, None, None], identity, lower)
        return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False), broken
    half = n // 2
    inverse = torch.zeros_like(gram)
    inverse[:, :half, :half], broken = _inverse_factor(gram[:, :half, :half])
    first = inverse[:, :half, :half]
    below = gram[:, half:, :half] @ first.mT
    inverse[:, half:, half:], broken_below = _inverse_factor(gram[:, half:, half:] - below @ below.mT)
    inverse[:, half:, :half] = -inverse[:, half:, half:] @ (below @ first)
    return inverse, broken | broken_below


@dataclass(frozen=True)
class _RitzPairs:
    """The BLOCK + 1 largest, largest first: values and residual norms (b, BLOCK + 1); vectors (b, n, BLOCK) of the
    first BLOCK."""

    values: Tensor
    residuals: Tensor
    vectors: Tensor


def _ritz_pairs(operator: Callable[[Tensor], Tensor], start: Tensor, noise: Tensor, steps: int) -> _RitzPairs:
    """Largest eigenpairs of a symmetric `operator`, (b, n, BLOCK) -> (b, n, BLOCK), from its Krylov space of `start`.

    With the operator's values on the whole space kept: the residuals are norms of what they claim to be, whatever
    the rounding did to the space.
    """
    b, n, width = start.shape
    steps = min(steps, n // width)
    basis = start.new_empty(b, n, steps * width)
    images = torch.empty_like(basis)
    block = start
    for begin in range(0, steps * width, width):
        for j in range(begin, begin + width):
            basis[..., j] = _orthonormal(block[..., j - begin], basis[..., :j], noise[:, j])
        block = operator(basis[..., begin : begin + width])
        images[..., begin : begin + width] = block
    projected = torch.nan_to_num(basis.mT @ images, 0.0, 0.0, 0.0)
    values, coordinates = torch.linalg.eigh((projected + projected.mT) / 2)
    values, coordinates = values[:, -BLOCK - 1 :].flip(-1), coordinates[..., -BLOCK - 1 :].flip(-1)
    vectors = basis @ coordinates
    residuals = torch.linalg.vector_norm(images @ coordinates - vectors * values[:, None], dim=1)
    return _RitzPairs(values, residuals, vectors[..., :BLOCK])


def _orthonormal(v: Tensor, basis: Tensor, fill: Tensor) -> Tensor:
    """The unit vector of `v`, (b, n), outside of `basis`, (b, n, j); of `fill`, (n,), if nothing of `v` is left."""
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) + FILL * fill
    # twice is enough (Parlett, The Symmetric Eigenvalue Problem, ch. 6)
    for _ in range(2):
        v = v - (basis @ (basis.mT @ v[..., None]))[..., 0]
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v
