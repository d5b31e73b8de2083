"""The dial at the end of a run, and on models trained before."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from helpers.recipes import ROWS, tiny_recipe, write_recipe, write_rows
from kappatune_plugin import KappaTuneError
from kappatune_plugin.cli.app import app
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.evaluate import evaluate
from kappatune_plugin.run.interpolate import interpolate_trained
from kappatune_plugin.run.train import run_sft

TEXTS = [{"text": f"the cat {i} sat on the {word}, yes. no good mat"} for i in range(12) for word in ("mat", "rug")]


def recipe_in(folder: Path, model: Path, *overrides: str, **forgetting):
    recipe = tiny_recipe(folder, model, max_steps=12)
    recipe["data"]["validation"] = {"path": str(write_rows(folder / "validation.jsonl", ROWS[::2]))}
    recipe["forgetting"] = {"control": {"path": str(write_rows(folder / "texts.jsonl", TEXTS))}, **forgetting}
    return load_recipe(write_recipe(folder / "recipe.yaml", recipe), overrides)


def loaded(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 33).reshape(3, 10)).logits


@pytest.fixture(scope="module")
def trained(saved_olmoe, tmp_path_factory) -> Path:
    """A folder with a run in out/ that kept all of what it trained, and a LoRA adapter in lora/. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    run_sft(recipe_in(folder, saved_olmoe, max_delta=0.01, interpolate="off"))
    torch.manual_seed(0)
    model = get_peft_model(loaded(saved_olmoe), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.3)
    model.save_pretrained(folder / "lora")
    return folder


def test_a_run_keeps_its_promise_and_saves_what_it_measured(saved_olmoe, tmp_path, capsys):
    recipe = recipe_in(tmp_path, saved_olmoe, max_delta=0.008)
    result = run_sft(recipe)
    out, report = result.output_dir, result.forgetting
    assert result.dialed.mode in ("one", "per_matrix")
    assert report.delta(report.after) > 0.008 >= result.dialed.verified["texts"].upper
    content = json.loads((out / "interpolation.json").read_text())
    assert content["format"] == 1 and content["limit"] == 0.008 and len(content["alphas"]) == 7
    assert content["verified"]["texts"]["documents"] == 12 and (out / "interpolation.png").stat().st_size > 5000
    kept = json.loads((out / "forgetting.json").read_text())["kept"]
    assert kept["texts_loss"] == report.kept["texts_loss"]
    found = evaluate(recipe, [str(out), str(out / "checkpoint-trained")]).reports
    assert found[str(out)].after == pytest.approx(report.kept, rel=1e-4, abs=1e-6)
    assert found[str(out / "checkpoint-trained")].after == pytest.approx(report.after, rel=1e-4, abs=1e-6)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("before", "trained", "kept", "with 95% confidence by at most", "seconds."):
        assert words in said
    assert "more than forgetting.max_delta allows" not in said


def test_a_run_within_its_limit_is_as_it_was(saved_olmoe, tmp_path, trained):
    result = run_sft(recipe_in(tmp_path, saved_olmoe, max_delta=9.0))
    assert result.dialed.mode == "trained" and not (result.output_dir / "checkpoint-trained").exists()
    ours, off = (load_file(folder / "adapter_model.safetensors") for folder in (result.output_dir, trained / "out"))
    assert all(torch.equal(value, off[name]) for name, value in ours.items())


def test_a_run_that_can_keep_nothing_says_where_its_training_is(saved_olmoe, tmp_path):
    with pytest.raises(KappaTuneError, match="(?s)No scale above 0.*checkpoint-trained; no adapter was saved"):
        run_sft(recipe_in(tmp_path, saved_olmoe, max_delta=1e-9, interpolate="one"))
    assert (tmp_path / "out/checkpoint-trained/adapter_model.safetensors").is_file()
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_tenth_of_the_rows_is_held_out(saved_olmoe, tmp_path):
    recipe = recipe_in(tmp_path, saved_olmoe, max_delta=9.0, control="self", samples=4, max_length=8)
    del recipe.data["validation"]
    with pytest.raises(KappaTuneError, match="a tenth of the 16 training rows is 1.*interpolate: off"):
        run_sft(recipe)
    write_rows(tmp_path / "train.jsonl", ROWS * 3)
    result = run_sft(recipe)
    assert len(result.trainer.train_dataset) == 44 and set(result.dialed.verified) == {"self"}


@pytest.mark.parametrize("per_matrix", [True, False])
def test_lora_stays_lora_and_loads_in_plain_peft(trained, saved_olmoe, tmp_path, per_matrix):
    recipe, folder = load_recipe(trained / "recipe.yaml"), tmp_path / "kept"
    dialed, report = interpolate_trained(recipe, str(trained / "lora"), folder, 0.02, per_matrix)
    assert dialed.verified["texts"].upper <= 0.02 < report.delta(report.after)
    before, after = (load_file(each / "adapter_model.safetensors") for each in (trained / "lora", folder))
    assert before.keys() == after.keys() and {name for name in before if "lora_B" in name} == {
        name for name in before if not torch.equal(before[name], after[name])
    }
    name = "model.layers.0.self_attn.q_proj"
    key = f"base_model.model.{name}.lora_B.weight"
    torch.testing.assert_close(after[key], before[key] * dialed.alphas[f"{name}.weight"])
    model = PeftModel.from_pretrained(loaded(saved_olmoe), str(folder))
    assert not torch.equal(logits(model), logits(loaded(saved_olmoe)))
    found = evaluate(recipe, [str(folder)]).reports[str(folder)]
    assert found.after["texts_loss"] == pytest.approx(report.kept["texts_loss"], abs=1e-6)
    assert "scaled back towards its base" in (folder / "README.md").read_text()


def test_our_adapters_and_checkpoints_stay_what_they_are(trained, tmp_path):
    recipe = load_recipe(trained / "recipe.yaml")
    merge_adapter(trained / "out", tmp_path / "merged")
    for place in (trained / "out", tmp_path / "merged"):
        folder = tmp_path / f"kept_{place.name}"
        dialed, report = interpolate_trained(recipe, str(place), folder, 0.008, per_matrix=False)
        assert len(dialed.alphas) == 7 and dialed.mode == "one"
        found = evaluate(recipe, [str(folder)]).reports[str(folder)]
        assert found.after["texts_loss"] == pytest.approx(report.kept["texts_loss"], abs=1e-6)
        assert {file.name for file in place.iterdir() if file.is_file()} <= {file.name for file in folder.iterdir()}


def test_command_says_what_was_kept(trained, tmp_path):
    words = ["interpolate", str(trained / "lora"), "--config", str(trained / "recipe.yaml"), "--max_delta", "9.0"]
    result = CliRunner().invoke(app, [*words, "--output_dir", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    assert "Everything that was trained was kept." in result.output
    before, after = (load_file(each / "adapter_model.safetensors") for each in (trained / "lora", tmp_path / "kept"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("overrides", "wrong", "found"),
    [
        (["--data.validation", "null"], None, "no rows held out.*data.validation"),
        (["--forgetting.control", "null"], None, "no control"),
        ([], "base", "trained from '/nowhere/else'.*--model_name_or_path"),
        ([], "nan", "hold NaN or infinity"),
        ([], "limit", "No scale above 0 keeps"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(trained, tmp_path, overrides, wrong, found):
    recipe, place = load_recipe(trained / "recipe.yaml", overrides), tmp_path / "made"
    place.mkdir()
    source = trained / ("out" if wrong == "limit" else "lora")
    config = json.loads((source / "adapter_config.json").read_text())
    values = load_file(source / "adapter_model.safetensors")
    if wrong == "base":
        config["base_model_name_or_path"] = "/nowhere/else"
    if wrong == "nan":
        values = {name: value + torch.nan if "lora_B" in name else value for name, value in values.items()}
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(values, place / "adapter_model.safetensors", metadata={"format": "pt"})
    limit = 1e-9 if wrong == "limit" else 0.02
    with pytest.raises(KappaTuneError, match=f"(?s){found}"):
        interpolate_trained(recipe, str(place), tmp_path / "kept", limit, per_matrix=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
