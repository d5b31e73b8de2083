"""PEFT's own conversion to LoRA gives what our export gives, and refuses what it has no form for."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.loops import logits, train
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.export.lora import changes_of, write_lora

pytestmark = pytest.mark.skipif(not hasattr(peft, "save_as_lora"), reason="this PEFT converts nothing to LoRA")


def tuned(kind: str = "llama", **config) -> PeftModel:
    settings = {"k": 3, "include": ["mlp"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(tiny_model(kind), KappaTuneConfig(**settings))
    train(model)
    return model


def deltas(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    owners = {name.removesuffix(".lora_A.weight") for name in values if "lora_A" in name}
    return {owner: values[f"{owner}.lora_B.weight"] @ values[f"{owner}.lora_A.weight"] for owner in owners}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_saves_what_our_export_saves(kind, tmp_path):
    model = tuned(kind)
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path / "theirs", model, rank=4)
    write_lora(tuned(kind), tmp_path / "ours", rank=4)
    theirs, ours = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("theirs", "ours"))
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in ours.items()}
    expected = deltas(ours)
    for name, change in deltas(theirs).items():
        torch.testing.assert_close(change, expected[name], rtol=0, atol=1e-6)


def test_of_full_rank_it_computes_what_was_trained(tmp_path):
    model = tuned()
    peft.save_as_lora(tmp_path / "lora", model, rank=1.0)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert type(loaded.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_a_share_gives_each_matrix_its_own_rank():
    model = tuned()
    config, values = peft.convert_to_lora(model, rank=0.8)
    changes = changes_of(model)
    assert len(changes) == 3 and set(config.rank_pattern) == {name.removesuffix(".weight") for name in changes}
    for name, change in changes.items():
        energy = torch.linalg.svdvals(change).square()
        wanted = next(rank for rank in range(1, 33) if energy[:rank].sum() >= 0.8 * energy.sum())
        assert config.rank_pattern[name.removesuffix(".weight")] == wanted
        assert values[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"].shape[0] == wanted


def test_what_it_cannot_convert_is_said(tmp_path):
    experts = tuned("olmoe")
    assert not experts.supports_lora_conversion()
    with pytest.raises(KappaTuneError, match=r"no whole linear layers, such as .*experts.*kappatune export ADAPTER"):
        peft.save_as_lora(tmp_path / "lora", experts, rank=4)
    for rank in (0, 33, 1.5):
        with pytest.raises(KappaTuneError, match=f"rank is {rank}, expected a whole number from 1 to 32"):
            peft.convert_to_lora(tuned(), rank=rank)
    with pytest.raises(KappaTuneError, match="Adapter 'other' isn't active"):
        peft.convert_to_lora(tuned(), rank=4, adapter_name="other")
    with pytest.raises(KappaTuneError, match="expected a PeftModel"):
        peft.convert_to_lora(tuned().base_model.model, rank=4)


def test_other_adapters_are_converted_as_before():
    other = get_peft_model(tiny_model("llama"), peft.LoHaConfig(target_modules=["q_proj"], init_weights=False))
    config, values = peft.convert_to_lora(other, rank=2)
    assert config.r == 2 and len(values) == 4
