"""Every matrix of every architecture that can be made tiny is trained as full fine-tuning would, saved and merged."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers.architectures import Outcome, all_architectures, examine
from helpers.tiny_configs import tiny_config
from kappatune_plugin.slices import bind
from kappatune_plugin.weights.units import find_units

# weights that other modules read, experts of all forms, a head tied to an embedding, an encoder beside a decoder
SOME = [
    ("AutoModelForCausalLM", "falcon_h1"),
    ("AutoModelForCausalLM", "gpt_oss"),
    ("AutoModelForCausalLM", "qwen3_next"),
    ("AutoModelForMaskedLM", "xlm-roberta"),
    ("AutoModelForSeq2SeqLM", "bart"),
]


def _check(outcome: Outcome) -> None:
    assert not outcome.refused and not outcome.wrong
    assert outcome.trained + len(outcome.without_gradient) == outcome.matrices and outcome.trained > 0


@pytest.mark.parametrize(("auto", "model_type"), SOME)
def test_a_model_of_each_kind(auto: str, model_type: str):
    outcome = examine(auto, model_type)
    assert not outcome.not_built
    _check(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(("auto", "model_type"), all_architectures())
def test_every_architecture(auto: str, model_type: str):
    outcome = examine(auto, model_type)
    if outcome.not_built:
        pytest.skip(outcome.not_built)
    _check(outcome)


def test_the_sweep_sees_a_matrix_that_only_its_own_module_would_train(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bind, "_runs", lambda module: False)
    assert any("conv1d.weight: no gradient" in each for each in examine("AutoModelForCausalLM", "mamba").wrong)


def test_positions_that_a_formula_gives_are_no_matrices_to_train():
    model = AutoModelForSeq2SeqLM.from_config(tiny_config("marian"))
    units = {unit.parameter for unit in find_units(model)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    assert not units & frozen and len(units) == 33


def test_the_only_expert_of_a_layer_is_an_expert():
    config = tiny_config("hunyuan_v1_moe")
    assert config.num_experts == 1
    with torch.device("meta"):
        units = find_units(AutoModelForCausalLM.from_config(config))
    experts = [unit for unit in units if ".experts." in unit.name]
    assert len(experts) == 2 * 3 and not any(unit.groups for unit in experts)
