"""`adapter: lora` in a recipe: plain LoRA where PEFT can train what is selected, pairs of our own beside experts."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.loops import logits
from helpers.recipes import CONTROL, ROWS, write_rows
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.training import losses, train
from kappatune_plugin import KappaTuneError, Selection
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft
from kappatune_plugin.study.session import Asked, compare_session

RECIPES = Path(__file__).parents[2] / "recipes"
PAIRS = {"adapter": "lora", "r": 2, "k": 3}
EXPERTS = {**PAIRS, "include": ["*.experts.*"]}
ATTENTION = {**PAIRS, "include": ["*attn*"]}


def owners(adapter: Path) -> set[str]:
    return {key.partition(".lora_")[0].partition(".kappatune_values")[0] for key in load_file(adapter)}


@pytest.mark.parametrize(("kappatune", "method"), [(ATTENTION, "LORA"), (EXPERTS, "KAPPATUNE")])
def test_a_run_keeps_its_limit_and_says_what_it_trained(saved_olmoe, tmp_path, capsys, kappatune, method):
    forgetting = {"control": "self", "samples": 24, "max_length": 24, "max_delta": 0.5}
    held = json.dumps({"path": str(tmp_path / "test.jsonl")})
    result = train(tmp_path, saved_olmoe, "--data.validation", held, kappatune=kappatune, forgetting=forgetting)
    out, shown = tmp_path / "out", capsys.readouterr().out
    selection = Selection.load(out / "selection.json")
    numbers = 2 * sum(sum(unit.shape) for unit in selection.units)
    assert len(selection.units) == 3 and f"trainable params: {numbers:,}" in shown
    assert PeftConfig.from_pretrained(str(out)).peft_type.value == method
    assert len(owners(out / "adapter_model.safetensors")) == 3
    assert json.loads((out / "interpolation.json").read_text())["limit"] == 0.5
    card = (out / "README.md").read_text()
    assert f"a low-rank pair (r = 2) beside 3 of its weight matrices, {numbers:,} numbers" in card
    assert ("no plain LoRA adapter" in card) == (method == "KAPPATUNE")
    assert ("import kappatune_plugin" in card) == (method == "KAPPATUNE")
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, out)
    torch.testing.assert_close(logits(loaded), logits(result.trainer.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kappatune", [ATTENTION, EXPERTS])
def test_a_resumed_run_is_the_uninterrupted_one_and_another_selection_is_refused(saved_olmoe, tmp_path, kappatune):
    settings = {"kappatune": kappatune, "forgetting": None, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, saved_olmoe, **settings)
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2"), "output_dir": str(tmp_path / "again")}
    again = train(tmp_path, saved_olmoe, **settings, **resume)
    assert losses(again.trainer)[-2:] == losses(whole.trainer)[-2:]
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    other = {**settings, "kappatune": {**kappatune, "order": "highest"}, "output_dir": str(tmp_path / "other")}
    with pytest.raises(KappaTuneError, match="another selection than this run: 3 weights only in the checkpoint"):
        train(tmp_path, saved_olmoe, **other, resume_from_checkpoint=resume["resume_from_checkpoint"])


def test_k_auto_takes_back_whole_matrices_only(saved_olmoe, tmp_path):
    with pytest.raises(KappaTuneError, match="adapter: lora needs a number for k"):
        train(tmp_path, saved_olmoe, kappatune={"adapter": "lora", "k": "auto"})


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    """A tiny DeepSeek-V2 with its tokenizer."""
    folder = tmp_path_factory.mktemp("deepseek")
    tiny_model("deepseek_v2", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_words(model: Path, folder: Path, **settings) -> list[str]:
    """Overrides of the recipes: a tiny model, local data, two steps on a CPU."""
    rows = [{"text": f"{row['text']} " * 40, "label": row["label"]} for row in ROWS]
    changes = {
        "model_name_or_path": str(model),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "kappatune.r": 2,
        "data.train": {"path": str(write_rows(folder / "train.jsonl", rows))},
        "data.test": {"path": str(write_rows(folder / "test.jsonl", rows[:4]))},
        "forgetting.control": {"path": str(write_rows(folder / "control.jsonl", CONTROL))},
        **settings,
    }
    return [word.strip('"') for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]


@pytest.mark.parametrize(
    ("name", "trained"), [("deepseek_v2_lite_imdb", 3), ("deepseek_v2_lite_imdb_lora", None)], ids=("lowest", "uniform")
)
def test_the_papers_second_experiment_on_a_tiny_model(deepseek, tmp_path, name, trained):
    settings = {"output_dir": str(tmp_path / "out"), "disable_tqdm": True, "report_to": "none"}
    settings |= {"kappatune.k": trained} if trained else {}
    result = run_sft(load_recipe(RECIPES / f"{name}.yaml", tiny_words(deepseek, tmp_path, **settings)))
    model = result.trainer.model
    pairs = {each for each, value in model.named_parameters() if value.requires_grad}
    assert len(pairs) == 2 * len(result.selection.units) and all("lora_" in each for each in pairs)
    kinds = {unit.name.split(".")[-2] for unit in result.selection.units}
    if trained:
        assert len(result.selection.units) == trained and all(
            ".experts." in unit.name for unit in result.selection.units
        )
    else:
        config = model.config
        experts = (config.num_hidden_layers - config.first_k_dense_replace) * config.n_routed_experts
        assert kinds == {"q_proj", "up_proj", "down_proj"} and len(result.selection.units) > 2 * experts
    assert result.forgetting.to_dict()["task"]["metric"] == "accuracy"


def test_one_comparison_reads_both(deepseek, tmp_path):
    parts = ["*.q_proj.weight", "*.up_proj.weight", "*.down_proj.weight"]
    words = tiny_words(deepseek, tmp_path, **{"kappatune.k": 3, "kappatune.include": ["*.experts.*", *parts]})
    asked = Asked(RECIPES / "deepseek_v2_lite_imdb.yaml", words, 1, "2e-4", 1, 1, output_dir=tmp_path, scales="off")
    uniform = f"lowest:k=100%:adapter=lora:r=2:include={json.dumps(parts)}"
    content = compare_session(asked, f'lowest:k=3:include=["*.experts.*"],{uniform}')
    lowest, everything = content["methods"]
    assert sum(lowest["trains"].values()) == 3 and all(".experts." in kind for kind in lowest["trains"])
    assert {kind.split(".")[-1] for kind in everything["trains"]} == {"q_proj", "up_proj", "down_proj"}
    assert everything["trainable"]["mean"] > 5 * lowest["trainable"]["mean"]
