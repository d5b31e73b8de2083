"""An alias of a weight whose gradient goes to the selected slices of it.

autograd sees a custom function whose output aliases the base storage (no copy) and whose backward keeps only the
selected slices of the weight's gradient, so no gradient and no optimizer state exist for the rest.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.units import WeightUnit, unit_block


class Bindable(Protocol):
    """What a module needs to know of a unit that is trained inside it.

    Attributes:
        ran: whether a forward has read the unit's weight while it was to be trained.
        reached: whether a gradient has come back.
    """

    unit: WeightUnit
    ran: bool
    reached: bool

    @property
    def to_train(self) -> "Trained | None":
        """What is trained; None while this unit isn't training."""

    @property
    def trained(self) -> "Trained | None":
        """The same, once it is sure that the base holds its values."""


class Trained(Protocol):
    """What is trained of one unit."""

    def target(self) -> Tensor:
        """A tensor of the unit's shape as stored, for the gradient of its values: autograd takes it on from there."""

    @property
    def leaves(self) -> tuple[nn.Parameter, ...]:
        """The parameters that an optimizer holds."""


class SliceAlias(torch.autograd.Function):
    """base, layers, *targets -> an alias of base; the gradient of `base[unit.index]` goes to that unit's target."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, layers: Sequence[Bindable], *targets: Tensor) -> Tensor:
        ctx.layers, ctx.dtypes = layers, [target.dtype for target in targets]
        ctx.trained = [layer.to_train for layer in layers]
        for layer in layers:
            layer.ran = True
        return base.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slices: list[Tensor | None] = []
        each = zip(ctx.layers, ctx.trained, ctx.dtypes, strict=True)
        for position, (layer, trained, dtype) in enumerate(each):
            if layer.trained is not trained:
                raise KappaTuneError(
                    f"backward() of a forward that trained {layer.unit.name} runs while the base holds other values: "
                    "call it outside of disable_adapter(), with the adapter active that the forward ran with."
                )
            layer.reached = True
            needed = ctx.needs_input_grad[2 + position]
            # a view would keep the whole fused gradient in memory for as long as the slice's
            copy = bool(layer.unit.index)
            slices.append(_contiguous(unit_block(gradient, layer.unit), dtype, copy) if needed else None)
        return None, None, *slices


def _contiguous(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    return tensor.to(dtype=dtype, copy=copy, memory_format=torch.contiguous_format)


class TracedAlias(torch.autograd.Function):
    """`SliceAlias` without what torch.compile can't trace."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, indices: Sequence[tuple], *targets: Tensor) -> Tensor:
        ctx.indices, ctx.dtypes = indices, [target.dtype for target in targets]
        return base.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slices = [
            (gradient[index] if index else gradient).to(dtype)
            for index, dtype in zip(ctx.indices, ctx.dtypes, strict=True)
        ]
        return None, None, *slices
