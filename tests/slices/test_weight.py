"""However a forward reads a fused weight, the selected slices get the gradients that a whole leaf would have there."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kappatune_plugin.slices.alias import Part, SliceAlias
from kappatune_plugin.slices.weight import Reads, slice_weight, with_zero_gradients

EXPERTS, ROWS, COLUMNS, VECTORS = 4, 8, 12, 6
EVERYTHING = slice(None)
# gate's half and up's of one expert, all of another, every second column of a third; expert 2 is frozen
INDICES = [
    (0, slice(0, 4), EVERYTHING),
    (0, slice(4, 8), EVERYTHING),
    (1, EVERYTHING, EVERYTHING),
    (3, EVERYTHING, slice(1, None, 2)),
]
IDS = torch.tensor([3, 0, 0, 2, 1, 3])
# expert 1 has no row
ENDS = torch.tensor([2, 2, 3, 6], dtype=torch.int32)


class Doubled(torch.autograd.Function):
    """A kernel of somebody's that is given the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        whole = torch.zeros_like(weight)
        whole[0] = 2 * x.mT @ gradient
        return 2 * gradient @ weight[0].mT, whole


def by_rows(x: Tensor, count: int) -> Tensor:
    """x (6, .) with `count` experts before it."""
    return x.expand(count, *x.shape) * torch.arange(1, count + 1, dtype=x.dtype)[:, None, None]


# x (6, 8) or, for those of `WIDE`, (6, 12)
KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ w[e]": lambda x, w: x @ w[0],
    "torch.matmul, a frozen expert": lambda x, w: torch.matmul(x, w[0]) + x.matmul(w[2]),
    "w[tensor]": lambda x, w: torch.mm(x, w[torch.tensor(3)]),
    "w[-1]": lambda x, w: x.mm(w[-1]),
    "a vector for each of two axes": lambda x, w: x.reshape(2, 3, 8) @ w[1],
    "linear of a transpose": lambda x, w: functional.linear(x, w[0].T),
    "w[e].mT @ x": lambda x, w: w[0].mT @ x.mT,
    "two experts": lambda x, w: (x @ w[0]) * (x @ w[1]),
    "one expert twice": lambda x, w: (x @ w[0]) * (2 * x @ w[0]),
    "bmm": lambda x, w: torch.bmm(by_rows(x, EXPERTS), w),
    "matmul of stacks": lambda x, w: by_rows(x, EXPERTS) @ w,
    "the transpose times x": lambda x, w: torch.matmul(w.transpose(-2, -1), by_rows(x, EXPERTS).mT),
    "gathered": lambda x, w: torch.bmm(x.unsqueeze(1), w[IDS]).squeeze(1),
    "gathered, counted from the end": lambda x, w: torch.bmm(x.unsqueeze(1), w[IDS - EXPERTS]).squeeze(1),
}
WIDE_KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: functional.linear(x, w[0]),
    "linear with a bias, changed in place": lambda x, w: (
        functional.linear(x, w[3], torch.ones(8).to(x)).add_(1).mul_(2)
    ),
    "linear of three axes": lambda x, w: functional.linear(x.reshape(2, 3, 12), weight=w[1]),
    "gathered times x": lambda x, w: torch.bmm(w[IDS.int()], x.unsqueeze(-1)).squeeze(-1),
    "matmul of a transposed stack": lambda x, w: by_rows(x, EXPERTS) @ w.mT,
}
UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w: torch.einsum("np,epq->enq", x, w),
    "broadcast": lambda x, w: x @ w,
    "permute": lambda x, w: x @ w.permute(1, 2, 0).reshape(ROWS, -1),
    "some experts": lambda x, w: by_rows(x, 2) @ w[1:3],
    "a list": lambda x, w: by_rows(x, 2) @ w[[0, 3]],
    "a mask": lambda x, w: by_rows(x, 2) @ w[torch.tensor([True, False, False, True])],
    "ids of two axes": lambda x, w: x.reshape(2, 3, 1, 8) @ w[IDS.reshape(2, 3)],
    "a row of an expert": lambda x, w: x * w[0, :, 0],
    "unbind": lambda x, w: sum(x @ each for each in w.unbind(0)),
    "iteration": lambda x, w: sum(x @ each for each in w),
    "a sum with the weight": lambda x, w: x @ (w[0] + w[1] * 2),
    "one expert's norm": lambda x, w: x @ w[0] / w[0].norm(),
    "two gathered rows an expert": lambda x, w: torch.bmm(x.reshape(2, 3, 8), w[IDS[:2]]),
    "somebody's function": lambda x, w: Doubled.apply(x, w),
    "an expert, read in part": lambda x, w: x @ w[0][:, :3],
    "a vector": lambda x, w: x[0] @ w[0] + w[0].mT @ x[1],
    "the weight with itself": lambda x, w: x @ (w[0] @ w[1].mT),
}


def check(read: Callable[[Tensor, Tensor], Tensor], width: int = ROWS, dtype: torch.dtype = torch.float64) -> None:
    """Compare with the gradients of a leaf."""
    generator = torch.Generator().manual_seed(0)
    x, base = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((VECTORS, width), (EXPERTS, ROWS, COLUMNS))
    )
    leaf, wanted_x = base.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = read(wanted_x, leaf)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=dtype)
    wanted.backward(upstream)

    targets = [torch.zeros_like(base[index], dtype=torch.float32, requires_grad=True) for index in INDICES]
    layers = [SimpleNamespace(trained=target, reached=False) for target in targets]
    selected = tuple(
        (Part(layer, layer.trained, index), layer.trained) for layer, index in zip(layers, INDICES, strict=True)
    )
    found_x = x.clone().requires_grad_()
    weight = slice_weight(base, selected, Reads())
    found = with_zero_gradients(read(found_x, weight), [weight])
    assert type(found) is Tensor
    torch.testing.assert_close(found, wanted)
    found.backward(upstream)

    torch.testing.assert_close(found_x.grad, wanted_x.grad)
    for layer, target, index in zip(layers, targets, INDICES, strict=True):
        assert layer.reached and target.grad.dtype == torch.float32
        torch.testing.assert_close(target.grad, leaf.grad[index].float(), rtol=1e-5, atol=1e-5)


def without_alias_gradients() -> Any:
    """In it the gradient of a whole weight, or of an expert's, is an error."""

    def refuse(ctx: Any, gradient: Tensor) -> None:
        raise AssertionError(f"a gradient of shape {tuple(gradient.shape)} was made")

    return patch.object(SliceAlias, "backward", staticmethod(refuse))


@pytest.mark.parametrize("name", KNOWN)
def test_reads_that_are_known(name: str):
    with without_alias_gradients():
        check(KNOWN[name])


@pytest.mark.parametrize("name", WIDE_KNOWN)
def test_reads_of_the_transpose_that_are_known(name: str):
    with without_alias_gradients():
        check(WIDE_KNOWN[name], COLUMNS)


@pytest.mark.parametrize("name", UNKNOWN)
def test_whatever_else_is_done_gets_the_whole_gradient(name: str):
    with pytest.raises(AssertionError, match="was made"), without_alias_gradients():
        check(UNKNOWN[name])
    check(UNKNOWN[name])


def grouped_product(function: str) -> Callable[..., Tensor]:
    if function == "transformers":
        pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has no grouped experts")
        return torch.ops.transformers.grouped_mm_fallback
    if not hasattr(functional, "grouped_mm"):
        pytest.skip("this torch has it on GPUs only")
    return functional.grouped_mm if function == "functional" else torch._grouped_mm


@pytest.mark.parametrize("function", ["functional", "torch", "transformers"])
@pytest.mark.parametrize("width", [ROWS, COLUMNS])
def test_grouped_products(function: str, width: int):
    """Of w, and of the transpose."""
    product = grouped_product(function)
    with without_alias_gradients():
        check(lambda x, w: product(x, w if width == ROWS else w.transpose(-2, -1), offs=ENDS), width, torch.float32)


def test_a_grouped_product_of_gathered_experts():
    product = grouped_product("transformers")
    check(lambda x, w: product(x, w[torch.tensor([1, 0, 3, 2])], offs=ENDS), dtype=torch.float32)
