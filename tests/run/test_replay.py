"""Text mixed into training: what is in the loss, token by token, and where the text comes from."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import kappatune_plugin.run.replay as replay_module
from helpers.rank_jobs import write_replay
from helpers.ranks import run_ranks
from helpers.recipes import ROWS, tiny_recipe, write_recipe, write_rows
from helpers.training import train
from kappatune_plugin import KappaTuneError
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.forgetting.measures import sample_base
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.end_token import labels_of
from kappatune_plugin.run.replay import batch_seed, mixed

REPLAY = {"share": 0.25, "max_length": 12, "batch_size": 4}
TEXTS = [{"text": f"yes {i} good no bad"} for i in range(9)]


def run(folder, model, *overrides, replay=REPLAY, data=None, **changes):
    given = {**(data or tiny_recipe(folder, model)["data"]), **({"replay": replay} if replay else {})}
    settings = {"forgetting": None, "max_steps": 2, "overwrite_output_dir": True, "data": given, **changes}
    return train(folder, model, *overrides, **settings)


def no_writing(monkeypatch):
    def refuse(*_):
        raise AssertionError("the base writes")

    monkeypatch.setattr(replay_module, "sample_base", refuse)


def written(folder) -> list[list[int]]:
    rows = json.loads((folder / "out" / "replay.json").read_text())["rows"]
    return [[int(token) for token in row["ids"].split()] for row in rows]


def task_rows(model, completion_only: bool = True) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the task, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in ROWS:
        prompt = tokenizer(f"Say: {row['text']}\nTone:").input_ids
        answer = tokenizer(f" {['bad', 'good'][row['label']]}").input_ids + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + answer if completion_only else prompt + answer
        found.append((prompt + answer, labels))
    return found


def pieces(trainer) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each text, out of packed rows too."""
    found = []
    for row in trainer.train_dataset:
        labels = labels_of(row, trainer.completion_only_loss)
        ends = itertools.accumulate(row.get("seq_lengths") or [len(labels)])
        for start, end in itertools.pairwise([0, *ends]):
            found.append((row["input_ids"][start:end], labels[start:end]))
    return found


PACKED = {"packing": True, "max_length": 64, "packing_strategy": "bfd"}


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": False}, {"max_length": 64}, PACKED])
def test_every_label(saved_olmoe, tmp_path, settings):
    result = run(tmp_path, saved_olmoe, **settings)
    texts = [(ids, ids) for ids in written(tmp_path)]
    assert len(texts) == 5 and all(2 <= len(ids) <= 12 for ids, _ in texts)
    task = task_rows(saved_olmoe, settings.get("completion_only_loss", True))
    assert sorted(pieces(result.trainer)) == sorted(task + texts)


@pytest.mark.parametrize("settings", [{}, PACKED])
def test_every_label_of_a_batch(saved_olmoe, tmp_path, settings):
    """As the collator gives them: the model predicts no first token and no padding, and all else of a text."""
    trainer = run(tmp_path, saved_olmoe, **settings).trainer
    texts = written(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
    learned = [label for label in batch["labels"][:, 1:].flatten().tolist() if label != -100]
    expected = [token for ids in texts for token in ids[1:]]
    expected += [label for _, labels in task_rows(saved_olmoe) for label in labels if label != -100]
    assert sorted(learned) == sorted(expected)


def test_plain_text_rows_and_rows_that_are_cut(saved_olmoe, tmp_path):
    rows = [{"text": row["text"]} for row in ROWS]
    data = {"train": {"path": str(write_rows(tmp_path / "plain.jsonl", rows))}}
    result = run(tmp_path, saved_olmoe, "--max_length", "7", data=data)
    tokenizer = AutoTokenizer.from_pretrained(saved_olmoe)
    task = [(tokenizer(row["text"]).input_ids + [tokenizer.eos_token_id])[:7] for row in ROWS]
    texts = written(tmp_path)
    assert max(map(len, texts)) <= 7 and len(texts) == 5
    assert sorted(pieces(result.trainer)) == sorted((ids, ids) for ids in task + texts)


def test_chats(saved_olmoe, tmp_path):
    """A chat template's rows keep the labels that they have without replay."""
    template = "{% for message in messages %}{{ message['role'] + message['content'] + '<eos>' }}{% endfor %}"
    model = shutil.copytree(saved_olmoe, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "yes no"}, {"role": "assistant", "content": "good"}]
    rows = [{"prompt": turns[:1], "completion": turns[1:]}] * 6
    data = {"train": {"path": str(write_rows(tmp_path / "chat.jsonl", rows))}}
    plain = pieces(run(tmp_path, model, data=data, replay=None).trainer)
    mixed_in = pieces(run(tmp_path, model, data=data).trainer)
    texts = [(ids, ids) for ids in written(tmp_path)]
    assert len(plain) == 6 and len(texts) == 2 and sorted(mixed_in) == sorted(plain + texts)


def test_texts_lie_evenly_between_rows_that_keep_their_order():
    task = Dataset.from_dict({"input_ids": [[n, n] for n in range(12)], "labels": [[-100, n] for n in range(12)]})
    both, texts = mixed(task, [[90, 91], [92, 93, 94], [95, 96], [97, 98]], SFTConfig(packing=False, bf16=False))
    first = [ids[0] for ids in both["input_ids"]]
    assert [n for n in first if n < 90] == list(range(12))
    places = [place for place, n in enumerate(first) if n >= 90]
    assert places == [1, 5, 9, 13] or {b - a for a, b in itertools.pairwise(places)} == {4}
    assert texts["labels"][:] == [[90, 91], [92, 93, 94], [95, 96], [97, 98]]


def test_masks_of_older_trl_are_ones():
    task = Dataset.from_dict({"input_ids": [[1, 2, 3]], "completion_mask": [[0, 0, 1]], "assistant_masks": [[0, 1, 1]]})
    both, _ = mixed(task, [[5, 6]], SFTConfig(packing=False, bf16=False))
    rows = sorted(both, key=lambda row: row["input_ids"])
    assert rows[1] == {"input_ids": [5, 6], "completion_mask": [1, 1], "assistant_masks": [1, 1]}
    assert rows[0]["completion_mask"] == [0, 0, 1]


def test_what_it_costs_is_said(saved_olmoe, tmp_path, capsys):
    run(tmp_path, saved_olmoe)
    task, texts = task_rows(saved_olmoe), written(tmp_path)
    read, more = sum(len(ids) for ids, _ in task), sum(map(len, texts))
    learned = sum(label != -100 for _, labels in task for label in labels)
    words = capsys.readouterr().out
    assert f"5 texts of {more} tokens, which the base wrote, beside the task's {read} tokens, {learned} of" in words
    assert f"{(read + more) / read:.2f} times as many" in words
    assert f"{more / (more + learned):.0%} of the tokens in the loss are replay" in words


def test_the_base_writes_without_the_adapter_and_not_what_is_measured(saved_olmoe, tmp_path):
    run(tmp_path, saved_olmoe)
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved_olmoe)
    batches = [sample_base(model, tokenizer, 4, 12, batch_seed(0, batch), 4) for batch in range(2)]
    assert written(tmp_path) == [*batches[0], batches[1][0]]
    assert not set(map(tuple, written(tmp_path))) & set(map(tuple, sample_base(model, tokenizer, 5, 12, 0, 4)))


def test_nothing_is_written_twice(saved_olmoe, tmp_path, monkeypatch):
    run(tmp_path, saved_olmoe)
    first = written(tmp_path)
    shutil.rmtree(tmp_path / "out")
    asked = []
    monkeypatch.setattr(replay_module, "sample_base", lambda *given: asked.append(given[4]) or sample_base(*given))
    run(tmp_path, saved_olmoe)
    assert written(tmp_path) == first and asked == []
    # more of the same: only what is new
    run(tmp_path, saved_olmoe, "--data.replay.share", "0.5")
    assert (
        written(tmp_path)[:5] == first
        and len(written(tmp_path)) == 16
        and asked == [batch_seed(0, 2), batch_seed(0, 3)]
    )
    # another length, seed or base is other text
    for overrides in (["--data.replay.max_length", "9"], ["--data.replay.seed", "1"]):
        asked.clear()
        run(tmp_path, saved_olmoe, *overrides)
        assert len(asked) == 2, overrides
    other = shutil.copytree(saved_olmoe, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    changed = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    changed.save_pretrained(other)
    assert weights.keys() == load_file(other / "model.safetensors").keys()
    asked.clear()
    run(tmp_path, other)
    assert len(asked) == 2


def test_resumed_equals_uninterrupted(saved_olmoe, tmp_path, monkeypatch):
    """Though the cache is gone and the base would write something else."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    run(whole, saved_olmoe, **settings)
    run(parts, saved_olmoe, **settings)
    shutil.rmtree(parts / "out" / "checkpoint-6")
    monkeypatch.setenv("KAPPATUNE_CACHE", str(tmp_path / "empty"))
    no_writing(monkeypatch)
    run(parts, saved_olmoe, "--resume_from_checkpoint", "true", **settings)
    one, other = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # other settings are no continuation of those texts
    with pytest.raises(AssertionError, match="the base writes"):
        run(parts, saved_olmoe, "--resume_from_checkpoint", "true", "--data.replay.seed", "3", **settings)


@pytest.mark.distributed
def test_ranks_share_the_writing_and_train_on_the_same(saved_olmoe, tmp_path):
    arguments = {"model": str(saved_olmoe), "settings": {**REPLAY, "share": 0.5}}
    (one,) = run_ranks(write_replay, 1, output=str(tmp_path / "one"), cache=str(tmp_path / "a"), **arguments)
    two = run_ranks(write_replay, 2, output=str(tmp_path / "two"), cache=str(tmp_path / "b"), **arguments)
    assert one["rows"] == two[0]["rows"] == two[1]["rows"] and len(one["rows"]) == 64
    assert one["batches"] == 8 and [rank["batches"] for rank in two] == [4, 4]
    assert len(two[0]["losses"]) == 2 and two[0]["losses"] == two[1]["losses"]


def test_a_divided_model_writes_nothing_but_finds_what_was_written(saved_olmoe, tmp_path, monkeypatch):
    divided = SimpleNamespace(is_partitioned=lambda parameter: True, first_rank_loads=lambda: False)
    monkeypatch.setattr(replay_module, "shards", divided)
    with pytest.raises(KappaTuneError, match="no rank holds the whole model.*max_steps 1"):
        run(tmp_path, saved_olmoe)
    with monkeypatch.context() as whole:
        whole.setattr(divided, "is_partitioned", lambda parameter: False)
        run(tmp_path, saved_olmoe, "--max_steps", "1")
    no_writing(monkeypatch)
    assert len(run(tmp_path, saved_olmoe).trainer.train_dataset) == 21


def test_a_data_set_instead(saved_olmoe, tmp_path, monkeypatch):
    no_writing(monkeypatch)
    write_rows(tmp_path / "texts.jsonl", [*TEXTS, {"text": " "}])
    tokenizer = AutoTokenizer.from_pretrained(saved_olmoe)
    # a relative path starts at the recipe
    run(tmp_path, saved_olmoe, replay={"share": 0.25, "from": {"path": "texts.jsonl"}})
    possible = [tokenizer(row["text"]).input_ids + [tokenizer.eos_token_id] for row in TEXTS]
    first = written(tmp_path)
    assert len(first) == 5 and all(ids in possible for ids in first) and len(set(map(tuple, first))) == 5
    run(tmp_path, saved_olmoe, replay={"share": 0.25, "seed": 1, "from": {"path": "texts.jsonl"}})
    assert written(tmp_path) != first


@pytest.mark.parametrize(
    ("replay", "words"),
    [
        ({"share": 0.5, "from": {"path": "texts.jsonl"}}, ["gives 9 texts", "takes 16", "lower share"]),
        ({"share": 0.1, "from": {"path": "texts.jsonl", "text_column": "story"}}, ["no column 'story'", "only text"]),
        ({"share": 0.1, "from": {"path": "nothing.jsonl"}}, ["data.replay.from", "nothing.jsonl"]),
    ],
)
def test_data_sets_that_do_not_do(saved_olmoe, tmp_path, replay, words):
    write_rows(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(KappaTuneError) as error:
        run(tmp_path, saved_olmoe, replay=replay)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (0.25, ["data.replay: expected a mapping of share, from, max_length, seed, batch_size, found 0.25"]),
        ({"from": "self"}, ["data.replay.share is missing. Write `share: 0.25`"]),
        ({"share": 1}, ["data.replay.share: 1 is not a number below 1"]),
        ({"share": "a"}, ["share: 'a'"]),
        ({"share": 0.1, "form": "self"}, ["unknown key 'data.replay.form'. Did you mean 'from'?"]),
        ({"share": 0.1, "from": "selv"}, ["from: 'selv' is neither self nor a data set", "{path: selv}"]),
        ({"share": 0.1, "from": {"name": "x"}}, ["data.replay.from.path is missing"]),
        ({"share": 0.1, "max_length": 1, "batch_size": True}, ["max_length: 1", "batch_size: True"]),
    ],
)
def test_blocks_that_are_wrong(saved_olmoe, tmp_path, block, words):
    recipe = tiny_recipe(tmp_path, saved_olmoe)
    recipe["data"]["replay"] = block
    with pytest.raises(KappaTuneError) as error:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("share", "rows", "texts"), [(0.25, 300, 100), (0.5, 7, 7), (0.001, 10, 1), (0.2, 480, 120)])
def test_how_many_texts(share, rows, texts):
    assert ReplayConfig(share=share).texts(rows) == texts


def test_what_is_given_on_the_command_line_is_in_the_resolved_recipe(saved_olmoe, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe))
    write_rows(tmp_path / "texts.jsonl", TEXTS)
    recipe = load_recipe(path, ["--data.replay.share", "0.1", "--data.replay.from", "{path: texts.jsonl}"])
    assert recipe.replay == ReplayConfig(share=0.1, source={"path": str(tmp_path / "texts.jsonl")})
    assert load_recipe(path).replay is None
