"""While a module's forward runs, its weight is an alias that hands gradients to the selected slices only.

The base parameter stays frozen and where it is. autograd sees a custom function whose output aliases the base storage
(no copy) and whose backward keeps only the selected slices of the weight's gradient, so no gradient and no optimizer
state exist for the rest.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.units import WeightUnit, unit_block

BINDINGS = "_kappatune_bindings"


class Bindable(Protocol):
    """What a module needs to know of a unit that is trained inside it."""

    unit: WeightUnit

    @property
    def trained(self) -> Tensor | None:
        """The values that receive the gradient; None while this unit isn't training."""


class SliceAlias(torch.autograd.Function):
    """base, layers, *masters -> an alias of base; the gradient of `base[unit.index]` goes to that unit's master."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, layers: Sequence[Bindable], *masters: Tensor) -> Tensor:
        ctx.layers, ctx.masters = layers, masters
        return base.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slices: list[Tensor | None] = []
        for position, (layer, master) in enumerate(zip(ctx.layers, ctx.masters, strict=True)):
            if layer.trained is not master:
                raise KappaTuneError(
                    f"backward() of a forward that trained {layer.unit.name} runs while the base holds other values: "
                    "call it outside of disable_adapter(), with the adapter active that the forward ran with."
                )
            needed = ctx.needs_input_grad[2 + position]
            # a view would keep the whole fused gradient in memory for as long as the slice's
            copy = bool(layer.unit.index)
            slices.append(_contiguous(unit_block(gradient, layer.unit), master.dtype, copy) if needed else None)
        return None, None, *slices


def _contiguous(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    return tensor.to(dtype=dtype, copy=copy, memory_format=torch.contiguous_format)


def bind(module: nn.Module, attribute: str, layer: Bindable) -> None:
    """From now on `module.attribute` routes its gradient to `layer` while `module.forward` runs.

    The forward is overridden by a subclass made at run time: it survives deepcopy and runs inside the gathers of ZeRO
    and FSDP, which an attribute on the instance or a pre-forward hook does not.
    """
    if BINDINGS not in module.__dict__:
        setattr(module, BINDINGS, {})
        module.__class__ = _binding_class(type(module))
    getattr(module, BINDINGS).setdefault(attribute, []).append(layer)


def unbind(module: nn.Module, attribute: str, layer: Bindable) -> None:
    """Undo `bind`; after the last one the module has its own class again."""
    bindings = getattr(module, BINDINGS)
    bindings[attribute] = [other for other in bindings[attribute] if other is not layer]
    if not bindings[attribute]:
        del bindings[attribute]
    if not bindings:
        delattr(module, BINDINGS)
        module.__class__ = type(module).__mro__[1]


@contextmanager
def bound(module: nn.Module) -> Iterator[None]:
    """Shadow the bound weights of `module` by aliases for the time of the context.

    Nothing happens without gradients (evaluation, generation, the first pass of re-entrant checkpointing): the base
    holds the current values anyway.
    """
    shadowed = []
    try:
        if torch.is_grad_enabled():
            for attribute, layers in module.__dict__.get(BINDINGS, {}).items():
                training = [(layer, layer.trained) for layer in layers]
                training = [(layer, master) for layer, master in training if master is not None]
                if training and attribute not in module.__dict__:
                    active, masters = zip(*training, strict=True)
                    module.__dict__[attribute] = SliceAlias.apply(module._parameters[attribute], active, *masters)
                    shadowed.append(attribute)
        yield
    finally:
        for attribute in shadowed:
            del module.__dict__[attribute]


@functools.cache
def _binding_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with bound(self):
            return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
