"""`load_in_4bit: true` of a mixture of experts, from the recipe to a plain checkpoint."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.quantize import needs_bitsandbytes
from helpers.recipes import tiny_recipe, write_recipe
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.training import train
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.recipe.load_model import load_base
from kappatune_plugin.recipe.recipe import Recipe, load_recipe
from kappatune_plugin.weights.fused_experts import experts_quantization

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True, "forgetting": None}
TOKENS = torch.tensor([[5, 9, 12, 40, 3, 77, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE of whole blocks of 64 values a row, as bitsandbytes wants linear layers."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("olmoe", vocab_size=300, hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(folder: Path, base: Path, **changes: object) -> Recipe:
    return load_recipe(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, base, **changes)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@needs_bitsandbytes
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_recipe_trains_experts_in_four_bits(base, tmp_path, capsys, adapter):
    kappatune = {"k": 6, "include": ["*.experts.*"], "adapter": adapter}
    result = train(tmp_path, base, kappatune=kappatune, gradient_checkpointing=True, **FOUR_BITS)
    shown = capsys.readouterr().out
    assert "4 fused experts' parameters are quantized to 4 bits: 0.75 MiB before, 0.10 MiB now." in shown
    trained = result.trainer.model
    assert all(leaf.dtype == torch.float32 for layer in trained.base_model.layers() for leaf in layer.leaves)
    expected = logits(trained)
    again = load_base(load_recipe(tmp_path / "out" / "recipe.yaml"))
    tuned = PeftModel.from_pretrained(again, tmp_path / "out")
    assert torch.equal(logits(tuned), expected)
    with tuned.disable_adapter():
        assert not torch.equal(logits(tuned), expected)
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


@needs_bitsandbytes
def test_what_recipes_leave_unquantized(base, tmp_path, capsys):
    opted_out = recipe(tmp_path, base, kappatune={"k": 6, "quantize_experts": False}, **FOUR_BITS)
    assert experts_quantization(load_base(opted_out)) is None and "fused experts" not in capsys.readouterr().out
    eight = recipe(tmp_path, base, load_in_8bit=True, forgetting=None)
    assert experts_quantization(load_base(eight)) is None
    assert "4 fused experts' parameters stay unquantized" in capsys.readouterr().out


def test_without_bitsandbytes_a_recipe_says_what_to_install(base, tmp_path, monkeypatch):
    def missing(*args: object) -> None:
        raise ImportError("No package metadata was found for bitsandbytes")

    monkeypatch.setattr("kappatune_plugin.recipe.load_model.get_quantization_config", missing)
    with pytest.raises(KappaTuneError, match="load_in_4bit and load_in_8bit need bitsandbytes: .*pip install"):
        load_base(recipe(tmp_path, base))
