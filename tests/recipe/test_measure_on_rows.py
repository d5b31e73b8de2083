"""rank_by: gain_over_forgetting in a recipe, from the rows to the selection."""

import json

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers import training
from helpers.recipes import ROWS, tiny_recipe, write_recipe, write_rows
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaReport, KappaTuneConfig, KappaTuneError, scan, select
from kappatune_plugin.recipe import measure_on_rows
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.scanning.gain import GAIN, GainConfig, gain_over_forgetting, training_pairs, with_gain
from kappatune_plugin.weights.units import find_units

SETTINGS = {"examples": 4, "samples": 2, "max_length": 16, "batch_size": 2}
KAPPATUNE = {"k": 6, "rank_by": GAIN, "order": "highest", "gain": SETTINGS}


def train(folder, model, *overrides, **changes):
    return training.train(folder, model, *overrides, **{"kappatune": KAPPATUNE, "max_steps": 2, **changes})


def test_a_run_trains_what_gains_most(saved_olmoe, tmp_path):
    result = train(tmp_path, saved_olmoe)
    words = {0: "bad", 1: "good"}
    pairs = [(f"Say: {row['text']}\nTone:", f" {words[row['label']]}<eos>") for row in ROWS]
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype="float32")
    report = KappaReport.load(tmp_path / "out" / "kappa_report.json")
    names = {unit.name for unit in report.units}
    units = [unit for unit in find_units(base) if unit.name in names]
    expected = gain_over_forgetting(base, tiny_tokenizer(), pairs, GainConfig(**SETTINGS), units)
    for unit in report.units:
        assert unit.scores[GAIN] == pytest.approx(expected[unit.name], rel=1e-4), unit.name
    best = sorted(report.units, key=lambda unit: -expected[unit.name])[:6]
    assert [unit.name for unit in result.selection.units] == [unit.name for unit in best]
    assert result.selection.rank_by == GAIN and result.trainer.state.global_step == 2


def test_its_report_needs_no_measurement_again(saved_olmoe, tmp_path, monkeypatch):
    first = train(tmp_path, saved_olmoe)
    monkeypatch.setattr(measure_on_rows, "with_gain", None)
    given = ["--kappatune.report", str(tmp_path / "out" / "kappa_report.json"), "--output_dir", str(tmp_path / "again")]
    assert train(tmp_path, saved_olmoe, *given).selection.units == first.selection.units
    report = KappaReport.load(tmp_path / "out" / "kappa_report.json")
    assert select(report, k=6, rank_by=GAIN, order="highest").units == first.selection.units


def test_several_processes_are_refused(saved_olmoe, tmp_path, monkeypatch):
    from trl import SFTConfig

    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))
    with pytest.raises(KappaTuneError, match="measured in one process.*kappatune.report"):
        train(tmp_path, saved_olmoe)


def test_what_knows_no_rows_says_who_does(saved_olmoe, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype="float32")
    with pytest.raises(KappaTuneError, match="a scan can't measure it.*measured on a task's rows"):
        get_peft_model(model, KappaTuneConfig(k=6, rank_by=GAIN, order="highest"))
    report = scan(model)
    with pytest.raises(KappaTuneError, match="the report has no such values.*in Python.$"):
        select(report, k=6, rank_by=GAIN, order="highest")
    texts = Dataset.from_dict({"text": ["the cat sat"]})
    with pytest.raises(KappaTuneError, match="matrices of the kappa report are not in this model"):
        with_gain(report, tiny_model("llama"), tiny_tokenizer(), texts)


def test_which_end_of_the_ranking_has_to_be_said(saved_olmoe, tmp_path):
    for kappatune, words in (
        ({"k": 6, "rank_by": GAIN}, "kappatune.order is missing"),
        ({"k": 6, "rank_by": GAIN, "order": "highest", "scan_from": "elsewhere"}, "kappatune.scan_from: gain"),
        ({"k": 6, "gain": {"examples": 0}}, "kappatune.gain.examples: 0"),
        ({"k": 6, "gain": {"sampels": 3}}, "Did you mean 'samples'?"),
    ):
        recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe, kappatune=kappatune))
        with pytest.raises(KappaTuneError, match=words):
            load_recipe(recipe)


def test_rows_in_trls_formats():
    pairs = Dataset.from_dict({"prompt": ["a"], "completion": [" b"]})
    assert training_pairs(pairs, "<eos>") == [("a", " b<eos>")]
    texts = Dataset.from_dict({"text": ["a", "b<eos>"]})
    assert training_pairs(texts, "<eos>") == [("", "a<eos>"), ("", "b<eos>")]
    messages = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    with pytest.raises(KappaTuneError, match="prompt and completion or text; these have messages"):
        training_pairs(messages, "")


def test_text_rows_can_be_ranked_by(saved_olmoe, tmp_path):
    path = str(write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in ROWS]))
    result = train(tmp_path, saved_olmoe, data={"train": {"path": path}}, forgetting=None)
    scores = json.loads((tmp_path / "out" / "kappa_report.json").read_text())["units"][0]["scores"]
    assert scores.keys() == {GAIN} and len(result.selection.units) == 6
