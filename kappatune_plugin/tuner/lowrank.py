"""A low-rank pair beside a unit's own values, as PEFT's LoRA has it, for one expert of a fused parameter too."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.tuner.values import Values
from kappatune_plugin.weights.units import WeightUnit

if TYPE_CHECKING:
    from kappatune_plugin.tuner.layer import KappaTuneLayer


class LowRank(Values):
    """A unit's values are the base's + scaling * lora_B @ lora_A (arXiv 2106.09685), and the pair is trained.

    The base holds them after each step, so a forward costs what the base's costs, and the pair costs two products with
    the unit's gradient in backward.

    Attributes:
        lora_A: (r, columns in), begun as PEFT begins it: uniform, as `nn.Linear` is.
        lora_B: (rows out, r), begun at zero.
        scaling: lora_alpha / r, with `use_rslora` lora_alpha / sqrt(r) (arXiv 2312.03732).
    """

    def __init__(self, layer: "KappaTuneLayer", config: KappaTuneConfig) -> None:
        super().__init__(layer)
        self._turned = stored_turned(layer.owner, fused=len(layer.unit.index) == 3)
        rows, columns = layer.unit.shape[::-1] if self._turned else layer.unit.shape
        where = {"dtype": layer.parameter.dtype, "device": layer.parameter.device}
        self.lora_A = nn.Parameter(torch.empty(config.r, columns, **where))
        self.lora_B = nn.Parameter(torch.zeros(rows, config.r, **where))
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def target(self) -> Tensor:
        """See `slices.alias.Trained`."""
        return _Pair.apply(self.lora_A, self.lora_B, self.scaling, self._turned)

    def line(self) -> tuple[nn.Parameter, Tensor | None]:
        """See `Values`."""
        return self.lora_B, None

    def whole(self, base: Tensor | None = None) -> Tensor:
        """See `Values`."""
        return (self.layer.original.values if base is None else base) + self._change(
            self.lora_A.detach(), self.lora_B.detach()
        )

    @torch.no_grad()
    def part(self, wanted: Sequence[shards.Range]) -> Tensor:
        """See `Values`."""
        change = self._change(*(shards.whole_block(leaf, ()) for leaf in self.leaves))
        start, stop = wanted[ranks.rank()]
        return self.layer.original.values.reshape(-1) + change.reshape(-1)[start:stop]

    def _change(self, down: Tensor, up: Tensor) -> Tensor:
        change = self.scaling * (up @ down)
        return change.T if self._turned else change


class _Pair(torch.autograd.Function):
    """lora_A, lora_B, scaling, turned -> a tensor in the place of their product, which nobody reads.

    The base holds the product already; only the gradient goes through here.
    """

    @staticmethod
    def forward(ctx: Any, down: Tensor, up: Tensor, scaling: float, turned: bool) -> Tensor:
        ctx.save_for_backward(down, up)
        ctx.scaling, ctx.turned = scaling, turned
        shape = (up.shape[0], down.shape[1])
        return down.new_zeros(()).expand(shape[::-1] if turned else shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        down, up = ctx.saved_tensors
        gradient = gradient.T if ctx.turned else gradient
        return ctx.scaling * (up.T @ gradient), ctx.scaling * (gradient @ down.T), None, None


def stored_turned(owner: nn.Module, fused: bool) -> bool:
    """Whether a module stores a matrix as (in, out): GPT-2's Conv1D, and the fused experts of GPT-OSS and Llama 4."""
    return isinstance(owner, Conv1D) or (fused and bool(getattr(owner, "is_transposed", False)))


def check_rank(units: Sequence[WeightUnit], r: int) -> None:
    """Raise KappaTuneError unless `r` is a rank that every unit can have, and there is a unit."""
    if not units:
        raise KappaTuneError("k: 0 selects no matrix, and adapter: lora needs one: give k a number from 1.")
    smallest = min(units, key=lambda unit: min(unit.shape))
    if not 1 <= r <= min(smallest.shape):
        raise KappaTuneError(
            f"r is {r}, expected 1 to {min(smallest.shape)}: {smallest.name} has {smallest.shape[0]} rows and "
            f"{smallest.shape[1]} columns. Lower r (or match), or leave such matrices out (`exclude`)."
        )


def check_pairs(model: nn.Module, units: Sequence[WeightUnit], config: KappaTuneConfig) -> None:
    """Raise KappaTuneError for a config or units that pairs beside weights can't do."""
    check_rank(units, config.r)
    if config.lora_dropout:
        raise KappaTuneError(
            f"lora_dropout is {config.lora_dropout:g}, and the pairs are added to the weights, where there is no input "
            "to drop. Delete it; or, if all selected matrices are whole linear layers, give PEFT "
            "`kappatune_plugin.lora_config(model, config)`, as recipes do."
        )
    # a slice is a matrix as stored
    whole = [unit for unit in units if not unit.index]
    shapes = {unit.name: shards.layout(model.get_parameter(unit.parameter)).shape for unit in whole}
    wrong = next((name for name, shape in shapes.items() if len(shape) != 2), None)
    if wrong is not None:
        raise KappaTuneError(
            f"{wrong} has the shape {tuple(shapes[wrong])}, and a low-rank pair needs a matrix: leave it out (exclude)."
        )
