"""Forwards that others set on a model's modules, before or after it is attached, and calls that PEFT has for LoRA."""

import types
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from helpers.reference import random_batches
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError


def _hooked(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if name:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def _dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def _patched(model: nn.Module) -> nn.Module:
    """As kernels do that replace a layer's forward on the instance."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias), module)
    return model


def _fused(model: nn.Module) -> nn.Module:
    """As Liger does to an MLP, with a forward that reads the weights of its layers itself."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = (nn.functional.linear(x, layer.weight) for layer in (self.gate_proj, self.up_proj))
        return nn.functional.linear(self.act_fn(gate) * up, self.down_proj.weight)

    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.forward = types.MethodType(forward, module)
    return model


def _attached(model: nn.Module) -> PeftModel:
    return get_peft_model(model, KappaTuneConfig(k="100%"))


def _check_gradients(tuned: PeftModel) -> None:
    """Each unit's gradient is the one that the model has without hooks and without adapters."""
    tokens = random_batches(1)[0][0]
    reference = tiny_model("llama")
    reference(input_ids=tokens, labels=tokens).loss.backward()
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    for layer in tuned.base_model.layers():
        wanted = reference.get_parameter(layer.unit.parameter).grad
        assert wanted.any()
        torch.testing.assert_close(layer.active.weight.grad, wanted)


@pytest.mark.parametrize("change", [_hooked, _dispatched, _patched, _fused])
def test_forwards_that_others_set_before(change: Callable[[nn.Module], nn.Module]):
    _check_gradients(_attached(change(tiny_model("llama"))))


@pytest.mark.parametrize("change", [_hooked, _patched])
def test_forwards_that_others_set_after(change: Callable[[nn.Module], nn.Module]):
    tuned = _attached(tiny_model("llama"))
    change(tuned.base_model.model)
    _check_gradients(tuned)


def test_hooks_that_are_removed_again():
    tuned = _attached(_hooked(tiny_model("llama")))
    remove_hook_from_module(tuned, recurse=True)
    _check_gradients(tuned)


def test_what_accelerate_offloads_is_refused():
    with pytest.raises(KappaTuneError, match="offloaded by accelerate"):
        _attached(cpu_offload(tiny_model("llama"), execution_device="cpu"))
    tuned, tokens = _attached(tiny_model("llama")), random_batches(1)[0][0]
    cpu_offload(tuned, execution_device="cpu")
    with pytest.raises(KappaTuneError, match="offloaded by accelerate"):
        tuned(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("name", ["default", "__base__"])
def test_a_batch_of_several_adapters_is_refused(name: str):
    tuned, tokens = _attached(tiny_model("llama")).eval(), random_batches(1)[0][0]
    for call in (tuned, tuned.generate):
        with pytest.raises(KappaTuneError, match=r"adapter_names=.*set_adapter\(name\)"):
            call(input_ids=tokens, adapter_names=[name] * len(tokens))
