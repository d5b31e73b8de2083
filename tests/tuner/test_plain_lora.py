"""PEFT's LoRA on the selected matrices: those and no others, and an adapter that PEFT alone loads."""

import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.loops import logits, train
from helpers.quantize import needs_bitsandbytes, quantize
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError, lora_config, scan, select
from kappatune_plugin.tuner.plain_lora import peft_config_for
from kappatune_plugin.weights.quantized import keep_unpacked
from kappatune_plugin.weights.units import find_units

ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
found = model(input_ids=torch.arange(8)[None]).logits
torch.testing.assert_close(found, torch.load(sys.argv[1] + "/logits.pt"), rtol=0, atol=1e-6)
assert "kappatune_plugin" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2"])
def test_only_the_selected_have_pairs_and_the_merged_model_computes_the_same(kind, tmp_path):
    model = tiny_model(kind)
    include = ["*attn.*"]
    expected = select(scan(model, include=include), k=3)
    settings = lora_config(
        model, KappaTuneConfig(k=3, include=include, task_type="CAUSAL_LM", adapter="lora", r=2, lora_alpha=4)
    )
    tuned = get_peft_model(model, settings)
    names = {name.split(".lora_")[0] for name, value in tuned.named_parameters() if value.requires_grad}
    assert names == {f"base_model.model.{row.name.removesuffix('.weight')}" for row in expected.units}
    assert sum(each.numel() for each in tuned.parameters() if each.requires_grad) == sum(
        2 * sum(row.shape) for row in expected.units
    )
    before = logits(tuned)
    train(tuned)
    trained = logits(tuned)
    assert not torch.allclose(before, trained, atol=1e-3)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_adapter_loads_where_this_package_is_not_imported(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, lora_config(model, KappaTuneConfig(k=2, task_type="CAUSAL_LM", adapter="lora", r=2)))
    train(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save(tuned.eval()(input_ids=torch.arange(8)[None]).logits, tmp_path / "logits.pt")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)


def test_more_names_than_peft_keeps_apart_are_still_those_selected(tmp_path):
    # from 20 names on PEFT looks for shorter ones that mean the same modules
    model = tiny_model("llama", num_hidden_layers=6)
    expected = select(scan(model), k=25)
    tuned = get_peft_model(model, lora_config(model, KappaTuneConfig(selection=expected, adapter="lora", r=2)))
    tuned.save_pretrained(tmp_path)
    for each in (tuned, PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=6), tmp_path)):
        names = {name.split(".lora_")[0] for name, _ in each.named_parameters() if ".lora_" in name}
        assert names == {f"base_model.model.{row.name.removesuffix('.weight')}" for row in expected.units}


def test_experts_left_out_as_the_page_says():
    model = tiny_model("mixtral")
    exclude = ["norm", "bias", "embedding", "head", "router", "*.experts.*"]
    settings = lora_config(model, KappaTuneConfig(k=4, exclude=exclude, adapter="lora", r=2))
    assert len(settings.target_modules) == 4 and not any(".experts" in name for name in settings.target_modules)


def test_alpha_rank_and_rslora_mean_what_they_mean_in_peft():
    model = tiny_model("llama")
    selection = select(scan(model), k=1)
    for rslora, expected in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        pairs = {"adapter": "lora", "r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": rslora}
        tuned = get_peft_model(model, lora_config(model, KappaTuneConfig(selection=selection, **pairs)))
        (layer,) = [each for each in tuned.modules() if hasattr(each, "lora_A") and "default" in each.lora_A]
        assert layer.scaling["default"] == expected and layer.lora_dropout["default"].p == 0.25
        model = tuned.unload()


def test_a_module_whose_name_only_ends_like_a_selected_one_has_no_pair():
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(6, 6), "side": nn.ModuleDict({"up": nn.Linear(6, 6)})})
    config = KappaTuneConfig(selection=select(scan(model, include=["up.weight"]), k=1), adapter="lora", r=2)
    tuned = get_peft_model(model, lora_config(model, config))
    names = {name.split(".lora_")[0] for name, value in tuned.named_parameters() if value.requires_grad}
    assert names == {"base_model.model.up"}


@pytest.mark.parametrize(
    ("kind", "config", "r", "message"),
    [
        ("llama", {"k": 2}, 33, "r is 33, expected 1 to"),
        ("llama", {"k": 2}, 0, "r: 0 is not a number from 1 on"),
        (
            "mixtral",
            {"k": 2, "include": ["*.experts.*"]},
            2,
            "slice of a fused parameter.*exclude.*get_peft_model",
        ),
        ("llama", {"k": 0, "modules_to_save": ["lm_head"]}, 2, "k: 0 selects no matrix"),
        ("llama", {"k": 1, "include": ["embedding"], "exclude": []}, 2, "no weight of a whole linear layer"),
    ],
)
def test_what_it_refuses(kind, config, r, message):
    with pytest.raises(KappaTuneError, match=message):
        lora_config(tiny_model(kind), KappaTuneConfig(adapter="lora", r=r, **config))


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("kind", "form", "include"),
    [
        ("llama", "nf4", None),
        ("llama", "int8", None),
        ("olmoe", "int8", ["*.experts.*"]),
        ("olmoe", "int8", ["*attn*"]),
    ],
)
def test_on_a_quantized_base_the_rest_stays_as_it_is_to_the_bit(kind, form, include, tmp_path):
    model = quantize(tiny_model(kind, dtype=torch.float32), form)
    config = KappaTuneConfig(k=3, include=include, adapter="lora", r=2, task_type="CAUSAL_LM")
    settings = peft_config_for(model, config)
    assert (settings.peft_type.value == "LORA") == (include != ["*.experts.*"])
    chosen = {unit.parameter for unit in find_units(model, quantized=True)}
    tuned = get_peft_model(model, settings)
    before = {name: value.clone() for name, value in tuned.named_parameters() if not value.requires_grad}
    at_first = logits(tuned)
    train(tuned)
    found = logits(tuned)
    assert not torch.allclose(found, at_first, atol=1e-4) and len(chosen) > 3
    fused = () if include != ["*.experts.*"] else ("experts.gate_up_proj", "experts.down_proj")
    after = {name: value for name, value in tuned.named_parameters() if name in before}
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(name.endswith(fused) for name in moved) if fused else not moved
    tuned.save_pretrained(tmp_path)
    base = quantize(tiny_model(kind, dtype=torch.float32), form)
    keep_unpacked(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(again), found, rtol=0, atol=1e-5)
