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
from kappatune_plugin import KappaTuneConfig
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
