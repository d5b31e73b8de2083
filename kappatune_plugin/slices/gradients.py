"""Gradients of the selected slices of a weight alone, from what went into a product with it and what came back.

A product `y = x @ W` is run with a frozen W, so autograd computes the gradient of x only. `SliceGradients` is put on y:
it lets y's gradient through, and makes of it and of the rows of x that were kept the gradients of the selected slices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kappatune_plugin.slices.alias import Part

Rows = slice | Tensor
ALL_ROWS = slice(None)
# transformers' own operator for where torch has none, as `OpOverloadPacket._qualified_op_name` has it
FALLBACK = "transformers::grouped_mm_fallback"


@dataclass(frozen=True)
class Product:
    """How a product with a weight was taken, M being a matrix of the weight as stored.

    Attributes:
        transposed: the product is x @ M.mT, not x @ M.
        columns: x and the product hold their vectors in columns, as in M @ x.
    """

    transposed: bool
    columns: bool = False

    def as_rows(self, tensor: Tensor) -> Tensor:
        """x, the product or its gradient as a matrix with a vector in each row."""
        tensor = tensor.mT if self.columns else tensor
        return tensor.reshape(-1, tensor.shape[-1])


def with_slice_gradients(
    output: Tensor,
    x: Tensor,
    product: Product,
    parts: Sequence[Part],
    targets: Sequence[Tensor],
    rows: Mapping[int | None, Rows],
) -> Tensor:
    """`output` with gradients for the parts of the weight that it was made with.

    Args:
        output: the product of `x` and the frozen weight.
        targets: for each part the tensor that its gradient goes to.
        rows: for each `part.expert` those rows of `product.as_rows(x)` that its matrix was multiplied with.
    """
    matrix = product.as_rows(x.detach())
    # gate and up of one expert share their rows
    kept = {expert: _keep(matrix, its_rows).to(output.dtype) for expert, its_rows in rows.items()}
    places = {expert: place for place, expert in enumerate(kept)}
    plan = [(part, places[part.expert], rows[part.expert]) for part in parts]
    return SliceGradients.apply(output, product, plan, len(kept), *kept.values(), *targets)


def _keep(matrix: Tensor, rows: Rows) -> Tensor:
    """The rows, and no other ones in memory for as long as they are."""
    chosen = matrix[rows]
    return chosen.clone() if isinstance(rows, slice) and len(chosen) < len(matrix) else chosen


def grouped_mm(function: Callable, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`function(x, weight, offs=offsets)`, one of torch's or transformers' grouped products, with a frozen weight."""
    if getattr(function, "_qualified_op_name", None) == FALLBACK:
        return FrozenFallback.apply(function, x, weight, offsets)
    return function(x, weight, offs=offsets)


class FrozenFallback(torch.autograd.Function):
    """transformers' operator without its own backward, which makes the weight's gradient even if nobody wants it."""

    @staticmethod
    def forward(ctx: Any, function: Callable, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(weight, offsets)
        return function(x, weight, offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, offsets = ctx.saved_tensors
        return None, ctx.function(gradient, weight.mT, offs=offsets), None, None


class SliceGradients(torch.autograd.Function):
    """output, product, plan, count, *rows of x, *targets -> output, with a gradient for each target."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, product: Product, plan: Sequence[tuple[Part, int, Rows]], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.product, ctx.plan, ctx.dtypes = product, plan, [target.dtype for target in tensors[count:]]
        ctx.save_for_backward(*tensors[:count])
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # non-reentrant checkpointing lets them be read once
        kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4 + len(kept) :]
        matrix = ctx.product.as_rows(gradient)
        slices: list[Tensor | None] = []
        # dtypes are those of the forward, whatever backward() is called under
        with torch.autocast(gradient.device.type, enabled=False):
            for (part, place, rows), dtype, needed in zip(ctx.plan, ctx.dtypes, wanted, strict=True):
                part.arrived()
                pair = (kept[place], matrix[rows])
                left, right = reversed(pair) if ctx.product.transposed else pair
                top, side = part.index[-2:]
                slices.append((left[:, top].mT @ right[:, side]).to(dtype) if needed else None)
        return gradient, None, None, None, *[None] * len(kept), *slices


class ZeroGradients(torch.autograd.Function):
    """parts, count, *outputs, *targets -> the outputs, with a gradient of zero for each target.

    For selected experts that got no token: DDP waits for a gradient of each parameter.
    """

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        ctx.like = [(each.shape, each.dtype, each.device) for each in tensors[count:]]
        return tuple(each.detach() for each in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        for part in ctx.parts:
            part.arrived()
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return None, None, *gradients, *zeros
