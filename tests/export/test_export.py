"""Each form of an export computes what was trained, loaded by plain transformers and PEFT."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from helpers.loops import TOKENS, logits, train, trainable
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.cli import app
from kappatune_plugin.export.export import export_adapter
from kappatune_plugin.export.lora import changes_of, write_lora

KINDS = ("llama", "gemma3", "olmoe", "mixtral", "qwen3_moe", "gpt_oss")
# loads folders in a process where the package can't be imported, and saves their logits
ELSEWHERE = """
import sys
sys.modules["kappatune_plugin"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
work, tokens = sys.argv[1], torch.load(sys.argv[1] + "/tokens.pt")
found = {}
for kind in sys.argv[2:]:
    for form in ("merged", "patch", "lora"):
        folder = f"{work}/{kind}/{form}"
        if form == "lora":
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{work}/{kind}/base"), folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found[kind, form] = model.eval()(input_ids=tokens).logits
torch.save(found, work + "/found.pt")
"""
# the adapter in a fresh process, with this package
AGAIN = """
import sys
import kappatune_plugin
import torch
from peft import AutoPeftModelForCausalLM
work, kind = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(f"{work}/{kind}/adapter").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(work + "/tokens.pt")).logits, work + "/adapter.pt")
"""
# a folder of model folders; beside the repository unless the environment names one
DEFAULT_MODELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"
SMOLLM = Path(os.environ.get("KAPPATUNE_TEST_MODELS", DEFAULT_MODELS)) / "smollm2-135m-instruct"


def make(kind: str, folder: Path) -> torch.Tensor:
    """Base and adapter in `folder`, trained on matrices of all sorts; the logits of both together."""
    tiny_model(kind, vocab_size=300).save_pretrained(folder / "base", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, KappaTuneConfig(k=9, order="random", task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(folder / "adapter")
    return logits(model)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every export of each architecture, and the logits they should have. Read only."""
    work, expected = tmp_path_factory.mktemp("exports"), {}
    for kind in KINDS:
        expected[kind] = make(kind, work / kind)
        for form in ("merged", "patch"):
            export_adapter(work / kind / "adapter", work / kind / form, form)
        export_adapter(work / kind / "adapter", work / kind / "lora", "lora", rank=16)
    return work, expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_again_computes_what_was_trained(made, kind):
    work, expected = made
    for form in ("merged", "patch"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(work / kind / form)), expected[kind]), form
    base = AutoModelForCausalLM.from_pretrained(work / kind / "base")
    assert not torch.allclose(expected[kind], logits(base), atol=1e-4)
    assert torch.equal(logits(PeftModel.from_pretrained(base, work / kind / "adapter")), expected[kind])


@pytest.mark.slow
def test_without_this_package_they_compute_what_was_trained(made):
    work, expected = made
    torch.save(TOKENS, work / "tokens.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(work), *KINDS], check=True, capture_output=True)
    found = torch.load(work / "found.pt")
    for kind in KINDS:
        base = logits(AutoModelForCausalLM.from_pretrained(work / kind / "base"))
        assert not torch.allclose(expected[kind], base, atol=1e-4)
        assert torch.equal(found[kind, "merged"], expected[kind]), kind
        assert torch.equal(found[kind, "patch"], expected[kind]), kind


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM.is_dir(), reason=f"no {SMOLLM.name} in {SMOLLM.parent}; KAPPATUNE_TEST_MODELS names another"
)
def test_of_a_real_model_adapter_merged_and_patch_are_the_same_to_the_bit(tmp_path):
    (tmp_path / "smollm").mkdir()
    (tmp_path / "smollm" / "base").symlink_to(SMOLLM.resolve())
    base, adapter = tmp_path / "smollm" / "base", tmp_path / "smollm" / "adapter"
    tokens = AutoTokenizer.from_pretrained(base)(["The capital of France is Paris."] * 2, return_tensors="pt").input_ids
    untrained = AutoModelForCausalLM.from_pretrained(base)
    before = logits(untrained, input_ids=tokens)
    model = get_peft_model(untrained, KappaTuneConfig(k=9, include=["mlp"], task_type="CAUSAL_LM"))
    train(model, 2, torch.optim.AdamW(trainable(model), lr=2e-4), input_ids=tokens, labels=tokens)
    model.save_pretrained(adapter)
    expected = logits(model, input_ids=tokens)
    assert not torch.equal(before, expected)
    for form in ("merged", "patch"):
        export_adapter(adapter, tmp_path / "smollm" / form, form)
    export_adapter(adapter, tmp_path / "smollm" / "lora", "lora", rank=576)
    torch.save(tokens, tmp_path / "tokens.pt")
    for code in (ELSEWHERE, AGAIN):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), "smollm"], check=True, capture_output=True)
    found = torch.load(tmp_path / "found.pt") | {"adapter": torch.load(tmp_path / "adapter.pt")}
    for form in (("smollm", "merged"), ("smollm", "patch"), "adapter"):
        assert torch.equal(found[form], expected), form
    # LoRA holds what was trained before it was rounded to the base's bfloat16
    assert found["smollm", "lora"].shape == expected.shape
    exact, base = (AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32) for _ in range(2))
    for layer in model.base_model.layers():
        exact.get_parameter(layer.unit.parameter).data.copy_(layer.active.weight)
    lora = logits(PeftModel.from_pretrained(base, tmp_path / "smollm" / "lora"), input_ids=tokens)
    torch.testing.assert_close(lora, logits(exact, input_ids=tokens), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_holds_the_trained_tensors_alone(made, kind):
    folder = made[0] / kind / "patch"
    with safe_open(folder / "model-patch.safetensors", "pt") as file:
        names = set(file.keys())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    selection = json.loads((folder.parent / "adapter" / "adapter_config.json").read_text())["selection"]
    trained = {unit["name"] for unit in selection["units"]}
    fused = {name for name in names if name.endswith(("gate_up_proj", "down_proj"))}
    assert names - fused <= trained and (kind == "gpt_oss") == bool(fused)
    assert {name for name, file in index.items() if file == "model-patch.safetensors"} == names
    written = (folder / "model-patch.safetensors").stat().st_size
    assert written < (folder.parent / "merged" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_full_rank_is_what_was_trained_and_less_is_the_nearest(made, kind):
    folder = made[0] / kind

    def tuned() -> PeftModel:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")

    changes = changes_of(tuned())
    errors = {rank: write_lora(tuned(), folder / f"lora-{rank}", rank).errors for rank in (1, 4)}
    for rank, found in errors.items():
        for name, change in changes.items():
            stack = change.reshape(-1, *change.shape[-2:])
            tail = torch.linalg.svdvals(stack)[:, rank:].square().sum().sqrt()
            assert found[name] == pytest.approx(float(tail / change.norm()), abs=1e-4)
    full = max(min(change.shape[-2:]) for change in changes.values())
    assert max(write_lora(tuned(), folder / "lora-full", full).errors.values()) < 1e-4
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora-full")
    torch.testing.assert_close(logits(model), made[1][kind], rtol=0, atol=1e-4)


def test_the_command_says_what_is_lost_and_what_cannot_be(made, tmp_path):
    adapter = str(made[0] / "llama" / "adapter")
    words = ["export", adapter, "--as", "lora", "--rank", "2", "--output_dir", str(tmp_path / "lora")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0 and "of the change is lost at rank 2" in said.output
    assert "What LoRA lost" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, [*words[:3], "onnx", *words[6:]]).exit_code == 2
    said = CliRunner().invoke(app, [*words[:3], "gguf-ready", "--output_dir", str(tmp_path / "whole")])
    assert said.exit_code == 0 and (tmp_path / "whole" / "tokenizer.json").is_file()


def test_lora_refuses_what_it_cannot_carry(tmp_path):
    model = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=1, include=["embedding"], exclude=["norm"]))
    train(model)
    with pytest.raises(KappaTuneError, match="LoRA can't carry the change of model.embed_tokens.weight"):
        write_lora(model, tmp_path)


def test_what_was_written_wrong_is_not_published(made, tmp_path, monkeypatch):
    from kappatune_plugin.export import merge

    real = merge._merged

    def wrong(*args):
        merged = real(*args)
        merged.get_parameter("model.norm.weight").data.add_(1)
        return merged

    monkeypatch.setattr(merge, "_merged", wrong)
    with pytest.raises(KappaTuneError, match="model.norm.weight"):
        export_adapter(made[0] / "llama" / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
