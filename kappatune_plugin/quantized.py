"""Quantized weights as the numbers they stand for."""

import math
from collections.abc import Sequence

from torch import Tensor

from kappatune_plugin.errors import KappaTuneError

# what is added to a float8 weight's name for the tensor that scales it: DeepSeek's blocks, and what others store
SCALES = ("_scale_inv", "_scale")


# side of the blocks that share a scale, where the config doesn't say (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
FLOAT8_BLOCK = (128, 128)


def dequantize_float8(weight: Tensor, scales: Tensor | None, block: Sequence[int] = FLOAT8_BLOCK) -> Tensor:
    """`weight`, (rows, columns) in float8, times its scales, in float32.

    Args:
        scales: one number, one a row, or one for each `block` of (rows, columns); None means 1.

    Raises:
        KappaTuneError: scales of another shape.
    """
    values = weight.float()
    if scales is None:
        return values
    scales = scales.float()
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    for axis, (size, side) in enumerate(zip(weight.shape, block, strict=True)):
        count = scales.shape[axis] if scales.ndim == 2 else 0
        if count == math.ceil(size / side):
            scales = scales.repeat_interleave(side, dim=axis).narrow(axis, 0, size)
        elif count not in (1, size):
            raise KappaTuneError(
                f"A float8 weight of shape {tuple(weight.shape)} has scales of shape {tuple(scales.shape)}: expected "
                f"one, one a row, or one for each block of {tuple(block)}."
            )
    return values * scales
