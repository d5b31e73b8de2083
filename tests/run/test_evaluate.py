"""Models trained before, measured beside their base."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from helpers.recipes import CONTROL, tiny_recipe, write_recipe
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.cli.app import app
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.evaluate import evaluate
from kappatune_plugin.run.train import run_sft


@pytest.fixture(scope="module")
def trained(saved_olmoe, tmp_path_factory) -> Path:
    """A folder with recipe.yaml and a run of it in out/. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    run_sft(load_recipe(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, saved_olmoe))))
    return folder


@pytest.fixture(scope="module")
def lora(saved_olmoe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load(saved_olmoe), config).save_pretrained(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def measured_by_the_run(folder: Path) -> dict:
    content = json.loads((folder / "out" / "forgetting.json").read_text())
    return {key: content[key] for key in ("control", "task", "recall")}


def flat(content: dict, *names: str) -> dict:
    """The numbers of nested mappings, {("control", "control", "loss_before"): ...}."""
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, *names, key)
        elif isinstance(value, float | int):
            found[(*names, key)] = value
    return found


def test_adapter_and_checkpoint_give_what_the_run_measured(trained, tmp_path):
    merge_adapter(trained / "out", tmp_path / "merged")
    evaluation = evaluate(load_recipe(trained / "recipe.yaml"), [str(trained / "out"), str(tmp_path / "merged")])
    evaluation.save(tmp_path / "eval.json")
    expected = flat(measured_by_the_run(trained))
    assert len(expected) == 13
    assert expected["control", "control", "kl_after"] > 1e-4
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["format"] == 1 and list(content["models"]) == list(evaluation.reports)
    for found in content["models"].values():
        assert flat(found) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_adapters_of_another_method_leave_no_trace(trained, lora, saved_olmoe):
    places = [str(lora), str(trained / "out")]
    reports = evaluate(load_recipe(trained / "recipe.yaml"), places).reports
    model, tokenizer = (
        PeftModel.from_pretrained(load(saved_olmoe), str(lora)),
        AutoTokenizer.from_pretrained(saved_olmoe),
    )
    nats, tokens = 0.0, 0
    for row in CONTROL[:2]:
        ids = torch.tensor([tokenizer(row["text"]).input_ids])
        logits = model(input_ids=ids).logits[0, :-1].double()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    assert reports[places[0]].after["control_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    expected = measured_by_the_run(trained)["control"]["control"]
    assert reports[places[1]].after["control_loss"] == pytest.approx(expected["loss_after"], rel=1e-5)
    assert reports[places[1]].after["control_kl"] == pytest.approx(expected["kl_after"], rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
def test_adapter_of_a_quantized_base(tmp_path):
    base = tiny_model("olmoe", hidden_size=64, intermediate_size=128, vocab_size=300)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    recipe = tiny_recipe(tmp_path, tmp_path / "base", load_in_4bit=True, max_steps=2)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    run_sft(load_recipe(path))
    evaluate(load_recipe(path), [str(tmp_path / "out")]).save(tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())["models"][str(tmp_path / "out")]
    assert flat(found) == pytest.approx(flat(measured_by_the_run(tmp_path)), rel=1e-5)
    with pytest.raises(KappaTuneError, match="is a whole checkpoint, and the recipe's model is quantized"):
        evaluate(load_recipe(path), [str(tmp_path / "base")])


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(trained, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"cut off")
    (tmp_path / "empty").mkdir()
    recipe = load_recipe(trained / "recipe.yaml", ["--model_name_or_path", str(tmp_path / "nowhere")])
    places = [str(lora), str(lora), str(tmp_path / "cut"), str(tmp_path / "empty")]
    with pytest.raises(KappaTuneError) as raised:
        evaluate(recipe, places)
    for words in (f"'{lora}' is given twice", "damaged or cut off", f"'{tmp_path / 'empty'}' holds no adapter_config"):
        assert words in str(raised.value)
    with pytest.raises(KappaTuneError, match="there is no model to measure"):
        evaluate(recipe, [])


def test_recipe_without_the_block(saved_olmoe, lora, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, saved_olmoe, forgetting=None)))
    with pytest.raises(KappaTuneError, match="the block forgetting is missing"):
        evaluate(recipe, [str(lora)])


def test_models_of_another_base(trained, lora, tmp_path):
    recipe = load_recipe(trained / "recipe.yaml")
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "llama")
    with pytest.raises(KappaTuneError, match=r"llama' was not trained from .*of its weights are others"):
        evaluate(recipe, [str(tmp_path / "llama")])
    other = tiny_model("olmoe", vocab_size=300)
    other.lm_head.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    recipe = load_recipe(trained / "recipe.yaml", ["--model_name_or_path", str(tmp_path / "other")])
    with pytest.raises(KappaTuneError, match="fingerprint"), pytest.warns(UserWarning, match="it is measured on"):
        evaluate(recipe, [str(trained / "out")])
    with pytest.warns(UserWarning, match="says that it was trained from .*; it is measured on .*other"):
        evaluate(recipe, [str(lora)])


def test_the_command(trained, lora, tmp_path):
    words = ["eval", "--config", trained / "recipe.yaml", "--output", tmp_path / "eval.json"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and "What was learned" in done.stdout and str(tmp_path / "eval.json") in done.stdout
    assert list(json.loads((tmp_path / "eval.json").read_text())["models"]) == [str(trained / "out")]
    words += ["--models", f"{trained / 'out'}, {lora}", "--forgetting.max_samples", "1"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    content = json.loads((tmp_path / "eval.json").read_text())
    assert done.exit_code == 0 and list(content["models"]) == [str(trained / "out"), str(lora)]
    assert content["models"][str(lora)]["recall"]["facts"] == 1
    assert f" {lora.name} " in done.stdout


def test_an_adapter_of_which_nothing_fits_is_refused(trained, tmp_path):
    other = get_peft_model(tiny_model("gpt2", vocab_size=300), LoraConfig(r=2, target_modules=["c_attn"]))
    other.save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())
    config |= {"target_modules": ["q_proj"], "fan_in_fan_out": False}
    (tmp_path / "gpt2" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(KappaTuneError, match="is of another model: none of its 4 tensors"):
        evaluate(load_recipe(trained / "recipe.yaml"), [str(tmp_path / "gpt2")])
