"""Backward ends at the earliest matrix that is trained."""

from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import Tensor

from helpers.reference import random_batches
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig

TOKENS = random_batches(1)[0][0]


def tuned(kind: str, include: str, checkpointing: dict[str, Any] | None) -> PeftModel:
    config = KappaTuneConfig(k=3, include=[include])
    return checkpointed(get_peft_model(tiny_model(kind, num_hidden_layers=4), config), checkpointing)


def checkpointed(model: PeftModel, checkpointing: dict[str, Any] | None) -> PeftModel:
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        # as TRL does for all that PEFT makes
        model.enable_input_require_grads()
    return model.train()


def run(model: PeftModel) -> tuple[list[bool], list[int], dict[str, Tensor]]:
    """Of each layer whether what it puts out requires a gradient, how often it ran, and the units' gradients."""
    needed, runs, handles = [], [0] * 4, []
    for place, layer in enumerate(model.get_decoder().layers):

        def count(module: Any, args: Any, place: int = place) -> None:
            runs[place] += 1

        handles += [
            layer.self_attn.register_forward_pre_hook(count),
            layer.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad)),
        ]
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for handle in handles:
        handle.remove()
    return needed[:4], runs, {layer.unit.name: layer.active.weight.grad for layer in model.base_model.layers()}


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
@pytest.mark.parametrize(("kind", "include"), [("llama", "*layers.2.*"), ("olmoe", "*layers.2.mlp.experts.*")])
def test_at_the_earliest_selected_layer(kind: str, include: str, checkpointing: dict[str, Any] | None):
    needed, runs, gradients = run(tuned(kind, include, checkpointing))
    assert needed == [False, False, True, True]
    # checkpointing runs again what backward goes through
    assert runs == [1, 1, *([1, 1] if checkpointing is None else [2, 2])]
    assert gradients and all(each.any() for each in gradients.values())


def test_re_entrant_checkpointing_needs_gradients_from_the_start():
    needed, runs, gradients = run(tuned("llama", "*layers.2.*", {"use_reentrant": True}))
    assert runs == [2] * 4
    wanted = run(tuned("llama", "*layers.2.*", None))[2]
    assert gradients.keys() == wanted.keys()
    assert all(gradients[name].allclose(each, atol=1e-6) for name, each in wanted.items())


def test_an_embedding_that_is_trained_gets_its_gradient():
    config = KappaTuneConfig(k=1, include=["*embed_tokens*"], exclude=["norm"])
    model = checkpointed(get_peft_model(tiny_model("llama", num_hidden_layers=4), config), {"use_reentrant": False})
    (gradient,) = run(model)[2].values()
    assert gradient.any()


def test_nothing_is_left_on_the_embeddings():
    model = tuned("llama", "*layers.2.*", {"use_reentrant": False})
    before = len(model.get_input_embeddings()._forward_hooks)
    run(model)
    assert len(model.get_input_embeddings()._forward_hooks) == before > 0
