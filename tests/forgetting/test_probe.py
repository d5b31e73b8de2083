import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers.recipes import CONTROL, FACTS, write_rows
from helpers.tiny import tiny_tokenizer
from helpers.training import ON_CPU, losses
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.data.examples import ChoiceExample
from kappatune_plugin.forgetting import probe as probe_module
from kappatune_plugin.forgetting.callback import ForgettingCallback
from kappatune_plugin.forgetting.config import ForgettingConfig
from kappatune_plugin.forgetting.measures import (
    completion_kl,
    completion_loss,
    kl_to_base,
    label_accuracy,
    shown_as,
    token_loss,
)
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
from kappatune_plugin.forgetting.report import ForgettingReport
from kappatune_plugin.recipe.load_rows import task_examples
from kappatune_plugin.scanning.cache import Cache

TEXTS = [f"the cat {i} sat on the mat {j} times" for i in range(4) for j in range(4)]
TASK = [ChoiceExample("the cat", (" yes", " no"), answer) for answer in (0, 1, 0)]
RECALL = {"prompt": "{question}", "completion": "{answer}"}


def trainer(base: Path, output: Path, **settings) -> SFTTrainer:
    """With dropout in the attention: a measurement that draws random numbers shows in the losses."""
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attention_dropout=0.2),
        args=SFTConfig(str(output), **{**ON_CPU, "max_steps": 6, "save_strategy": "no", **settings}),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tiny_tokenizer(),
        peft_config=KappaTuneConfig(k=9),
    )


def probe(one: SFTTrainer, folder: Path, control="rows") -> ForgettingProbe:
    rows = {"path": str(write_rows(folder / "control.jsonl", CONTROL))}
    facts = {"path": str(write_rows(folder / "facts.jsonl", FACTS)), **RECALL}
    config = ForgettingConfig(control=rows if control == "rows" else control, recall=facts, samples=3, max_length=16)
    return ForgettingProbe.build(config, ForgettingData.load(config, TASK), one.model, tiny_tokenizer())


def measured(one: SFTTrainer, folder: Path, every: int = 0, control="rows") -> ForgettingCallback:
    callback = ForgettingCallback(probe(one, folder, control), one.args.output_dir, every)
    callback.trainer = one
    one.add_callback(callback)
    return callback


def test_measuring_does_not_disturb_the_run(saved_olmoe, tmp_path):
    plain = trainer(saved_olmoe, tmp_path / "a")
    plain.train()
    # after it: making a Trainer sets the seed
    watched = trainer(saved_olmoe, tmp_path / "b")
    measured(watched, tmp_path, every=1, control="self")
    watched.train()
    assert len(losses(plain)) == 6
    assert losses(watched) == losses(plain), "a step's loss is lost or changed by the measurement in it"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


def test_before_is_the_base_and_after_is_the_model(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    callback = measured(one, tmp_path)
    one.train()
    name, pieces = next(iter(callback.probe.controls.items()))
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    report = callback.report
    assert report.before[f"{name}_loss"] == pytest.approx(token_loss(base, pieces).nats_per_token, abs=1e-6)
    assert report.after[f"{name}_loss"] == pytest.approx(token_loss(one.model, pieces).nats_per_token, abs=1e-6)
    assert report.after[f"{name}_kl"] == pytest.approx(kl_to_base(one.model, pieces), abs=1e-6)
    assert report.after[f"{name}_loss"] != report.before[f"{name}_loss"]
    assert report.after[f"{name}_ppl"] == pytest.approx(math.exp(report.after[f"{name}_loss"]))


def test_logged_as_the_trainers_own_metrics(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    callback = measured(one, tmp_path, every=2)
    one.train()
    logged = [entry for entry in one.state.log_history if "forgetting/control_loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4, 6]
    assert logged[0]["forgetting/control_loss"] == callback.report.before["control_loss"]
    assert {"forgetting/control_ppl", "forgetting/task_accuracy", "forgetting/recall"} < logged[1].keys()
    assert {"forgetting/control_kl", "forgetting/task_kl"} < logged[3].keys()


def test_file_is_as_documented(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    callback = measured(one, tmp_path, every=4)
    one.train()
    content = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert content.keys() == {"format", "control", "task", "recall", "steps"}
    assert content["format"] == 1
    assert content["control"]["control"] == {
        "loss_before": callback.report.before["control_loss"],
        "loss_after": callback.report.after["control_loss"],
        "ppl_before": callback.report.before["control_ppl"],
        "ppl_after": callback.report.after["control_ppl"],
        "kl_after": callback.report.after["control_kl"],
    }
    assert content["task"]["metric"] == "accuracy"
    right = [(example.prompt, example.choices[example.answer]) for example in TASK]
    assert content["task"]["kl_after"] == pytest.approx(completion_kl(one.model, tiny_tokenizer(), right))
    assert content["recall"] | {"before": 0, "after": 0} == {
        "metric": "exact_match",
        "facts": 2,
        "before": 0,
        "after": 0,
    }
    assert [step["step"] for step in content["steps"]] == [4]


def test_steps_of_an_interrupted_run_are_kept(saved_olmoe, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(saved_olmoe, tmp_path / "whole", **settings)
    measured(whole, tmp_path, every=1)
    whole.train()
    resumed = trainer(saved_olmoe, tmp_path / "whole", **settings)
    callback = measured(resumed, tmp_path, every=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    steps = json.loads((tmp_path / "whole" / "forgetting.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert callback.report.before["control_loss"] == pytest.approx(
        whole.state.log_history[0]["forgetting/control_loss"]
    )


def test_another_task_is_asked_by_its_labels(saved_olmoe, tmp_path):
    rows = [{"text": f"the cat sat {i}", "label": i % 2} for i in range(6)]
    path = str(write_rows(tmp_path / "other.jsonl", rows))
    asked = {"path": path, "prompt": "{text}", "completion": " {label}", "labels": {0: "no", 1: "yes"}}
    config = ForgettingConfig(recall=asked, max_samples=5)
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    probe = ForgettingProbe.build(config, ForgettingData.load(config), model, tiny_tokenizer())
    examples = [ChoiceExample(row["text"], (" no", " yes"), row["label"]) for row in rows[:5]]
    assert probe.facts == examples and probe.cost() == "5 questions"
    accuracy = label_accuracy(model, tiny_tokenizer(), examples)
    assert probe.measure(model) == {"recall": accuracy}
    report = probe.new_report()
    report.before = report.after = {"recall": accuracy}
    assert report.to_dict()["recall"] == {
        "metric": "accuracy",
        "facts": 5,
        "before": accuracy,
        "after": accuracy,
    }
    assert report.rows() == [("another task: accuracy (5 examples)", "recall", 5)]
    with pytest.raises(KappaTuneError, match="quote the word of 1"):
        ForgettingConfig(recall={**asked, "labels": {0: "a", 1: True}})


def test_a_share_has_its_interval_and_what_the_most_frequent_answer_gets():
    """Wilson's interval, by its formula."""
    report = ForgettingReport([], "accuracy", 0, examples=200, majority=0.62)
    report.before, report.after = {"task_accuracy": 0.5}, {"task_accuracy": 0.9, "task_kl": 0.0}
    z, n, p = 1.959964, 200, 0.9
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    task = report.to_dict()["task"]
    assert task["interval_after"] == pytest.approx([(middle + s * half) / (1 + z * z / n) for s in (-1, 1)], abs=1e-4)
    assert task["examples"] == 200 and task["majority"] == 0.62
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table())
    shown = capture.get()
    assert "task accuracy (200 examples)" in shown and "90.0% [85, 93]" in shown
    assert "Always the most frequent answer: 62.0%" in " ".join(shown.split())


def test_table_shows_before_after_and_change(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    callback = measured(one, tmp_path)
    callback.report.before = {"task_accuracy": 0.5, "recall": 1.0, "control_loss": 2.0, "control_ppl": 7.389}
    callback.report.after = {
        "task_accuracy": 0.75,
        "recall": 0.5,
        "control_loss": 2.25,
        "control_ppl": 9.488,
        "control_kl": 0.125,
        "task_kl": 1.5,
    }
    console = Console(width=100)
    with console.capture() as capture:
        console.print(callback.report.table())
    shown = capture.get()
    for line in (["accuracy", "50.0%", "75.0%", "+25.0 points"], ["recall of 2 facts", "100.0%", "50.0%", "-50.0"]):
        assert any(all(word in row for word in line) for row in shown.splitlines()), line
    assert any(all(word in row for word in ("loss", "2.000", "2.250", "+0.250")) for row in shown.splitlines())
    for kl in (("control: KL", "0.1250"), ("task: KL", "1.5000")):
        assert any(all(word in row for word in kl) for row in shown.splitlines()), kl
    assert callback.report.delta(callback.report.after) == 0.25
    assert callback.report.delta({"control_loss": math.nan}) == math.inf


def test_a_task_without_labels_is_measured_by_its_loss(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    data = ForgettingData(task=[("the cat", " sat"), ("yes", " no")])
    found = ForgettingProbe.build(ForgettingConfig(), data, one.model, tiny_tokenizer()).measure(one.model)
    assert found.keys() == {"task_loss"} and 0 < found["task_loss"] < 20


def test_a_task_can_be_measured_by_what_the_model_writes(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "out")
    config = ForgettingConfig(generate={"max_new_tokens": 4})
    data = ForgettingData.load(config, [("the cat", " #### 5"), ("yes", " The answer is: 3")])
    built = ForgettingProbe.build(config, data, one.model, tiny_tokenizer())
    assert built.measure(one.model) == {"task_answer_accuracy": 0.0}
    assert built.measure(one.model, quick=True) == {}
    with pytest.raises(KappaTuneError, match="no task to write answers to"):
        ForgettingData.load(config, TASK)


def test_a_control_may_name_its_own_column(tmp_path):
    one = str(write_rows(tmp_path / "a.jsonl", [{"text": "the cat"}]))
    other = str(write_rows(tmp_path / "b.jsonl", [{"story": "the mat"}]))
    config = ForgettingConfig(control={"a": {"path": one}, "b": {"path": other, "text_column": "story"}})
    assert ForgettingData.load(config).controls == {"a": ["the cat"], "b": ["the mat"]}


def test_several_controls_and_max_samples(saved_olmoe, tmp_path):
    path = str(write_rows(tmp_path / "a.jsonl", CONTROL))
    config = ForgettingConfig(control={"one": {"path": path}, "own": "self"}, max_samples=1, samples=2, max_length=8)
    one = trainer(saved_olmoe, tmp_path / "out")
    data = ForgettingData.load(config)
    assert data.controls == {"one": [CONTROL[0]["text"]], "own": None}
    built = ForgettingProbe.build(config, data, one.model, tiny_tokenizer())
    assert len(built.controls["own"]) == 2
    assert max(len(piece) for pieces in built.controls.values() for piece in pieces) <= 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"control": "sefl"}, ["'sefl'", "Did you mean 'self'?"]),
        ({"control": []}, ["control: []"]),
        ({"control": {"name": {"split": "test"}}}, ["control.name.path is missing"]),
        ({"every": -1}, ["every: -1"]),
        ({"every": True}, ["every: True"]),
        ({"max_length": 1}, ["max_length: 1", "from 2 on"]),
        ({"batch_size": 0, "samples": 1.5}, ["batch_size: 0", "samples: 1.5"]),
        ({"recall": {"path": "x.jsonl"}}, ["prompt is missing", "completion is missing"]),
        ({"recall": "facts.jsonl"}, ["not a mapping"]),
        ({"recall": {"path": "x", "prompt": "{a", "completion": "{b}"}}, ["recall.prompt", "{a"]),
        ({"text_column": 3}, ["text_column: 3"]),
        ({"control": "task.jsonl"}, ["Write {path: task.jsonl}"]),
        ({"control": {"task": {"path": "x"}}}, ["control: the name 'task' stands for the task"]),
        ({"long_texts": "cut"}, ["long_texts: 'cut'", "split, truncate"]),
        ({"max_delta": 0}, ["max_delta: 0", "Write max_delta: 0.05"]),
        ({"max_delta": True}, ["max_delta: True"]),
        ({"generate": 3}, ["generate: ", "found 3", "max_new_tokens"]),
        ({"generate": {"max_new": 3, "batch_size": 0}}, ["unknown key 'generate.max_new'", "generate.batch_size: 0"]),
        ({"lm_eval": "hellaswag"}, ["lm_eval: 'hellaswag'", "[hellaswag, arc_challenge]"]),
        ({"lm_eval": {"task": ["x"]}}, ["unknown key 'lm_eval.task'", "tasks is missing"]),
        ({"lm_eval": {"tasks": ["x"], "limit": 0}}, ["lm_eval.limit: 0"]),
    ],
)
def test_blocks_that_cannot_be_right(values, words):
    with pytest.raises(KappaTuneError) as error:
        ForgettingConfig(**values)
    for word in words:
        assert word in str(error.value)


def test_nothing_to_measure_and_missing_columns_are_errors(tmp_path):
    with pytest.raises(KappaTuneError, match="nothing to measure"):
        ForgettingData.load(ForgettingConfig())
    path = str(write_rows(tmp_path / "a.jsonl", [{"sentence": "x"}]))
    with pytest.raises(KappaTuneError, match="no column 'text', only sentence"):
        ForgettingData.load(ForgettingConfig(control={"path": path}))
    recall = {"path": path, "prompt": "{question}", "completion": "{answer}"}
    with pytest.raises(KappaTuneError, match="question"):
        ForgettingData.load(ForgettingConfig(recall=recall))


CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant: {% endif %}"


def test_conversations_are_measured_by_their_last_answer(saved_olmoe, tmp_path):
    question, answer = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "yes"}
    rows = Dataset.from_list([{"messages": [question, answer]}] * 2)
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    config, tokenizer = ForgettingConfig(), tiny_tokenizer()
    data = ForgettingData.load(config, task_examples({"train": "x"}, rows))
    with pytest.raises(KappaTuneError, match="no chat template"):
        ForgettingProbe.build(config, data, model, tokenizer)
    tokenizer.chat_template = CHAT
    found = ForgettingProbe.build(config, data, model, tokenizer)
    assert found.metric == "loss" and found.task == [("user: the cat\nassistant: ", "yes\n")] * 2
    expected = completion_loss(model, tokenizer, [("user: the cat\nassistant: ", "yes\n")])
    assert found.measure(model)["task_loss"] == pytest.approx(expected)


def test_labels_of_conversations_are_compared_through_the_chat_template(saved_olmoe):
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in ("the cat", "a")]
    rows = Dataset.from_list([{"messages": chat} for chat in chats])
    data = {"train": "x", "labels": {"no": "no", "yes": "yes"}}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32), tiny_tokenizer()
    tokenizer.chat_template = CHAT
    config = ForgettingConfig()
    loaded = ForgettingData.load(config, task_examples(data, rows))
    probe = ForgettingProbe.build(config, loaded, model, tokenizer)
    asked = [f"user: {text}\nassistant: " for text in ("the cat", "a")]
    assert probe.metric == "accuracy" and probe.new_report().majority == 1
    assert probe.task == [ChoiceExample(prompt, ("no\n", "yes\n"), 1) for prompt in asked]
    chosen = [min(("no\n", "yes\n"), key=lambda w, p=p: summed(model, tokenizer, p, w)) == "yes\n" for p in asked]
    assert probe.measure(model)["task_accuracy"] == sum(chosen) / 2
    with pytest.raises(KappaTuneError, match="row 0 of data.test is 'yes', which is none of 'no', 'maybe'"):
        task_examples({"train": "x", "labels": {0: "no", 1: "maybe"}}, rows)
    (pair,) = task_examples(data, Dataset.from_list([{"prompt": "a", "completion": "no"}]))
    assert pair == ChoiceExample("a", ("no", "yes"), 0)


def summed(model, tokenizer, prompt: str, completion: str) -> float:
    """Nats of the completion."""
    ids = tokenizer(prompt).input_ids
    whole = ids + tokenizer(completion, add_special_tokens=False).input_ids
    with torch.no_grad():
        found = model(torch.tensor([whole])).logits.log_softmax(-1)[0, :-1]
    return -sum(found[at - 1, whole[at]].item() for at in range(len(ids), len(whole)))


def test_test_rows_that_cannot_be_measured_are_refused():
    data = {"train": "x"}
    assert task_examples(data, Dataset.from_list([{"prompt": "a", "completion": " b"}])) == [("a", " b")]
    with pytest.raises(KappaTuneError, match="they have no completion"):
        task_examples(data, Dataset.from_list([{"text": "a b"}]))
    assert task_examples(data, Dataset.from_list([{"text": "a b"}]), evaluated=True) == []
    with pytest.raises(KappaTuneError, match="row 0 doesn't end with an answer"):
        task_examples(data, Dataset.from_list([{"messages": [{"role": "user", "content": "a"}] * 2}]))


def test_control_texts_have_to_be_texts(tmp_path):
    rows = str(write_rows(tmp_path / "numbers.jsonl", [{"text": 1}, {"text": 2}]))
    with pytest.raises(KappaTuneError, match="'text' holds 1, which is no text"):
        ForgettingData.load(ForgettingConfig(control={"path": rows}))
    (tmp_path / "latin.txt").write_bytes("caf\xe9 and more".encode("latin-1"))
    with pytest.raises(KappaTuneError, match="latin.txt' isn't UTF-8 text"):
        ForgettingData.load(ForgettingConfig(control={"path": str(tmp_path / "latin.txt")}))


def test_a_measurement_shows_a_bar_with_its_name_and_nothing_else_does(saved_olmoe, capsys):
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe)
    capsys.readouterr()
    token_loss(model, [[1, 2, 3]] * 20, 4, "wikitext")
    assert "wikitext" not in capsys.readouterr().err
    with shown_as("base"):
        token_loss(model, [[1, 2, 3]] * 20, 4, "wikitext")
    assert "base: wikitext:" in capsys.readouterr().err


def test_what_is_known_of_the_base_is_not_measured_again(saved_olmoe, tmp_path, monkeypatch):
    cache, model = Cache(tmp_path / "cache"), AutoModelForCausalLM.from_pretrained(saved_olmoe)
    one = trainer(saved_olmoe, tmp_path / "out")
    found = probe(one, tmp_path)
    remember = partial(cache.remembered, "the base")
    first = found.measure(model, remember=remember)
    assert first == found.measure(model) and len(first) == 5
    with monkeypatch.context() as patched:
        patched.setattr(probe_module, "token_loss", None)
        assert found.measure(model, remember=remember) == first
        with pytest.raises(TypeError):
            found.measure(model, remember=partial(cache.remembered, "another"))
    # of what a killed measurement had, all but the last is known
    changed = replace(found, facts=found.facts[:1])
    patched = changed.measure(model, remember=remember)
    assert patched["control_loss"] == first["control_loss"] and patched["recall"] in (0, 1)


def test_control_texts_are_spread_over_the_file_or_run_on(tmp_path):
    rows = [{"text": f"text {position}"} for position in range(100)]
    spec = {"path": str(write_rows(tmp_path / "many.jsonl", rows))}
    loaded = ForgettingData.load(ForgettingConfig(control=spec, max_samples=5))
    assert next(iter(loaded.controls.values())) == [f"text {position}" for position in (0, 20, 40, 60, 80)]
    run_on = ForgettingData.load(ForgettingConfig(control=spec, max_samples=5, running_text=True))
    assert next(iter(run_on.controls.values())) == ["\n\n".join(row["text"] for row in rows)]
