"""A weight that is dequantized when its module reads it: the trained slices are written into that copy.

A parameter that torch computes is a property, which wins over an attribute of the instance, so `bind` can't replace it;
and the packed values that it is computed from can't hold what was trained.
"""

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kappatune_plugin.slices.alias import Bindable
from kappatune_plugin.slices.bind import aliased, select
from kappatune_plugin.slices.weight import Reads, SliceWeight, slice_weight, with_zero_gradients


class Shown(Bindable, Protocol):
    """What a dequantized weight needs to know of a unit that is trained inside it."""

    owner: nn.Module
    attribute: str
    slices: "TrainedSlices"

    def show(self, weight: Tensor) -> None:
        """Write the unit's values into `weight`, the whole parameter, where they aren't those of the base."""


class TrainedSlices(nn.Module):
    """A parametrization behind the one that dequantizes, for evaluation too.

    Attributes:
        layers: the units that are trained in the parameter.
        reads: what the owner's forward, while it runs, has read of its weights; None outside of it.
        alias: what the owner reads in that forward.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.layers: list[Shown] = []
        self.reads: Reads | None = None
        self.alias: SliceWeight | None = None
        self.hooks = [
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        ]

    @torch.compiler.disable
    def forward(self, weight: Tensor) -> Tensor:
        """Write what is trained into `weight`, which nobody else holds; its gradient goes to what is trained."""
        with torch.no_grad():
            for layer in self.layers:
                layer.show(weight)
        selected = select(self.layers) if torch.is_grad_enabled() else ()
        if selected and self.reads is not None:
            self.alias = slice_weight(weight, selected, self.reads)
            return self.alias
        return aliased(weight, selected) if selected else weight

    def _begin(self, owner: nn.Module, args: Any) -> None:
        self.alias, self.reads = None, None if torch.compiler.is_compiling() else Reads()

    def _end(self, owner: nn.Module, args: Any, output: Any) -> Any:
        alias, self.alias, self.reads = self.alias, None, None
        # without an output there was an error
        return output if alias is None or output is None else with_zero_gradients(output, [alias])


def bind_dequantized(layer: Shown) -> None:
    """From now on `layer` shows its values whenever its owner reads the parameter, and gets its gradient."""
    stages = layer.owner.parametrizations[layer.attribute]
    if not isinstance(stages[-1], TrainedSlices):
        stages.append(TrainedSlices(layer.owner))
    stages[-1].layers.append(layer)
    # through __dict__, since it is no child of the layer
    layer.__dict__["slices"] = stages[-1]


def unbind_dequantized(layers: Collection[Shown]) -> None:
    """Undo `bind_dequantized`."""
    for layer in layers:
        slices = layer.__dict__.pop("slices")
        slices.layers.remove(layer)
        if not slices.layers:
            for hook in slices.hooks:
                hook.remove()
            # made dense when it was merged, the parameter isn't computed any more
            computed = layer.owner._modules.get("parametrizations", {})
            if layer.attribute in computed:
                del computed[layer.attribute][-1]
