"""Condition numbers of many matrices of one shape at once, for GPUs, which one matrix at a time leaves idle.

As `number`, but all in float64 (an H100 multiplies float64 as fast as float32), and with matrix products wherever there
is a choice: an explicit inverse of the Cholesky factor, so that a step is two products; Gram-Schmidt instead of QR; a
fixed number of steps, so that no loop waits for the device. Matrices that this doesn't settle go on to `by_factors` one
by one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kappatune_plugin.condition.bracket import BLOCK, LARGEST_DEFECT, PROBE_SAFETY, PROBES, Bracket
from kappatune_plugin.condition.by_factors import by_factors
from kappatune_plugin.condition.exact import from_eigenvalues, from_svd
from kappatune_plugin.condition.kappa import (
    LARGEST_BOUND,
    Kappa,
    check_input,
    only_bounded,
    random_numbers,
    scaled,
    settled,
    without_singular_values,
)
from kappatune_plugin.condition.ritz_bounds import EPS, eigenvalues_below, largest_singular_value, lowest_eigenvalue

# fewer columns leave no room for a Krylov space
FEWEST_COLUMNS = 33
# bytes of float64 copies and factors in use at a time, on an 80 GB device
WORKSPACE_BYTES = 8 << 30
# float64 matrices of (n, n) held for each: A^T A, the inverse factor and the parts it is made from
SQUARES_HELD = 4
# largest side handed to LAPACK's unblocked Cholesky; the rest is products
LEAF = 128
# products with a block of BLOCK vectors between checks of convergence, and checks before giving up
STEPS, ROUNDS = 12, 5
# enough for a bound
ROUGH_STEPS = 2
# share of a random vector mixed into each new one, so that there is a new direction where the Krylov space ends
FILL = 1e-10


@torch.no_grad()
def condition_numbers(w: Tensor, rtol: float = 1e-3, above: float = math.inf) -> list[Kappa]:
    """The condition number of each matrix w[i] of `w`, (b, m, n), on any device.

    Args:
        rtol, above: as in `condition_number`.

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
        some = _batch(tall[chosen], exponents, rtol, above) if n >= FEWEST_COLUMNS else [None] * len(chosen)
        for i, exponent, kappa in zip(chosen, exponents, some, strict=True):
            found[i] = _one(tall[i], exponent, rtol, above) if kappa is None else kappa
    return found


def _one(tall: Tensor, exponent: int, rtol: float, above: float) -> Kappa:
    """Kappa of a matrix that is too small for a batch, or not settled by its A^T A."""
    m, n = tall.shape
    if n < FEWEST_COLUMNS:
        return from_eigenvalues(tall, exponent, rtol) or from_svd(tall, exponent)
    return by_factors(tall, exponent, (torch.float64,), rtol, above) if m == n else from_svd(tall, exponent)


def _batch(tall: Tensor, exponents: Sequence[int], rtol: float, above: float) -> list[Kappa | None]:
    """Kappa of each matrix of `tall`, (b, m, n) with m >= n; None where its interval is wider than `rtol`."""
    found: list[Kappa | None] = [None] * len(tall)
    stack = _factored(tall, exponents, rtol)
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
            if each.narrower_than(rtol):
                sigma = each.sigma_max[0], each.sigma_min[1]
                known = log_volumes[position], norms[position], tall.shape[2], exponents[i]
                found[i] = settled(each.kappa, sigma, *known, "gram64")
        kept = [position for position, i in enumerate(chosen) if found[i] is None]
        chosen = [chosen[position] for position in kept]
        stack = stack.take(kept)
    return found


@dataclass
class _Stack:
    """Matrices A with their factors and their Krylov spaces so far. The batch is the first axis of all but `noise`.

    Attributes:
        a: (b, m, n), float64, values below 1.
        gram: (b, n, n), A^T A.
        inverse: (b, n, n), lower triangular X with X A^T A X^T near the identity.
        frobenius, log_volume: (b,).
        defect: (b,), upper bound on ||X A^T A X^T - I||; inf where A^T A has no Cholesky factor.
        low, high: (b, n, BLOCK), start vectors of the next Krylov spaces for the smallest and largest singular values.
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
        """Approximately (A^T A)^-1 v."""
        return self.inverse.mT @ (self.inverse @ v)

    def at_least(self) -> Tensor:
        """Lower bounds on the condition numbers, (b,), as in `bracket.at_least`."""
        # enough of the start vector is left in the Ritz vector to hide a small ||A x||; one more step removes it
        low = self.solve(_ritz_pairs(self.solve, self.low, self.noise, ROUGH_STEPS).vectors[..., :1])
        high = _ritz_pairs(lambda v: self.gram @ v, self.high, self.noise, ROUGH_STEPS).vectors[..., :1]
        x = torch.cat([high, low], -1)
        norms = torch.linalg.vector_norm(self.a @ x, dim=1) / torch.linalg.vector_norm(x, dim=1)
        longest, shortest = norms.unbind(-1)
        # 0, which bounds nothing, where the result isn't finite
        return torch.nan_to_num(longest / shortest * (1 - 8 * EPS * self.frobenius / shortest), 0.0, 0.0, 0.0)

    def brackets(self) -> list[Bracket]:
        """Intervals around the extreme singular values, from Krylov spaces that start where the last ones ended."""
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


def _factored(tall: Tensor, exponents: Sequence[int], rtol: float) -> _Stack:
    a = torch.stack([scaled(one, exponent, torch.float64) for one, exponent in zip(tall, exponents, strict=True)])
    gram = _gram(a)
    inverse, broken = _inverse_factor(gram)
    n = gram.shape[-1]
    widths = [BLOCK, BLOCK, PROBES]
    generators = [random_numbers(one, rtol) for one in tall]
    random = [torch.randn(n, sum(widths), generator=each, dtype=torch.float64) for each in generators]
    low, high, z = torch.stack(random).to(a.device).split(widths, 2)
    noise = torch.randn(n, STEPS * BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(a.device)
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
        low=low,
        high=high,
        noise=noise / torch.linalg.vector_norm(noise, dim=0),
    )


def _gram(a: Tensor) -> Tensor:
    """A^T A, (b, n, n): computed as a lower triangle in four block rows, then mirrored."""
    n = a.shape[2]
    gram = a.new_empty(a.shape[0], n, n)
    rows = -(-n // 4)
    for top in range(0, n, rows):
        end = min(top + rows, n)
        gram[:, top:end, :end] = a[:, :, top:end].mT @ a[:, :, :end]
        gram[:, :top, top:end] = gram[:, top:end, :top].mT
    return gram


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular X, (b, n, n), with X G X^T = I, by recursive halving; and a mask, (b,), of the G that aren't
    positive definite.

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
    """The BLOCK + 1 largest Ritz values and their residual norms, (b, BLOCK + 1), largest first; and the vectors of the
    first BLOCK, (b, n, BLOCK)."""

    values: Tensor
    residuals: Tensor
    vectors: Tensor


def _ritz_pairs(operator: Callable[[Tensor], Tensor], start: Tensor, noise: Tensor, steps: int) -> _RitzPairs:
    """Largest eigenpairs of a symmetric `operator`, (b, n, BLOCK) -> (b, n, BLOCK), from its Krylov space of `start`.

    The operator's image of the whole space is kept, so that residuals are computed directly and stay right whatever
    rounding did to the basis.
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
    """`v`, (b, n), made orthogonal to `basis`, (b, n, j), and normalized; `fill`, (n,), takes its place if nothing of
    it is left."""
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) + FILL * fill
    # twice is enough (Parlett, The Symmetric Eigenvalue Problem, ch. 6)
    for _ in range(2):
        v = v - (basis @ (basis.mT @ v[..., None]))[..., 0]
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v
