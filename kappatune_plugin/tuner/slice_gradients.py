"""While a module's forward runs, its weight is an alias that hands gradients to the selected slices only.

The base parameter stays frozen and where it is. autograd sees a custom function whose output aliases the base storage
(no copy) and whose backward keeps only the selected slices of the weight's gradient, so no gradient and no optimizer
state exist for the rest.

Some weights are read by the module around the one that owns them (the convolution of a state-space mixer, the output
projection of nn.MultiheadAttention, lists of parameters), so the alias is there while either of them runs.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.units import WeightUnit, unit_block

BINDINGS, UNBOUND = "_kappatune_bindings", "_kappatune_unbound"


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
    def trained(self) -> Tensor | None:
        """The values that receive the gradient; None while this unit isn't training."""


@dataclass
class Binding:
    """`owner.attribute` is a parameter of which `layers` train units."""

    owner: nn.Module
    attribute: str
    layers: list[Bindable]


class SliceAlias(torch.autograd.Function):
    """base, layers, *masters -> an alias of base; the gradient of `base[unit.index]` goes to that unit's master."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, layers: Sequence[Bindable], *masters: Tensor) -> Tensor:
        ctx.layers, ctx.masters = layers, masters
        for layer in layers:
            layer.ran = True
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
            layer.reached = True
            needed = ctx.needs_input_grad[2 + position]
            # a view would keep the whole fused gradient in memory for as long as the slice's
            copy = bool(layer.unit.index)
            slices.append(_contiguous(unit_block(gradient, layer.unit), master.dtype, copy) if needed else None)
        return None, None, *slices


def _contiguous(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    return tensor.to(dtype=dtype, copy=copy, memory_format=torch.contiguous_format)


def parameter_readers(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, list[nn.Module]]]]:
    """For the `id` of each parameter every (owner, attribute, modules to bind): tied weights have several owners.

    Bound are the owner and the nearest module around it that has a forward, which lists of modules don't.
    """
    parents: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(child, []).append(module)

    def around(module: nn.Module) -> list[nn.Module]:
        found = []
        for parent in parents.get(module, ()):
            found += [parent] if _runs(parent) else around(parent)
        return found

    readers: dict[int, list[tuple[nn.Module, str, list[nn.Module]]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(id(parameter), []).append((module, attribute, [module, *around(module)]))
    return readers


def _runs(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def bind(reader: nn.Module, owner: nn.Module, attribute: str, layer: Bindable) -> None:
    """From now on `owner.attribute` routes its gradient to `layer` while `reader.forward` runs.

    The forward is overridden by a subclass made at run time: it survives deepcopy and runs inside the gathers of ZeRO
    and FSDP, which an attribute on the instance or a pre-forward hook does not. A forward that somebody has set on the
    instance, as accelerate does to move inputs between devices, is kept and runs inside ours, or ours inside it.
    """
    if BINDINGS not in reader.__dict__:
        reader.__dict__[BINDINGS] = []
        reader.__class__ = _binding_class(type(reader))
        name = _instance_forward(reader)
        if name in reader.__dict__:
            reader.__dict__[name] = functools.partial(_run_bound, reader, reader.__dict__[name])
    bindings = reader.__dict__[BINDINGS]
    found = next((each for each in bindings if each.owner is owner and each.attribute == attribute), None)
    if found is None:
        found = Binding(owner, attribute, [])
        bindings.append(found)
    found.layers.append(layer)


def unbind(model: nn.Module, layers: Collection[Bindable]) -> None:
    """Undo `bind` for `layers` in all of `model`; modules that bind nothing any more have their own class again."""
    gone = {id(layer) for layer in layers}
    for module in list(model.modules()):
        bindings = module.__dict__.get(BINDINGS)
        if bindings is None:
            continue
        for binding in bindings:
            binding.layers = [layer for layer in binding.layers if id(layer) not in gone]
        bindings[:] = [binding for binding in bindings if binding.layers]
        if not bindings:
            _unwrap(module)


def _unwrap(module: nn.Module) -> None:
    del module.__dict__[BINDINGS]
    # FSDP2 puts a class of its own on top, under which ours does no harm
    module.__class__ = type(module).__dict__.get(UNBOUND, type(module))
    name = _instance_forward(module)
    forward = module.__dict__.get(name)
    if isinstance(forward, functools.partial) and forward.func is _run_bound:
        module.__dict__[name] = forward.args[1]


def _instance_forward(module: nn.Module) -> str:
    """The attribute of the instance that runs in the place of its class's forward, if there is one.

    accelerate's hooks bring inputs and weights to their device first, and then call what it calls `_old_forward`.
    """
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


@contextmanager
def bound(module: nn.Module) -> Iterator[None]:
    """Shadow the weights that `module` binds by aliases for the time of the context.

    Nothing happens without gradients (evaluation, generation, the first pass of re-entrant checkpointing): the base
    holds the current values anyway.
    """
    shadowed: list[tuple[nn.Module, str]] = []
    try:
        if torch.is_grad_enabled():
            _shadow(module, shadowed)
        yield
    finally:
        for owner, attribute in shadowed:
            del owner.__dict__[attribute]


def _shadow(module: nn.Module, shadowed: list[tuple[nn.Module, str]]) -> None:
    """Put the aliases in place, and where they are into `shadowed`."""
    for binding in module.__dict__.get(BINDINGS, ()):
        owner, attribute = binding.owner, binding.attribute
        # what is divided over ranks is whole only while its owner runs
        if attribute in owner.__dict__ or (owner is not module and shards.is_partitioned(owner._parameters[attribute])):
            continue
        training = [(layer, layer.trained) for layer in binding.layers]
        training = [(layer, master) for layer, master in training if master is not None]
        if training:
            active, masters = zip(*training, strict=True)
            owner.__dict__[attribute] = SliceAlias.apply(owner._parameters[attribute], active, *masters)
            shadowed.append((owner, attribute))


@torch.compiler.disable(recursive=False)
def _run_bound(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch.compile leaves alone: `forward`, in which the aliases are tensors like any other, it compiles."""
    with bound(module):
        return forward(*args, **kwargs)


@functools.cache
def _binding_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run_bound(self, functools.partial(base.forward, self), *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # pickle finds classes by name, and under this name it finds `base`
        return _empty, (base,), *base.__reduce_ex__(self, protocol)[2:]

    names = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__, UNBOUND: base}
    return type(base.__name__, (base,), {**names, "__reduce_ex__": reduce})


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = _binding_class(base)
    return cls.__new__(cls)
