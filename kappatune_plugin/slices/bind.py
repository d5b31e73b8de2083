"""While a module's forward runs, its weight is an alias that hands gradients to the selected slices only.

The base parameter stays frozen and where it is. Some weights are read by the module around the one that owns them (the
convolution of a state-space mixer, the output projection of nn.MultiheadAttention, lists of parameters), so the alias
is there while either of them runs.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kappatune_plugin.distributed import shards
from kappatune_plugin.slices.alias import Bindable, Part, SliceAlias, TracedAlias
from kappatune_plugin.slices.weight import Reads, Selected, SliceWeight, slice_weight, with_zero_gradients

BINDINGS, UNBOUND = "_kappatune_bindings", "_kappatune_unbound"
# see `parameter_readers`
Readers = dict[int, list[tuple[nn.Module, str, list[nn.Module]]]]


@dataclass
class Binding:
    """`owner.attribute` is a parameter of which `layers` train units."""

    owner: nn.Module
    attribute: str
    layers: list[Bindable]


def parameter_readers(model: nn.Module) -> Readers:
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

    readers: Readers = {}
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


@torch.compiler.disable
def shadow(module: nn.Module, reads: Reads | None = None) -> list[tuple[nn.Module, str]]:
    """Put aliases before the weights that `module` binds; returns where, for `unshadow`.

    Args:
        reads: what to note reads of fused weights in; their aliases are then those of `slices.weight`.

    Nothing happens without gradients (evaluation, generation, the first pass of re-entrant checkpointing): the base
    holds the current values anyway.
    """
    shadowed: list[tuple[nn.Module, str]] = []
    if not torch.is_grad_enabled():
        return shadowed
    try:
        for binding in module.__dict__.get(BINDINGS, ()):
            if _alias(module, binding, reads):
                shadowed.append((binding.owner, binding.attribute))
    except BaseException:
        unshadow(shadowed)
        raise
    return shadowed


def unshadow(shadowed: Sequence[tuple[nn.Module, str]]) -> None:
    """Take the aliases away."""
    for owner, attribute in shadowed:
        del owner.__dict__[attribute]


def _alias(module: nn.Module, binding: Binding, reads: Reads | None) -> bool:
    """Put the alias of one parameter in place, if there is something to train in it and none is there yet."""
    owner, attribute = binding.owner, binding.attribute
    # what is divided over ranks is whole only while its owner runs
    if attribute in owner.__dict__ or (owner is not module and shards.is_partitioned(owner._parameters[attribute])):
        return False
    selected = select(binding.layers)
    if not selected:
        return False
    parameter = owner._parameters[attribute]
    fused = reads is not None and _is_fused(parameter, selected)
    owner.__dict__[attribute] = slice_weight(parameter, selected, reads) if fused else aliased(parameter, selected)
    return True


def select(layers: Sequence[Bindable]) -> Selected:
    """Those of `layers` that train, with the tensors that their gradients go to."""
    training = [(layer, layer.trained) for layer in layers]
    selected = tuple(
        (Part(layer, trained, layer.unit.index), trained.target()) for layer, trained in training if trained is not None
    )
    for part, _ in selected:
        part.layer.ran = True
    return selected


def aliased(weight: Tensor, selected: Selected) -> Tensor:
    """An alias of any weight, which gets the whole gradient and hands on that of what is selected."""
    parts, targets = zip(*selected, strict=True)
    return SliceAlias.apply(weight, parts, *targets)


def _is_fused(parameter: Tensor, selected: Selected) -> bool:
    """Whether `slices.weight` knows it: no weight that is divided over ranks, and none of a class of its own."""
    plain = type(parameter) in (Tensor, nn.Parameter) and not shards.is_partitioned(parameter)
    return plain and parameter.ndim == 3 and all(part.expert is not None for part, _ in selected)


def _run_bound(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    run = _run_traced if torch.compiler.is_compiling() else _run_eager
    return run(module, forward, *args, **kwargs)


def _run_traced(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """`_run_bound` as torch.compile can trace it, in one graph with what is around it.

    What an alias checks of its layer at run time isn't: that the base holds the values is for the hooks around
    optimizers, and for what saves them.
    """
    bindings = module.__dict__[BINDINGS] if torch.is_grad_enabled() else ()
    training = [(each, layer, layer.to_train) for each in bindings for layer in each.layers]
    training = [(binding, layer, trained) for binding, layer, trained in training if trained is not None]
    for binding, layer, trained in training:
        held = (binding.owner._parameters[binding.attribute], *trained.leaves)
        if any(map(shards.is_partitioned, held)):
            return _run_eager(module, forward, *args, **kwargs)
        layer.ran = True
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for binding in bindings:
            pairs = [(layer.unit.index, trained.target()) for each, layer, trained in training if each is binding]
            if pairs:
                indices, targets = zip(*pairs, strict=True)
                parameters, attribute = binding.owner._parameters, binding.attribute
                replaced.append((parameters, attribute, parameters[attribute]))
                parameters[attribute] = TracedAlias.apply(parameters[attribute], indices, *targets)
        return forward(*args, **kwargs)
    finally:
        for parameters, attribute, base in replaced:
            parameters[attribute] = base


@torch.compiler.disable(recursive=False)
def _run_eager(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    reads = Reads()
    shadowed = shadow(module, reads)
    aliases = [owner.__dict__[attribute] for owner, attribute in shadowed]
    try:
        output = forward(*args, **kwargs)
    finally:
        unshadow(shadowed)
    return with_zero_gradients(output, [alias for alias in aliases if isinstance(alias, SliceWeight)])


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
