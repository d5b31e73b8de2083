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
