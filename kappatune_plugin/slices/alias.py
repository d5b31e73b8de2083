"""An alias of a weight whose gradient goes to the selected slices of it.

autograd sees a custom function whose output aliases the base storage (no copy) and whose backward keeps only the
selected slices of the weight's gradient, so no gradient and no optimizer state exist for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.units import WeightUnit


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


@dataclass(frozen=True)
class Part:
    """One unit that a forward trains, inside a weight or a view of it.

    Attributes:
        layer: the module of the unit.
        trained: what was trained of it when the forward began.
        index: `weight[index]` is the unit; empty for a whole weight.
    """

    layer: Bindable
    trained: Trained
    index: tuple[int | slice, ...]

    @property
    def expert(self) -> int | None:
        """The position of the unit's matrix in a weight of three axes; None for a unit inside a matrix."""
        return self.index[0] if len(self.index) == 3 else None

    def arrived(self) -> None:
        """Take note that a gradient has come back.

        Raises:
            KappaTuneError: the base holds other values by now than those that the forward ran with.
        """
        if self.layer.trained is not self.trained:
            raise KappaTuneError(
                f"backward() of a forward that trained {self.layer.unit.name} runs while the base holds other values: "
                "call it outside of disable_adapter(), with the adapter active that the forward ran with."
            )
        self.layer.reached = True


class SliceAlias(torch.autograd.Function):
    """weight, parts, *targets -> an alias of weight; the gradient of `weight[part.index]` goes to the part's target."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: Sequence[Part], *targets: Tensor) -> Tensor:
        ctx.parts, ctx.dtypes = parts, [target.dtype for target in targets]
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slices: list[Tensor | None] = []
        for position, (part, dtype) in enumerate(zip(ctx.parts, ctx.dtypes, strict=True)):
            part.arrived()
            block = gradient[part.index] if part.index else gradient
            # a view would keep the whole fused gradient in memory for as long as the slice's
            copied = {"copy": bool(part.index), "memory_format": torch.contiguous_format}
            slices.append(block.to(dtype=dtype, **copied) if ctx.needs_input_grad[2 + position] else None)
        return None, None, *slices


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
