"""A fused weight whose selected slices get their gradients, and whose rest costs none.

Experts of one layer are one parameter (experts, ., .), of which a forward reads one after the other (`weight[expert]`),
those of each token (`weight[ids]`), or all in one grouped product. In each the gradients of the selected slices follow
from rows that went in and gradients that came back, so the gradient of the whole parameter is never made.

Whatever else is done with the weight is done with what it is to autograd: the output of a `SliceAlias`, which gets the
whole gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kappatune_plugin.slices.alias import Part, SliceAlias
from kappatune_plugin.slices.gradients import (
    ALL_ROWS,
    FALLBACK,
    Product,
    Rows,
    ZeroGradients,
    grouped_mm,
    with_slice_gradients,
)

Selected = tuple[tuple[Part, Tensor], ...]


@dataclass
class Reads:
    """What one forward of a module has read of its weights.

    Attributes:
        got: the `id` of each part's layer to which a product will bring a gradient.
        offsets: where the groups of the last grouped product ended, as a tensor and as numbers.
    """

    got: set[int] = field(default_factory=set)
    offsets: tuple[Tensor | None, list[int]] = (None, [])

    def ends(self, offsets: Tensor) -> list[int]:
        """`offsets` as numbers. One layer's products share them, and a GPU has to be waited for."""
        if self.offsets[0] is not offsets:
            self.offsets = (offsets, offsets.tolist())
        return self.offsets[1]


class SliceWeight(Tensor):
    """An alias of a weight (experts, ., .), or of one expert's (., .), that knows which parts of it are trained.

    Attributes:
        selected: those parts, with the tensors that their gradients go to.
        reads: see `Reads`; the same for all views of one weight.
        transposed: whether it is the transpose of what the parts' indices mean.
        ids: int64 (n,), the expert of each of its matrices, if it was gathered by `weight[ids]`.
    """

    selected: Selected
    reads: Reads
    transposed: bool
    ids: Tensor | None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = KNOWN.get(getattr(function, "_qualified_op_name", function)) if torch.is_grad_enabled() else None
        with torch._C.DisableTorchFunctionSubclass():
            found = NotImplemented if known is None else known(function, *args, **kwargs or {})
            return function(*args, **kwargs or {}) if found is NotImplemented else found


def slice_weight(weight: Tensor, selected: Selected, reads: Reads) -> SliceWeight:
    """An alias of `weight`, of three axes or two, with gradients for `selected` alone, of as many indices each."""
    parts, targets = zip(*selected, strict=True)
    return _view(SliceAlias.apply(weight, parts, *targets), selected, reads)


def with_zero_gradients(output: Any, weights: Sequence[SliceWeight]) -> Any:
    """What a module returned, with gradients of zero for those parts of its weights that no product has read."""
    missed = [each for weight in weights for each in weight.selected if id(each[0].layer) not in weight.reads.got]
    leaves, form = tree_flatten(output)
    floating = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    # where nothing has a gradient, none of the selected experts of the first trained layer got a token
    places = [place for place in floating if leaves[place].requires_grad] or floating[:1]
    if not missed or not places:
        return output
    parts, targets = zip(*missed, strict=True)
    given = ZeroGradients.apply(parts, len(places), *[leaves[place] for place in places], *targets)
    for place, leaf in zip(places, given, strict=True):
        leaves[place] = leaf
    return tree_unflatten(leaves, form)


def _view(
    alias: Tensor, selected: Selected, reads: Reads, transposed: bool = False, ids: Tensor | None = None
) -> SliceWeight:
    view = alias.as_subclass(SliceWeight)
    view.selected, view.reads, view.transposed, view.ids = selected, reads, transposed, ids
    return view


# What is known runs with SliceWeight's own functions off, and says NotImplemented to what it isn't made for.


def _index(function: Callable, weight: SliceWeight, key: Any) -> Any:
    """`weight[expert]`, frozen where nothing of it is trained, or `weight[ids]`."""
    if weight.ndim != 3 or weight.transposed or weight.ids is not None:
        return NotImplemented
    if isinstance(key, Tensor) and key.dtype in (torch.int32, torch.int64):
        if key.ndim == 1:
            return _view(function(weight, key), weight.selected, weight.reads, ids=key % len(weight))
        key = int(key) if key.ndim == 0 else key
    if type(key) is not int or not -len(weight) <= key < len(weight):
        return NotImplemented
    expert = key % len(weight)
    inside = [(replace(part, index=part.index[1:]), to) for part, to in weight.selected if part.index[0] == expert]
    matrix = weight.detach()[expert]
    return slice_weight(matrix, tuple(inside), weight.reads) if inside else matrix


def _transpose(function: Callable, weight: SliceWeight, dim0: int, dim1: int) -> Any:
    if {dim0 % weight.ndim, dim1 % weight.ndim} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    return _turned(function(weight, dim0, dim1), weight)


def _matrix_transpose(function: Callable, weight: SliceWeight, *args: Any) -> Any:
    """`weight.mT`, and `weight.T` of a matrix."""
    return _turned(weight.mT, weight) if function == Tensor.mT.__get__ or weight.ndim == 2 else NotImplemented


def _turned(alias: Tensor, weight: SliceWeight) -> SliceWeight:
    return _view(alias, weight.selected, weight.reads, not weight.transposed, weight.ids)


def _linear(function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, SliceWeight) or weight.ndim != 2 or isinstance(x, SliceWeight):
        return NotImplemented
    output = function(x, weight.detach(), bias)
    return _with_gradients(output, x, weight, Product(not weight.transposed), lambda expert: ALL_ROWS)


def _matmul(function: Callable, *pair: Tensor, **named: Any) -> Any:
    """x @ weight or weight @ x: of one expert's matrix, or matrix by matrix."""
    left, *others = pair
    if named or len(others) != 1 or isinstance(left, SliceWeight) == isinstance(others[0], SliceWeight):
        return NotImplemented
    on_left = isinstance(left, SliceWeight)
    weight, x = (left, others[0]) if on_left else (others[0], left)
    if x.ndim < 2 or (weight.ndim == 3 and (x.ndim != 3 or len(x) != len(weight))):
        return NotImplemented
    count = x.shape[-1] if on_left else x.shape[-2]
    if weight.ids is not None and count != 1:
        return NotImplemented

    def rows(expert: int | None) -> Rows:
        if expert is None:
            return ALL_ROWS
        if weight.ids is not None:
            return (weight.ids == expert).nonzero()[:, 0]
        return slice(expert * count, (expert + 1) * count)

    frozen = weight.detach()
    output = function(frozen, x) if on_left else function(x, frozen)
    return _with_gradients(output, x, weight, Product(weight.transposed != on_left, columns=on_left), rows)


def _grouped(
    function: Callable, x: Tensor, weight: Tensor, *args: Any, offs: Tensor | None = None, **named: Any
) -> Any:
    """A product of groups of rows of x (n, .), each with the matrix of one expert; they end at `offs` (experts,)."""
    more = [*args, *(value for value in named.values() if value is not None)]
    if more or offs is None or isinstance(x, SliceWeight) or not isinstance(weight, SliceWeight):
        return NotImplemented
    if (x.ndim, weight.ndim) != (2, 3) or weight.ids is not None:
        return NotImplemented
    ends = [0, *weight.reads.ends(offs)]
    output = grouped_mm(function, x, weight.detach(), offs)
    return _with_gradients(
        output, x, weight, Product(weight.transposed), lambda expert: slice(ends[expert], ends[expert + 1])
    )


def _with_gradients(
    output: Tensor, x: Tensor, weight: SliceWeight, product: Product, rows: Callable[[int | None], Rows]
) -> Tensor:
    parts, targets = zip(*weight.selected, strict=True)
    weight.reads.got.update(id(part.layer) for part in parts)
    chosen = {expert: rows(expert) for expert in dict.fromkeys(part.expert for part in parts)}
    return with_slice_gradients(output, x, product, parts, targets, chosen)


KNOWN: dict[Any, Callable] = {
    Tensor.__getitem__: _index,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _matrix_transpose,
    Tensor.T.__get__: _matrix_transpose,
    torch.nn.functional.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _matmul),
    FALLBACK: _grouped,
}
for owner, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm")):
    # of torch before 2.10, and since
    if hasattr(owner, name):
        KNOWN[getattr(owner, name)] = _grouped
