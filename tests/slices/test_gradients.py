"""The gradients of selected slices are those that the whole fused gradient has, and the latter is never made."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.reference import random_batches
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.slices import bind

KINDS = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss")
FORWARDS = ("eager", "batched_mm", "grouped_mm")
TOKENS = random_batches(1)[0][0]


def tuned(kind: str, forward: str, dtype: torch.dtype = torch.float32, k: Any = "40%", **overrides: Any) -> PeftModel:
    model = tiny_model(kind, dtype, **overrides)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(forward)
    elif forward != "eager":
        pytest.skip("transformers 4 knows eager experts only")
    return get_peft_model(model, KappaTuneConfig(k=k, order="random", seed=1, include=["*.experts.*"])).train()


def whole_gradients() -> AbstractContextManager:
    """Fused weights are what others are: aliases that get the whole gradient."""
    return patch.object(bind, "_is_fused", lambda *args: False)


def gradients(model: PeftModel, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {layer.unit.name: layer.active.weight.grad for layer in model.base_model.layers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_are_those_of_the_whole_gradient(kind: str, forward: str, dtype: torch.dtype):
    model = tuned(kind, forward, dtype)
    with whole_gradients():
        wanted = gradients(model)
    found = gradients(model)
    assert any(each.any() for each in wanted.values())
    for name, each in wanted.items():
        assert found[name].dtype == each.dtype == torch.float32 and found[name].is_contiguous()
        scale = float(each.abs().max())
        torch.testing.assert_close(found[name], each, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 2e-2))


class Allocations(TorchDispatchMode):
    """The size of the largest tensor that was made; views of others weren't."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        made = [each.numel() for each in tensors(output) if each.untyped_storage().data_ptr() not in given]
        self.largest = max(self.largest, *made, 0)
        return output


def tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_fused_size_is_made_in_backward(kind: str, forward: str):
    model = tuned(kind, forward, k=5)
    fused = min(layer.parameter.numel() for layer in model.base_model.layers())

    def largest() -> int:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        with Allocations() as made:
            loss.backward()
        return made.largest

    with whole_gradients():
        assert largest() >= fused
    assert largest() < fused


@pytest.mark.parametrize("forward", FORWARDS)
def test_experts_without_a_token_get_zeros(forward: str):
    """DDP waits for the gradient of each parameter."""
    model = tuned("olmoe", forward, k="100%")
    # of 8 experts a token goes to 2
    found = gradients(model, TOKENS[:1, :2])
    assert all(layer.reached for layer in model.base_model.layers())
    assert any(each.any() for each in found.values()) and not all(each.any() for each in found.values())


def test_a_layer_whose_selected_experts_got_no_token_gets_zeros():
    """Of the first trained layer too, where nothing else has a gradient."""
    model = tuned("olmoe", "eager", k="100%", num_experts_per_tok=1)
    tokens = TOKENS[:1, :2]
    found = gradients(model, tokens)
    idle = [name for name, each in found.items() if not each.any()]
    assert any(".layers.0." in name for name in idle) and len(idle) < len(found)
    model = tiny_model("olmoe", num_experts_per_tok=1)
    first = get_peft_model(model, KappaTuneConfig(k="100%", include=[name for name in idle if ".layers.0." in name]))
    loss = first.train()(input_ids=tokens, labels=tokens).loss
    loss.backward()
    layers = first.base_model.layers()
    assert layers and all(layer.reached and layer.active.weight.grad is not None for layer in layers)
    assert not any(layer.active.weight.grad.any() for layer in layers)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(forward: str, inside: bool):
    """With `backward` outside of it, as torch wants it, and inside."""
    model = tuned("qwen3_moe", forward)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return {layer.unit.name: layer.active.weight.grad for layer in model.base_model.layers()}

    with whole_gradients():
        wanted = run()
    for name, found in run().items():
        atol = 2e-2 * float(wanted[name].abs().max())
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize("forward", FORWARDS)
def test_backward_with_other_values_in_the_base_is_refused(forward: str):
    model = tuned("olmoe", forward)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    with model.disable_adapter(), pytest.raises(KappaTuneError, match="runs while the base holds other values"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    """They would be wrong: the rows that are kept have no graph."""
    model = tuned("olmoe", "grouped_mm")
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    weights = [layer.active.weight for layer in model.base_model.layers()]
    found = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(each.square().sum() for each in found).backward()
