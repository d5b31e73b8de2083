"""The card tells what was trained and measured, in the hub's form, whoever made the folder."""

import json
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers.training import ON_CPU, train
from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.export.card import write_card
from kappatune_plugin.toolkits.shared import new_adapter


def read(folder: Path, *paths: Path) -> ModelCard:
    """The card, as the hub reads it; it names none of `paths`."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "[More Information Needed]" not in text and "/tmp" not in text
    assert not [path for path in paths if str(path) in text]
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert "kappatune" in card.data.tags
    return card


def test_of_a_run(saved_olmoe, tmp_path, capsys):
    result = train(tmp_path, saved_olmoe, env={"HF_TOKEN": "hf_secret"})
    card = read(tmp_path / "out", tmp_path, saved_olmoe)
    measured = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert card.data.library_name == "peft" and card.data.base_model is None
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert found["the task's test rows", "accuracy"] == measured["task"]["after"]
    ((name, control),) = measured["control"].items()
    assert found[f"control: {name}", "loss"] == control["loss_after"]
    for unit in result.selection.units:
        assert f"{unit.kappa:.4g}" in card.text or len(result.selection.units) > 3
    assert f"{control['loss_after']:.4f}" in card.text
    assert "forgetting.png" in card.text and (tmp_path / "out" / "forgetting.png").is_file()
    assert "learning_rate" in card.text and "hf_secret" not in card.text
    assert all(words in card.text for words in ("import kappatune_plugin", "kappatune merge", "vllm serve"))


def test_results_are_those_of_the_weights_that_were_kept(tmp_path):
    measured = {
        "control": {"wiki": {"loss_after": 4.2, "loss_before": 4.0, "kl_after": 0.1}},
        "task": {"metric": "accuracy", "before": 0.5, "after": 0.9, "examples": 10},
        "kept": {"wiki_loss": 4.1, "task_accuracy": 0.8},
    }
    (tmp_path / "forgetting.json").write_text(json.dumps({"format": 1, **measured}))
    write_card(tmp_path, KappaTuneConfig(k=3, task_type="CAUSAL_LM").to_dict())
    assert [each.metric_value for each in read(tmp_path).data.eval_results] == [0.8, 4.1]


def test_of_plain_trainers(saved_olmoe, tmp_path):
    args = {**ON_CPU, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    rows = Dataset.from_list([{"prompt": "the cat", "completion": " sat"}] * 4)
    config = KappaTuneConfig(k=3, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        str(saved_olmoe), SFTConfig(str(tmp_path / "sft"), **args), train_dataset=rows, peft_config=config
    )
    trainer.train()
    for folder in (tmp_path / "sft", tmp_path / "sft" / "checkpoint-1"):
        assert "κ" in read(folder, saved_olmoe).text
    assert "learning_rate: 0.01" in read(tmp_path / "sft").text
    trainer.save_model(str(tmp_path / "sft"))
    assert "learning_rate: 0.01" in read(tmp_path / "sft").text


def test_of_a_toolkit(saved_olmoe, tmp_path):
    """Axolotl and LLaMA-Factory call `create_model_card` of transformers' Trainer after saving."""
    model = new_adapter(AutoModelForCausalLM.from_pretrained(saved_olmoe), {"k": 3})
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[]))
    trainer.save_model()
    read(tmp_path / "out", saved_olmoe)
    trainer.create_model_card(model_name="mine", dataset_tags=["x"], tags=["axolotl"])
    assert "κ" in read(tmp_path / "out", saved_olmoe).text


def test_this_package_may_be_imported_before_the_trainers():
    """`transformers.trainer` imports peft, and our method with it, before it has a Trainer."""
    code = "import kappatune_plugin, transformers, trl\n"
    code += "assert [each.create_model_card.__wrapped__ for each in (transformers.Trainer, trl.SFTTrainer)]"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_persons_card_stays(saved_olmoe, tmp_path):
    model = new_adapter(AutoModelForCausalLM.from_pretrained(saved_olmoe), {"k": 3})
    (tmp_path / "README.md").write_text("# My own words\n")
    model.save_pretrained(tmp_path)
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])).create_model_card()
    assert (tmp_path / "README.md").read_text() == "# My own words\n"


def test_names_of_the_hub_are_given(tmp_path):
    config = KappaTuneConfig(k=3, base_model_name_or_path="allenai/OLMoE-1B-7B-0924", task_type="CAUSAL_LM")
    recipe = {"data": {"train": {"path": "org/rows"}}, "hub_token": "hf_secret", "output_dir": "/srv/a/out"}
    write_card(tmp_path, config.to_dict(), settings=recipe)
    card = read(tmp_path)
    assert card.data.base_model == "allenai/OLMoE-1B-7B-0924" and card.data.datasets == ["org/rows"]
    assert "hf_secret" not in card.text and "/srv" not in card.text
