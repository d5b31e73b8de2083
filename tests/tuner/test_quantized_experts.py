"""Units inside experts in 4 bits: trained, saved, loaded and merged; the others stay as they are, bit for bit."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.quantize import needs_bitsandbytes
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.slices.alias import SliceAlias
from kappatune_plugin.weights.fused_experts import dequantize_experts, quantize_experts
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.units import packed_parameters

pytestmark = needs_bitsandbytes
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
KINDS = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"]
TOKENS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = {"full": {}, "lora": {"adapter": "lora", "r": 4}}


def coarse(kind: str, whole: bool = False) -> nn.Module:
    model = tiny_model(kind)
    quantize_experts(model, NF4)
    if whole:
        dequantize_experts(model)
    return model


def tuned_model(kind: str, adapter: str, whole: bool = False, k: int = 9) -> PeftModel:
    torch.manual_seed(0)
    config = KappaTuneConfig(k=k, include=["*.experts.*"], task_type="CAUSAL_LM", **SETTINGS[adapter])
    return get_peft_model(coarse(kind, whole), config)


def train(tuned: PeftModel, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if "kappatune" not in name}


def unit_values(model: nn.Module) -> dict[str, Tensor]:
    """What the modules of a model compute with, unit by unit."""
    whole = copy.deepcopy(model)
    for module in whole.modules():
        for name in packed_parameters(module):
            assert getattr(module, name).shape == packed_parameters(module)[name].quant_state.shape
    dequantize_experts(whole)
    source = ModelSource(whole)
    return {unit.name: source.load(unit) for unit in source.units}


@pytest.mark.parametrize(
    ("kind", "adapter"), [*((kind, "full") for kind in KINDS), ("olmoe", "lora"), ("gpt_oss", "lora")]
)
def test_training_is_that_of_the_dequantized_model(kind, adapter):
    """The reference holds the same values unquantized, where training is tested against autograd."""
    tuned, reference = tuned_model(kind, adapter), tuned_model(kind, adapter, whole=True)
    names = [unit.name for unit in tuned.base_model.selections["default"].units]
    assert names == [unit.name for unit in reference.base_model.selections["default"].units] and len(names) == 9
    base, before, own = logits(tuned), stored(tuned), unit_values(tuned.get_base_model())
    assert torch.equal(base, logits(reference))
    assert train(tuned.train()) == pytest.approx(train(reference.train()), rel=1e-6)
    torch.testing.assert_close(logits(tuned), logits(reference), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(each, before[name]) for name, each in stored(tuned).items())
    moved = {name for name, each in unit_values(tuned.get_base_model()).items() if not torch.equal(each, own[name])}
    reached = {layer.unit.name for layer in tuned.base_model.layers() if layer.leaves[-1].abs().sum() > 0}
    assert moved <= set(names) and len(moved) >= 3 and moved <= reached
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    assert not torch.equal(logits(tuned), base)


@pytest.mark.parametrize("adapter", SETTINGS)
@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2"])
def test_saved_loaded_and_merged(kind, adapter, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tuned = tuned_model(kind, adapter)
    train(tuned)
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(coarse(kind), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert again.peft_config["default"].base_quantization["experts"]["bnb_4bit_quant_type"] == "nf4"
    with pytest.raises(KappaTuneError, match="fused experts were stored otherwise.*quantize_experts.model, BitsAnd"):
        PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)
    mine, theirs = unit_values(tuned.get_base_model()), unit_values(merged)
    assert mine.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in mine.items())


def test_two_adapters_copies_and_unloading():
    tuned = tuned_model("olmoe", "full")
    base = logits(tuned)
    tuned.add_adapter("other", KappaTuneConfig(k=3, include=["*.experts.*"], order="highest"))
    train(tuned)
    first = logits(tuned)
    tuned.set_adapter("other")
    assert torch.equal(logits(tuned), base)
    twin = copy.deepcopy(tuned)
    twin.set_adapter("default")
    assert torch.equal(logits(twin), first) and torch.equal(logits(tuned), base)
    merged = twin.merge_and_unload()
    assert torch.equal(logits(merged), first)
    dense = [name for name, each in merged.named_parameters() if each.ndim == 3]
    assert dense and not any("kappatune" in name for name in dense)
    # the copy's class was that of the original
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    tuned.delete_adapter("default")
    assert torch.equal(logits(tuned), base)
    plain = tuned.unload()
    assert torch.equal(logits(plain), base)
    for model in (plain, merged):
        experts = model.model.layers[0].mlp.experts
        # those of bitsandbytes are left
        assert {
            type(each.__self__).__name__ for each in experts._forward_hooks.values() if hasattr(each, "__self__")
        } == set()


def test_the_gradient_of_a_whole_parameter_is_never_made(monkeypatch):
    """Where experts are read one after the other, or in a grouped product: see `slices.weight`."""
    monkeypatch.setattr(SliceAlias, "backward", lambda *_: pytest.fail("the whole gradient was asked for"))
    for implementation in ("grouped_mm", "eager"):
        tuned = tuned_model("olmoe", "full")
        tuned.set_experts_implementation(implementation)
        assert len(train(tuned.train(), steps=1)) == 1


def test_gradient_checkpointing_and_a_backward_with_other_values():
    losses = []
    for reentrant in (None, False, True):
        tuned = tuned_model("mixtral", "full")
        if reentrant is not None:
            tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
            tuned.enable_input_require_grads()
        losses.append(train(tuned.train()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] == pytest.approx(losses[2], rel=1e-6)
    loss = tuned_model("mixtral", "full")
    out = loss(input_ids=TOKENS, labels=TOKENS).loss
    with loss.disable_adapter(), pytest.raises(KappaTuneError, match="while the base holds other values"):
        out.backward()
