"""The end-of-text token: out of the loss where asked, its share of the loss measured, and what the findings say."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.made_up_reports import twelve_units
from helpers.recipes import ROWS, tiny_recipe, write_recipe, write_rows
from helpers.training import train
from kappatune_plugin import KappaTuneError, select
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.diagnosis import findings
from kappatune_plugin.run.end_token import EndTokenCallback, EndTokenShare, labels_of

PACKED = {"packing": True, "max_length": 64, "packing_strategy": "bfd"}


def run(folder, model, *overrides, data=(), **changes):
    given = {**tiny_recipe(folder, model)["data"], **dict(data)}
    settings = {"forgetting": None, "max_steps": 2, "overwrite_output_dir": True, "data": given, **changes}
    return train(folder, model, *overrides, **settings)


def learned(trainer, name: str = "train_dataset") -> list[int]:
    rows = [labels_of(row, trainer.completion_only_loss) for row in getattr(trainer, name)]
    return sorted(label for labels in rows for label in labels if label != -100)


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": False}, PACKED])
def test_it_is_left_out_of_the_loss_and_nothing_else(saved_olmoe, tmp_path, settings):
    whole = run(tmp_path, saved_olmoe, eval_strategy="steps", eval_steps=2, **settings).trainer
    without = run(
        tmp_path, saved_olmoe, data={"end_token": False}, eval_strategy="steps", eval_steps=2, **settings
    ).trainer
    for name, count in (("train_dataset", 16), ("eval_dataset", 6)):
        one, other = learned(whole, name), learned(without, name)
        assert one.count(2) == count and other == [label for label in one if label != 2]
        assert getattr(whole, name)["input_ids"][:] == getattr(without, name)["input_ids"][:]


def test_text_mixed_in_keeps_its_end(saved_olmoe, tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": "yes no good"}] * 8)
    replay = {"share": 0.25, "from": {"path": "texts.jsonl"}}
    trainer = run(tmp_path, saved_olmoe, data={"end_token": False, "replay": replay}).trainer
    assert learned(trainer).count(2) == 5


@pytest.mark.parametrize("settings", [{}, PACKED, {"completion_only_loss": False}])
def test_its_share_is_that_of_a_plain_loop(saved_olmoe, tmp_path, settings):
    found = run(tmp_path, saved_olmoe, **settings).end_token
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved_olmoe)
    ends, others = [], []
    for row in ROWS:
        prompt = tokenizer(f"Say: {row['text']}\nTone:").input_ids
        ids = prompt + tokenizer(f" {['bad', 'good'][row['label']]}").input_ids + [2]
        with torch.no_grad():
            nats = -model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(prompt) if settings.get("completion_only_loss", True) else 1
        others += [nats[place - 1, ids[place]].item() for place in range(first, len(ids) - 1)]
        ends.append(nats[len(ids) - 2, 2].item())
    assert found.token == "<eos>"
    assert found.share == pytest.approx(sum(ends) / (sum(ends) + sum(others)), rel=1e-5)
    assert (found.nats, found.others) == pytest.approx((sum(ends) / 16, sum(others) / len(others)), rel=1e-5)


def test_measuring_changes_no_run_and_sees_the_base_after_a_resume(saved_olmoe, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    measured = run(tmp_path, saved_olmoe, **settings)
    one = load_file(tmp_path / "out" / "adapter_model.safetensors")
    resumed = run(tmp_path, saved_olmoe, "--resume_from_checkpoint", "true", **settings)
    assert resumed.end_token == measured.end_token
    monkeypatch.setattr(EndTokenCallback, "on_train_begin", lambda *_, **__: None)
    assert run(tmp_path, saved_olmoe, **settings).end_token is None
    other = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_labels_of_masks():
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert labels_of(row, completion_only=True) == [-100, 6, -100, 8]
    assert labels_of(row, completion_only=False) == [5, 6, -100, 8]
    assert labels_of({"input_ids": [5, 6], "labels": [-100, 6]}, True) == [-100, 6]


def test_the_finding_says_what_to_do():
    selection = select(twelve_units(), k=4)
    (found,) = findings([], selection, end_token=EndTokenShare("</s>", 0.62, 9.5, 5.1))
    for words in ("62%", "</s>", "9.50 nats", "5.10", "data.end_token: false", "chat template"):
        assert words in found, words
    assert findings([], selection, end_token=EndTokenShare("</s>", 0.2, 0.5, 1.0)) == []
    assert findings([], selection, end_token=None) == []


def test_a_run_says_it(saved_olmoe, tmp_path, capsys):
    run(tmp_path, saved_olmoe)
    assert "of the task's loss before training was the end-of-text token <eos>" in capsys.readouterr().out
    assert run(tmp_path, saved_olmoe, "--data.end_token", "false").end_token.share == 0
    assert "end-of-text token" not in capsys.readouterr().out


def test_only_true_and_false(saved_olmoe, tmp_path):
    recipe = tiny_recipe(tmp_path, saved_olmoe)
    recipe["data"]["end_token"] = "no"
    with pytest.raises(KappaTuneError, match="data.end_token: 'no' is not true or false"):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
