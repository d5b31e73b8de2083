"""Matrices that nothing would train: a run stops before its first step, and towers are left out from the start."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from helpers.reference import random_batches
from helpers.tiny import tiny_model
from helpers.tiny_configs import tiny_config
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.weights.patterns import filter_units
from kappatune_plugin.weights.units import find_units

FIRST_UNTRAINED = "model.layers.0.mlp.gate_proj.weight"


def _reads_past(model: PreTrainedModel) -> PreTrainedModel:
    """A layer's norm reads the weight of a projection, which lies neither in it nor right around it."""
    layer = model.model.layers[0]
    weight = layer.mlp.up_proj.weight
    layer.mlp.register_forward_hook(lambda module, inputs, output: inputs[0] @ weight.T @ weight)
    return model


def _all_of(model: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(model, KappaTuneConfig(k="100%", **settings))


def _step(tuned: PeftModel, tokens: Tensor, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
    stepper = optimizer([each for each in tuned.parameters() if each.requires_grad], lr=0.1)
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    stepper.step()


def test_a_weight_read_past_its_forward_stops_the_first_step():
    tuned, tokens = _all_of(_reads_past(tiny_model("llama"))), random_batches(1)[0][0]
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    with pytest.raises(KappaTuneError, match=rf"3 of 14 .* {FIRST_UNTRAINED}: its module ran.*exclude"):
        _step(tuned, tokens)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_what_the_error_says_to_exclude_is_enough():
    tuned = _all_of(_reads_past(tiny_model("llama")), exclude=["norm", "bias", "embedding", "head", "*layers.0.mlp*"])
    _step(tuned, random_batches(1)[0][0])
    assert all(layer.reached for layer in tuned.base_model.layers())


def test_an_optimizer_answers_for_what_it_holds_alone():
    tuned, tokens = _all_of(tiny_model("llama")), random_batches(1)[0][0]
    layers = tuned.base_model.layers()
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    layers[0].active.weight.grad, layers[0].reached = None, False
    torch.optim.SGD([layers[1].active.weight], lr=0.1).step()
    with pytest.raises(KappaTuneError, match=layers[0].unit.name):
        torch.optim.SGD([layers[0].active.weight, layers[2].active.weight], lr=0.1).step()


def test_a_closure_brings_its_gradients_itself():
    tuned, tokens = _all_of(tiny_model("llama")), random_batches(1)[0][0]
    masters = [layer.active.weight for layer in tuned.base_model.layers()]
    optimizer = torch.optim.LBFGS(masters, lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tuned(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(layer.reached for layer in tuned.base_model.layers())


def test_experts_without_tokens_are_let_through():
    tuned = _all_of(tiny_model("deepseek_v2", n_routed_experts=32))
    _step(tuned, random_batches(1)[0][0][:1, :3])


def test_a_trainer_stops_too(tmp_path):
    tokens = random_batches(1)[0][0]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    tuned = _all_of(_reads_past(tiny_model("llama")))
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    with pytest.raises(KappaTuneError, match="got no gradient before the first step"):
        Trainer(tuned, arguments, train_dataset=rows).train()


@pytest.fixture(scope="module")
def seeing() -> PreTrainedModel:
    """Gemma 3 with its vision tower."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("gemma3"), dtype=torch.float32)


def test_towers_are_left_out_unless_they_are_named(seeing: PreTrainedModel):
    units = find_units(seeing)
    kept, left_out = filter_units(units)
    assert {unit.name.split(".")[0] for unit in kept} == {"language_model"}
    towers = {name for name, reason in left_out.items() if "include: [tower]" in reason}
    assert {name.split(".")[0] for name in towers} == {"vision_tower", "multi_modal_projector"}
    for include in (["tower"], ["vision_tower.*", "*projector*"]):
        assert towers == {unit.name for unit in filter_units(units, include, [])[0]} | (
            {unit.name for unit in units if "embed" in unit.name and unit.name.startswith("vision")} & towers
        )
    assert not [unit for unit in filter_units(units, ["*"])[0] if unit.name in towers]


def test_a_tower_without_images_stops_the_first_step(seeing: PreTrainedModel):
    tokens = random_batches(1)[0][0]
    with pytest.raises(KappaTuneError, match=r"no module ran that reads its weight: a tower without inputs"):
        _step(_all_of(seeing, include=["*", "tower"]), tokens)


class _Heads(nn.Module):
    """Attention weights of three dimensions, which are no experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(count, 4, 6))


def test_three_dimensions_that_are_no_experts_are_left_out_unless_named():
    units = find_units(nn.ModuleDict({"attention": _Heads(2)}))
    assert [unit.name for unit in units] == ["attention.query.0", "attention.query.1"]
    kept, left_out = filter_units(units, [], [])
    assert not kept and all("include: [stack]" in reason for reason in left_out.values())
    assert filter_units(units, ["stack"], [])[0] == filter_units(units, ["attention.query.*"], [])[0] == units
