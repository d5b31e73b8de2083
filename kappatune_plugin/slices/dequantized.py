"""A weight that is dequantized when its module reads it: the trained slices are written into that copy.

A parameter that torch computes is a property, which wins over an attribute of the instance, so `bind` can't replace it;
and the packed values that it is computed from can't hold what was trained.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.slices.alias import Bindable
from kappatune_plugin.slices.bind import aliased, select


class Shown(Bindable, Protocol):
    """What a dequantized weight needs to know of a unit that is trained inside it."""

    owner: nn.Module
    attribute: str

    def show(self, weight: Tensor) -> None:
        """Write the unit's values into `weight`, the whole parameter, where they aren't those of the base."""


class TrainedSlices(nn.Module):
    """A parametrization behind the one that dequantizes, for evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Shown] = []

    @torch.compiler.disable
    def forward(self, weight: Tensor) -> Tensor:
        """Write what is trained into `weight`, which nobody else holds; its gradient goes to what is trained."""
        with torch.no_grad():
            for layer in self.layers:
                layer.show(weight)
        selected = select(self.layers) if torch.is_grad_enabled() else ()
        return aliased(weight, selected) if selected else weight


def bind_dequantized(layer: Shown) -> None:
    """From now on `layer` shows its values whenever its owner reads the parameter, and gets its gradient."""
    stages = layer.owner.parametrizations[layer.attribute]
    if not isinstance(stages[-1], TrainedSlices):
        stages.append(TrainedSlices())
    stages[-1].layers.append(layer)


def unbind_dequantized(layers: Collection[Shown]) -> None:
    """Undo `bind_dequantized`."""
    for layer in layers:
        # made dense when it was merged, it has none
        computed = layer.owner._modules.get("parametrizations", {})
        if layer.attribute in computed:
            stages = computed[layer.attribute]
            stages[-1].layers.remove(layer)
            if not stages[-1].layers:
                del stages[-1]
