"""One trained unit inside experts that are stored in 4 bits; and how it, or any other, is put into a model."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import Tensor, nn

from kappatune_plugin.slices.bind import Readers, bind, unbind
from kappatune_plugin.slices.dequantized import bind_dequantized, unbind_dequantized
from kappatune_plugin.tuner.layer import KappaTuneLayer, child_name
from kappatune_plugin.tuner.values import Original
from kappatune_plugin.weights.quantized import expert_block, make_whole, quantized_form
from kappatune_plugin.weights.units import WeightUnit, packed_parameters, place_of, unit_block


class DequantizedLayer(KappaTuneLayer):
    """A unit of which the base holds packed values alone: what is trained is put into each copy that is dequantized.

    `slices.dequantized` asks for it. So nothing has to be written after a step, and the base's own values are
    dequantized anew where they are needed.
    """

    def __init__(self, owner: nn.Module, attribute: str, unit: WeightUnit) -> None:
        # through __dict__, since registered values would have two names
        self.__dict__["shown"] = None
        super().__init__(owner, attribute, unit)
        self.original = _Packed(self)

    @property
    def parameter(self) -> Tensor:
        """The base's values of this unit, dequantized: a new tensor, in the shape in which its parameter has it."""
        return expert_block(packed_parameters(self.owner)[self.attribute], self.unit.index)

    @property
    def stored(self) -> WeightUnit:
        """See `KappaTuneLayer`."""
        return replace(self.unit, index=())

    @property
    def block(self) -> Tensor:
        """The values that the module computes with, of the base's dtype."""
        base = self.parameter
        return base if self.shown is None else self.shown.whole(base).to(base.dtype)

    @property
    def moved(self) -> bool:
        """See `KappaTuneLayer`: the values are read whenever the module runs."""
        return False

    def show(self, weight: Tensor) -> None:
        """See `slices.dequantized.Shown`."""
        if self.shown is not None:
            block = unit_block(weight, self.unit)
            block.copy_(self.shown.whole(block))

    def write(self, adapter: str | None = None) -> None:
        """Let the values that should hold now, or those of `adapter`, be those that the module computes with."""
        values = self.kappatune_values[adapter] if adapter else self.active
        self.__dict__["shown"] = None if self.disable_adapters else values

    def write_original(self) -> None:
        """Let the module compute with the base model's own values."""
        self.__dict__["shown"] = None

    def _switch(self) -> None:
        self.write()


class _Packed(Original):
    """The base model's own values of one unit, dequantized whenever they are asked for."""

    divided = False

    def __init__(self, layer: DequantizedLayer) -> None:
        self._layer = layer

    @property
    def values(self) -> Tensor:
        return self._layer.parameter

    def whole(self, parameter: Tensor) -> Tensor:
        return parameter

    def divide(self, parameter: Tensor) -> None:
        """Never divided over ranks."""


def dequantize_linear(model: nn.Module, units: Iterable[WeightUnit]) -> None:
    """Replace the quantized linear layers that hold some of `units` by what they stand for."""
    for name in (unit.parameter for unit in units if not unit.index):
        if quantized_form(model.get_parameter(name)) is not None:
            make_whole(model, name.rpartition(".")[0])


def attach(target: nn.Module, name: str, unit: WeightUnit, readers: Readers) -> None:
    """Give `target`, which holds the unit's parameter, a layer of it under `name`, bound to all that reads it."""
    attribute = place_of(unit.parameter)[1]
    if attribute not in target._parameters:
        packed = DequantizedLayer(target, attribute, unit)
        target.add_module(name, packed)
        bind_dequantized(packed)
        return
    layer = KappaTuneLayer(target, attribute, unit)
    target.add_module(name, layer)
    for owner, its_attribute, modules in readers[id(target._parameters[attribute])]:
        for reader in modules:
            bind(reader, owner, its_attribute, layer)


def detach(model: nn.Module, layers: Collection[KappaTuneLayer]) -> None:
    """Undo `attach` for `layers`, wherever in `model` they are."""
    unbind(model, layers)
    unbind_dequantized([layer for layer in layers if isinstance(layer, DequantizedLayer)])
    for layer in layers:
        del layer.owner._modules[child_name(layer.unit)]
