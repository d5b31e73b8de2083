"""The signal-to-noise ratio that Spectrum ranks by (arXiv 2406.06623), for comparison."""

import math

import torch
from torch import Tensor

# the interquartile range of a normal law, in standard deviations
NORMAL_IQR = 1.349


def signal_to_noise(matrix: Tensor) -> float:
    """(sum of sigma_i above eps) / (sum of the others) / sigma_max, of a non-zero floating-point matrix (m, n).

    eps = s (1 + sqrt(min(m, n) / max(m, n))) is the largest singular value of a noise matrix by the Marchenko-Pastur
    law; as in the paper, s is the interquartile range of the singular values over that of a normal law. If none is
    below eps, their sum counts as 1, as in Spectrum's own program. Not scale-free: W / 2 has twice the value.
    """
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.mT
    sigma = torch.linalg.svdvals(tall.to(torch.promote_types(tall.dtype, torch.float32)))
    quartiles = torch.quantile(sigma, torch.tensor([0.25, 0.75], dtype=sigma.dtype, device=sigma.device))
    spread = (quartiles[1] - quartiles[0]) / NORMAL_IQR
    eps = spread * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
    signal, noise = sigma[sigma > eps].sum().item(), sigma[sigma <= eps].sum().item()
    return signal / (noise or 1.0) / sigma[0].item()
