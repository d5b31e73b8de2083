"""Quantized weights: ranked as what they stand for, or by the weights they were made of; the selected are trained."""

import json
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from helpers.quantize import needs_bitsandbytes, quantize
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.recipe.load_model import model_init_kwargs
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.selection import select
from kappatune_plugin.weights.quantized import dequantized, whole_model
from kappatune_plugin.weights.units import find_units


def model() -> nn.Module:
    return tiny_model("llama", hidden_size=64, intermediate_size=96)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_weights_are_ranked_as_what_they_stand_for(kind):
    original, coarse = model(), quantize(model(), kind)
    report, expected = scan(coarse, progress=False), scan(original, progress=False)
    assert [(row.name, row.shape) for row in report.units] == [(row.name, row.shape) for row in expected.units]
    assert report.dtype == f"{kind}, dequantized"
    layer = coarse.model.layers[0].mlp.up_proj
    # what the layer multiplies with: the identity in, the weight out
    with torch.no_grad():
        weight = layer(torch.eye(64)).mT
    row = next(row for row in report.units if row.name == "model.layers.0.mlp.up_proj.weight")
    tolerance = 0.02 if kind == "int8" else 1e-3
    assert row.kappa == pytest.approx(condition_number(weight.float()).value, rel=tolerance)
    for one, other in zip(report.units, expected.units, strict=True):
        # the smallest singular value of a square matrix is at the mercy of the rounding
        assert one.kappa != other.kappa and (one.kappa == pytest.approx(other.kappa, rel=0.3) or len({*one.shape}) == 1)
    assert report.base["hash"] != expected.base["hash"]


@needs_bitsandbytes
def test_int8_is_row_scaled_and_the_same_before_and_after_it_ran():
    coarse = quantize(model(), "int8")
    layer, weight = coarse.model.layers[1].mlp.down_proj, model().model.layers[1].mlp.down_proj.weight
    before = dequantized(layer, "weight")
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    assert before.shape == (64, 96) and (before - weight).abs().max() <= 0.51 * scale.max()
    assert torch.allclose(before, (weight / scale).round() * scale, atol=scale.max().item() * 1.01)
    first = scan(coarse, progress=False)
    coarse(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(dequantized(layer, "weight"), before) and scan(coarse, progress=False, cache=False) == first


@needs_bitsandbytes
def test_scan_from_ranks_by_the_unquantized_weights(tmp_path):
    original, coarse = model(), quantize(model(), "nf4")
    original.save_pretrained(tmp_path / "whole")
    report = scan(coarse, progress=False, scan_from=tmp_path / "whole")
    assert report.units == scan(original, progress=False).units and report.dtype == "float32 of whole"
    assert report.base == scan(coarse, progress=False).base
    partial = scan(coarse, progress=False, scan_from=tmp_path / "whole", k=3)
    assert select(partial, k=3).units == select(report, k=3).units
    other = tiny_model("llama", hidden_size=64, intermediate_size=80)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(KappaTuneError, match="'other' lacks 6 of the 16 .* such as model.layers.0.mlp.gate_proj"):
        scan(coarse, progress=False, scan_from=tmp_path / "other")


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each linear layer multiplies with, by its name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = type(module.weight).__name__
            weight = dequantized(module, "weight") if kind in ("Params4bit", "Int8Params") else module.weight
            found[name] = weight.detach().float().clone()
    return found


def owner(unit_name: str) -> str:
    return unit_name.removesuffix(".weight")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_selected_are_trained_as_what_they_stand_for(kind):
    coarse = quantize(model(), kind)
    before = numbers(coarse)
    tuned = get_peft_model(coarse, KappaTuneConfig(k=3))
    selected = {owner(unit.name) for unit in tuned.base_model.selections["default"].units}
    tokens = torch.tensor([[1, 2, 3, 4]])
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.01)
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    # the names of what is trained have the model inside PEFT's two wrappers
    assert {name for name, each in numbers(coarse).items() if not torch.equal(each, before[name])} == selected
    kinds = {name: type(coarse.get_submodule(name).weight).__name__ for name in before if name != "lm_head"}
    assert {name for name, each in kinds.items() if each == "Parameter"} == selected
    with tuned.disable_adapter():
        assert all(torch.equal(each, before[name]) for name, each in numbers(coarse).items())


@needs_bitsandbytes
def test_half_precision_goes_through_a_layer_that_was_quantized():
    tuned = get_peft_model(quantize(model(), "int8").to(torch.float16), KappaTuneConfig(k=2))
    name = tuned.base_model.selections["default"].units[0].name
    layer = tuned.base_model.model.get_submodule(owner(name))
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(1, layer.in_features, dtype=torch.float16)).dtype == torch.float16


@needs_bitsandbytes
def test_what_a_layer_packed_to_run_is_unpacked():
    """CPUs with AVX512 run 4 bit weights without gradients in another layout, and with scales in bfloat16."""
    wide = quantize(tiny_model("llama", hidden_size=64, intermediate_size=128), "nf4").eval()
    before = numbers(wide)
    with torch.no_grad():
        first = wide(input_ids=torch.tensor([[1, 2, 3]])).logits
        for name, each in numbers(wide).items():
            torch.testing.assert_close(each, before[name], rtol=2**-8, atol=0)
        assert torch.equal(wide(input_ids=torch.tensor([[1, 2, 3]])).logits, first)


@needs_bitsandbytes
def test_measuring_before_training_takes_no_gradient_away():
    """The layout without gradients would stay when training begins."""
    tokens = torch.tensor([[1, 2, 3, 4]])
    gradients = []
    for measured in (False, True):
        coarse = quantize(tiny_model("llama", hidden_size=64, intermediate_size=128), "nf4")
        tuned = get_peft_model(coarse, KappaTuneConfig(k=3, include=["*layers.0.*"]))
        if measured:
            with torch.no_grad():
                tuned.eval()(input_ids=tokens)
        tuned.train()(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([each.grad for each in tuned.parameters() if each.requires_grad])
    assert len(gradients[0]) == 3
    for never, before in zip(*gradients, strict=True):
        assert never.abs().max() > 0 and torch.equal(never, before)


@needs_bitsandbytes
def test_from_a_trainer_to_a_plain_checkpoint(tmp_path):
    """A base that is quantized when it is loaded. TRL casts all that is trained on such a base to bfloat16."""
    base, out = tmp_path / "base", tmp_path / "out"
    lengths = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    tiny_model("olmoe", torch.bfloat16, **lengths).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)

    args = {"max_steps": 2, "learning_rate": 0.01, "bf16": False, "use_cpu": True, "report_to": "none"}
    trainer = SFTTrainer(
        model=load(),
        args=SFTConfig(str(out), save_strategy="no", disable_tqdm=True, **args),
        train_dataset=Dataset.from_dict({"text": ["the cat sat on the mat"] * 16}),
        processing_class=tiny_tokenizer(),
        peft_config=KappaTuneConfig(k=6, include=["attention"]),
    )
    # TRL 0.24 takes what is on a CPU for divided over ranks, where it asks for the model's dtype
    expected = torch.bfloat16 if version("trl").startswith("0.24") else torch.float32
    assert {each.dtype for each in trainer.model.parameters() if each.requires_grad} == {expected}
    trainer.train()
    trainer.save_model(str(out))
    selected = {owner(unit.name) for unit in trainer.model.base_model.selections["default"].units}
    trained, before = numbers(trainer.model.get_base_model()), numbers(load())
    assert {name for name, each in trained.items() if not torch.equal(each, before[name])} == selected
    again = numbers(PeftModel.from_pretrained(load(), out).get_base_model())
    assert all(torch.equal(each, trained[name]) for name, each in again.items())
    merge_adapter(out, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert all(torch.equal(each, trained[name]) for name, each in numbers(merged).items())
    assert merged.dtype == torch.bfloat16 and not hasattr(merged.config, "quantization_config")
    with pytest.raises(KappaTuneError, match="quantized in training, and this model isn't.*kappatune merge"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)


@needs_bitsandbytes
def test_a_base_that_was_saved_quantized(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    wide = tiny_model("llama", hidden_size=64, intermediate_size=128, vocab_size=300)
    wide.save_pretrained(tmp_path / "wide")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=settings).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), KappaTuneConfig(k=4))
    with torch.no_grad():
        for layer in tuned.base_model.layers():
            layer.active.weight.add_(0.5)
    tuned.base_model.write_through()
    tuned.save_pretrained(out)
    merge_adapter(out, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = numbers(tuned.get_base_model())
    assert all(torch.equal(each, expected[name]) for name, each in numbers(merged).items())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_model_that_is_not_quantized_is_whole_already():
    plain = model()
    assert whole_model(plain) is plain


@needs_bitsandbytes
def test_other_quantized_layers_are_not_trained():
    coarse = model()
    layer = coarse.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter((8 * layer.weight.data).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.ones(1, 1), requires_grad=False)
    with pytest.raises(KappaTuneError, match="model.layers.0.mlp.up_proj is a quantized Linear: .* Exclude it"):
        get_peft_model(coarse, KappaTuneConfig(k=1, include=["model.layers.0.mlp.up_proj.weight"]))
    assert get_peft_model(coarse, KappaTuneConfig(k=1, include=["*q_proj*"]))


@needs_bitsandbytes
def test_a_recipe_asks_for_it_as_in_trl(tmp_path):
    lines = {"model_name_or_path": "x", "output_dir": str(tmp_path), "dataset_name": "y", "kappatune": {"k": 3}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**lines, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_cpu": True}))
    settings = model_init_kwargs(load_recipe(path))["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "fp4"
    path.write_text(json.dumps({**lines, "use_cpu": True}))
    assert "quantization_config" not in model_init_kwargs(load_recipe(path))


def test_float8_layers_in_memory():
    plain = nn.ModuleList([nn.Linear(40, 24, bias=False)])
    scales = torch.rand(2, 3) + 0.5
    coarse = nn.ModuleList([nn.Linear(40, 24, bias=False)])
    layer = coarse[0]
    layer.weight = nn.Parameter((8 * plain[0].weight.data).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    layer.block_size = (16, 16)
    plain[0].weight.data = layer.weight.float() * scales.repeat_interleave(16, 0)[:24].repeat_interleave(16, 1)[:, :40]
    report = scan(coarse, progress=False)
    assert report.units == scan(plain, progress=False).units and report.dtype == "float8_e4m3fn, dequantized"
    with pytest.raises(KappaTuneError, match="float8_e4m3fn"):
        find_units(coarse)
    layer.weight_scale_inv = None
    with pytest.raises(KappaTuneError, match="without scales.*weight_scale_inv or weight_scale.*scan_from"):
        scan(coarse, progress=False)


def test_config_takes_scan_from(saved_olmoe):
    base = tiny_model("olmoe", vocab_size=300)
    tuned = get_peft_model(base, KappaTuneConfig(k=3, scan_from=str(saved_olmoe)))
    report = tuned.base_model.reports["default"]
    assert report.dtype.startswith("float32 of ") and len(tuned.base_model.selections["default"].units) == 3
    assert tuned.peft_config["default"].to_dict()["scan_from"] is None
    with pytest.raises(KappaTuneError, match="report and scan_from are both given"):
        KappaTuneConfig(report="a.json", scan_from="b")
    with pytest.raises(KappaTuneError, match="scan_from: 3"):
        KappaTuneConfig(scan_from=3)


def test_tensor_classes_of_other_libraries_are_refused():
    """torchao's and quanto's look like bfloat16; torch has one of the same kind for its own tests."""
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()), requires_grad=False)
    for use in (lambda: scan(model, progress=False), lambda: get_peft_model(model, KappaTuneConfig(k=2))):
        with pytest.raises(KappaTuneError, match=r"layers.0.mlp.up_proj.weight is stored as TwoTensor"):
            use()
