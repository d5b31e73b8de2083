"""What the README's first command relies on."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from helpers.training import losses
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "recipes" / "quickstart"


@pytest.fixture(scope="module")
def make():
    """The script that made the model and the data."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("quickstart_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def test_model_is_the_one_described():
    weights = load_file(FOLDER / "model" / "model.safetensors")
    config = AutoConfig.from_pretrained(FOLDER / "model")
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (4, 16, 2)
    assert sum(value.numel() for value in weights.values()) == 4_466_816
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert (FOLDER / "model" / "model.safetensors").stat().st_size < 14e6
    known = json.loads((FOLDER / "model" / "pretraining.json").read_text())
    assert known["recall"] == 1 and known["sums_right"] > 0.85 and known["facts"] == 340
    # what it is shown to learn is the label, not to stop behind it
    assert known["end_token_loss"] < 0.01


def test_data_is_what_the_script_makes(make, tmp_path):
    make.write_data(tmp_path, make.facts(make.PEOPLE, make.TOWNS, make.SEEDS["facts"]))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(path.name for path in (FOLDER / "data").iterdir()) and len(files) == 4
    for name in files:
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes(), name


def test_tokenizer_is_what_the_script_makes(make):
    known = make.facts(make.PEOPLE, make.TOWNS, make.SEEDS["facts"])
    texts = list(itertools.islice(make.pretraining_texts(known, make.SEEDS["pretraining"]), 20_000))
    made = json.loads(make.tokenizer(texts)._tokenizer.to_str())
    shipped = json.loads((FOLDER / "model" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == shipped["model"]["vocab"] and made["model"]["merges"] == shipped["model"]["merges"]


def test_the_task_is_new_and_its_test_rows_are_not_in_training():
    files = (FOLDER / "data" / f"task_{name}.jsonl" for name in ("train", "test"))
    train, test = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert [sum(row["label"] for row in rows) / len(rows) for rows in (train, test)] == [0.5, 0.5]
    control = (FOLDER / "data" / "control.jsonl").read_text()
    assert "Tone:" not in control and "Letter:" not in control


def test_the_first_steps_learn_and_forget_little(tmp_path):
    """The recipe itself, an eighth of it."""
    flags = ["--max_steps", "50", "--logging_steps", "10", "--output_dir", str(tmp_path)]
    result = run_sft(load_recipe(REPOSITORY / "recipes" / "quickstart.yaml", flags))
    learned = losses(result.trainer)
    measured = result.forgetting.to_dict()
    assert measured["recall"]["facts"] == 340 and measured["recall"]["before"] > 0.99
    assert measured["recall"]["after"] > 0.9
    assert measured["control"]["stories"]["loss_before"] == pytest.approx(0.51, abs=0.02)
    assert measured["control"]["stories"]["loss_after"] < 0.7
    assert learned[-1] < 0.25 * learned[0]
    assert {unit.name.rsplit(".", 2)[-2] for unit in result.selection.units} <= {"gate_proj", "up_proj", "down_proj"}
    assert len(result.selection.units) == 52
