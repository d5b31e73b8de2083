"""The main job, whole: a recipe in, an adapter and its files out."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.recipes import ROWS, write_rows
from helpers.training import losses, train, unit_values
from kappatune_plugin import KappaReport, KappaTuneError, Selection
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("KAPPATUNE_DATA", REPOSITORY.parent / "shared" / "data"))


def load_base(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_leaves_what_is_documented(saved_olmoe, tmp_path, capsys):
    result = train(tmp_path, saved_olmoe)
    out = tmp_path / "out"
    selection, report = Selection.load(out / "selection.json"), KappaReport.load(out / "kappa_report.json")
    assert [unit.name for unit in selection.units] == [unit.name for unit in result.selection.units]
    lowest = sorted(report.units, key=lambda unit: unit.kappa)[:7]
    assert {unit.name for unit in selection.units} == {unit.name for unit in lowest}
    assert sum(name.endswith(".weight") for name in load_file(out / "adapter_model.safetensors")) == 7
    forgetting = json.loads((out / "forgetting.json").read_text())
    assert forgetting == {"format": 1, **result.forgetting.to_dict()}
    assert forgetting["task"]["metric"] == "accuracy" and [step["step"] for step in forgetting["steps"]] == [2]
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert resolved["kappatune"] == {"k": 7} and resolved["learning_rate"] == 1e-2
    shown, values = capsys.readouterr().out, sum(unit.shape[0] * unit.shape[1] for unit in selection.units)
    for words in ("7 trained (*)", f"trainable params: {values:,}", "What was learned", f"kappatune merge {out}"):
        assert words in shown, words


def test_the_log_says_what_was_ranked_left_out_and_trained(saved_olmoe, tmp_path, capsys):
    kappatune = {"k": 7, "modules_to_save": ["lm_head"], "exclude": ["embedding", "head", "*.q_proj.weight"]}
    result = train(tmp_path, saved_olmoe, kappatune=kappatune, max_steps=1, forgetting=None)
    shown = capsys.readouterr().out
    said = re.search(r"Of (\d+) matrices (\d+) were ranked, and (\d+) left out \((.+?)\)\.", shown.replace("\n", " "))
    assert [int(number) for number in said.groups()[:3]] == [60, 56, 4]
    assert "1 excluded by 'embedding'" in said[4] and "2 excluded by '*.q_proj.weight'" in said[4]
    line = next(line for line in shown.splitlines() if line.startswith("Trained parameters by group: "))
    groups = dict(group.rsplit(" ", 1) for group in line.partition(": ")[2].removesuffix(".").split(", "))
    numbers = [int(number.replace(",", "")) for number in groups.values()]
    assert "lm_head.weight" in groups and len(groups) > 1
    assert sum(numbers) == sum(each.numel() for each in result.trainer.model.parameters() if each.requires_grad)


def test_resolved_recipe_repeats_the_run(saved_olmoe, tmp_path):
    train(tmp_path, saved_olmoe, "--max_steps", "3")
    again = run_sft(load_recipe(tmp_path / "out" / "recipe.yaml", ["--output_dir", str(tmp_path / "again")]))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", again.output_dir))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_adapter_loads_and_only_the_selected_differ(saved_olmoe, tmp_path):
    result = train(tmp_path, saved_olmoe)
    before = unit_values(load_base(saved_olmoe))
    model = PeftModel.from_pretrained(load_base(saved_olmoe), str(tmp_path / "out"))
    after = unit_values(model.merge_and_unload())
    selected = {unit.name for unit in result.selection.units}
    assert {name for name in before if not torch.equal(before[name], after[name])} == selected


def test_resumed_equals_uninterrupted(saved_olmoe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(whole, saved_olmoe, **settings)
    train(parts, saved_olmoe, **settings)
    shutil.rmtree(parts / "out" / "checkpoint-4")
    train(parts, saved_olmoe, "--resume_from_checkpoint", "true", **settings)
    one, other = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    steps = json.loads((parts / "out" / "forgetting.json").read_text())["steps"]
    assert steps == json.loads((whole / "out" / "forgetting.json").read_text())["steps"]


@pytest.mark.slow
def test_report_and_selection_of_an_earlier_run_are_taken(saved_olmoe, tmp_path):
    train(tmp_path, saved_olmoe)
    out = tmp_path / "out"
    other = ["--output_dir", str(tmp_path / "other")]
    by_report = train(tmp_path, saved_olmoe, *other, "--kappatune.report", str(out / "kappa_report.json"))
    given = ["--kappatune", f"{{selection: {out / 'selection.json'}}}"]
    by_selection = train(tmp_path, saved_olmoe, *other, *given, "--overwrite_output_dir")
    assert by_report.selection.units == by_selection.selection.units == Selection.load(out / "selection.json").units


@pytest.mark.parametrize("rows", [[{"text": row["text"]} for row in ROWS], [{"prompt": "a", "completion": " b"}] * 8])
def test_rows_in_trls_own_formats_need_no_templates(saved_olmoe, tmp_path, rows):
    data = {"train": {"path": str(write_rows(tmp_path / "own.jsonl", rows))}}
    result = train(tmp_path, saved_olmoe, data=data, forgetting={"control": "self", "samples": 2, "max_length": 8})
    assert list(result.forgetting.to_dict()["control"]) == ["self"]


def test_without_the_block_nothing_is_measured_and_said_so(saved_olmoe, tmp_path, capsys):
    assert train(tmp_path, saved_olmoe, forgetting=None).forgetting is None
    assert not (tmp_path / "out" / "forgetting.json").exists()
    assert "Nothing was measured" in capsys.readouterr().out


def test_evaluation_during_training_uses_the_test_rows(saved_olmoe, tmp_path):
    result = train(tmp_path, saved_olmoe, eval_strategy="steps", eval_steps=2)
    assert [entry["step"] for entry in result.trainer.state.log_history if "eval_loss" in entry] == [2, 4]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--kappatune.k", "1000"], ["1000", "58"]),
        (["--kappatune.exclude", "[nrom]"], ["nrom", "norm"]),
        (["--kappatune.include", "['*.experts.99.*']"], ["experts.99"]),
        (["--kappatune.k", "{kappa: 1.0}"], ["kappa"]),
        (["--model_name_or_path", "./nowhere"], ["nowhere"]),
        (["--data.train.path", "nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
        (["--data.prompt", "Say: {txet}"], ["txet", "Did you mean 'text'?"]),
        (["--forgetting.text_column", "txt"], ["forgetting.text_column", "txt", "text"]),
        (["--forgetting.recall.path", "nowhere.jsonl"], ["forgetting.recall", "nowhere.jsonl"]),
        (["--output_dir", "/proc/nowhere"], ["Can't write in '/proc/nowhere'"]),
        (["--resume_from_checkpoint", "true"], ["no complete checkpoint"]),
    ],
)
def test_mistakes_that_show_only_now(saved_olmoe, tmp_path, overrides, words):
    with pytest.raises(KappaTuneError) as error:
        train(tmp_path, saved_olmoe, *overrides)
    for word in words:
        assert word in str(error.value)


def test_output_dir_that_is_a_file(saved_olmoe, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(KappaTuneError, match="Can't write in"):
        train(tmp_path, saved_olmoe)


def test_the_papers_recipe_on_a_small_model(saved_olmoe, tmp_path):
    """recipes/olmoe_sarcasm.yaml with the model, the data and what has to do with their size replaced."""
    tweets = [{"text": f"what a {word} day", "label": word == "lovely"} for word in ("lovely", "rainy")] * 8
    path = str(write_rows(tmp_path / "tweets.jsonl", [{**row, "label": int(row["label"])} for row in tweets]))
    texts = str(write_rows(tmp_path / "wiki.jsonl", [{"text": ""}, {"text": "the cat sat on the mat " * 20}]))
    changes = {
        "model_name_or_path": str(saved_olmoe),
        "output_dir": str(tmp_path / "out"),
        "data.train": f"{{path: {path}}}",
        "data.test": f"{{path: {path}, split: 'train[:4]'}}",
        "forgetting.control": f"{{wikitext: {{path: {texts}}}}}",
        "kappatune.k": "20",
        "num_train_epochs": "1",
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
    }
    flags = [word for key, value in changes.items() for word in (f"--{key}", value)]
    result = run_sft(load_recipe(REPOSITORY / "recipes" / "olmoe_sarcasm.yaml", flags))
    assert result.trainer.state.global_step == 4
    assert len(result.selection.units) == 20 and result.trainer.model.dtype == torch.bfloat16
    assert {"task", "control"} < result.forgetting.to_dict().keys()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real models and texts in {DATA} (set KAPPATUNE_DATA)")
@pytest.mark.parametrize("model", ["tinystories-656k", "tinystories-656k-upcycled-moe-DERIVED"])
def test_real_models_learn_real_text(tmp_path, model):
    import sys

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from real_models import MODELS, RECIPE, overrides

    settings = {"model_name_or_path": DATA / "models" / model, "output_dir": tmp_path / "out", "max_steps": 40}
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    local = overrides(DATA, tmp_path, test_rows=50)
    result = run_sft(
        load_recipe(RECIPE, [*local, *flags, "--kappatune.k", str(MODELS[model]), "--logging_steps", "10"])
    )
    learned = losses(result.trainer)
    control = result.forgetting.to_dict()["control"]["tinystories"]
    assert learned[-1] < learned[0] / 2
    # it knows stories to begin with (2048 tokens at random are 7.6 nats), and the whole model still does
    assert control["loss_before"] < 3.5 and control["loss_after"] < control["loss_before"] + 1
    assert control["kl_after"] > 0
