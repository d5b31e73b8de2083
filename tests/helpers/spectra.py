"""Matrices with known singular values."""

import numpy as np
import torch
from torch import Tensor


def singular_values(w: Tensor) -> np.ndarray:
    return np.linalg.svd(w.double().numpy(), compute_uv=False)


def with_spectrum(m: int, n: int, sigma: np.ndarray, seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with the singular values sigma, min(m, n) of them."""
    rng = np.random.default_rng([m, n, seed])
    left, _ = np.linalg.qr(rng.standard_normal((m, len(sigma))))
    right, _ = np.linalg.qr(rng.standard_normal((n, len(sigma))))
    return torch.from_numpy((left * sigma) @ right.T)


def hidden_from_seed_0(where: str, hidden: float, extra: int = 0) -> Tensor:
    """A matrix, (400 + extra, 400) in float64, whose singular vector at the "top" or the "bottom" is orthogonal to the
    first two blocks of four vectors that a generator of seed 0 draws. Without it kappa would be 2.5 at the top, 10 at
    the bottom; with it `hidden` times as much."""
    n, seed_0 = 400, torch.Generator().manual_seed(0)
    fixed = torch.cat([torch.randn(n, 4, generator=seed_0, dtype=torch.float64) for _ in range(2)], 1)
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    known = torch.linalg.qr(fixed)[0]
    for _ in range(3):
        first = first - known @ (known.T @ first)
    v = torch.linalg.qr(torch.cat([first, torch.randn(n, n - 1, generator=generator, dtype=torch.float64)], 1))[0]
    u = torch.linalg.qr(torch.randn(n + extra, n, generator=generator, dtype=torch.float64))[0]
    sigma = torch.linspace(0.5, 0.4, n, dtype=torch.float64)
    sigma[:3] = torch.tensor([hidden, 1.0, 0.45] if where == "top" else [0.1 / hidden, 0.1, 1.0])
    a = (u * sigma) @ v.T
    return (a if extra else a.T).contiguous()
