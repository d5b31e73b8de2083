"""The lm-evaluation-harness on a task of three questions."""

import functools
import importlib.util
import json
import random
import sys

import numpy
import pytest
import torch
import yaml

from helpers.recipes import write_rows
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.data.examples import ChoiceExample
from kappatune_plugin.forgetting.config import ForgettingConfig
from kappatune_plugin.forgetting.harness import check_harness, run_harness
from kappatune_plugin.forgetting.measures import label_accuracy
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
from kappatune_plugin.forgetting.report import ForgettingReport

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
QUESTIONS = [{"question": f"the cat {i} sat", "answer": i % 2} for i in range(3)]
TASK = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": ["yes", "no"],
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the task in it; the harness' own tasks, thousands of files, aren't read."""
    from lm_eval import tasks

    rows = str(write_rows(tmp_path / "rows.jsonl", QUESTIONS))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": rows}}}
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    return str(tmp_path)


@installed
def test_agrees_with_our_own_accuracy_and_leaves_no_trace(folder):
    model, tokenizer = tiny_model("olmoe", vocab_size=300).train(), tiny_tokenizer()
    states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()
    found = run_harness(model, tokenizer, ["tiny_choice"], include_path=folder)
    examples = [ChoiceExample(row["question"], (" yes", " no"), row["answer"]) for row in QUESTIONS]
    assert found == {"lm_eval/tiny_choice/acc": pytest.approx(label_accuracy(model, tokenizer, examples))}
    assert model.training and random.getstate() == states[0]
    assert (numpy.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])


@installed
def test_measured_before_and_after_but_not_in_between(folder):
    model, tokenizer = tiny_model("olmoe", vocab_size=300), tiny_tokenizer()
    config = ForgettingConfig(lm_eval={"tasks": ["tiny_choice"], "include_path": folder, "limit": 2})
    probe = ForgettingProbe.build(config, ForgettingData.load(config), model, tokenizer)
    assert probe.measure(model, quick=True) == {}
    report = ForgettingReport([], None, 0)
    report.before = probe.measure(model)
    report.after = {"lm_eval/tiny_choice/acc": 0.25}
    value = report.before["lm_eval/tiny_choice/acc"]
    assert report.to_dict()["lm_eval"] == {"tiny_choice/acc": {"before": value, "after": 0.25}}
    assert value in (0, 0.5, 1) and json.dumps(report.to_dict())


@installed
def test_unknown_tasks_are_named_with_what_is_near(folder):
    with pytest.raises(KappaTuneError, match="no task 'tiny_chice'.*Did you mean tiny_choice"):
        check_harness(["tiny_choice", "tiny_chice"], include_path=folder)


@installed
@pytest.mark.slow
def test_knows_the_tasks_that_the_readme_names():
    check_harness(["hellaswag", "arc_challenge"])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = ForgettingConfig(lm_eval=["hellaswag"])
    with pytest.raises(KappaTuneError, match=r"pip install 'kappatune-plugin\[lm_eval\]'"):
        ForgettingProbe.build(config, ForgettingData.load(config), tiny_model("olmoe"), tiny_tokenizer())
