import json

import pytest

from helpers.recipes import ROWS, write_rows
from kappatune_plugin import KappaTuneError
from kappatune_plugin.data.examples import choice_examples, pairs, prompt_completion
from kappatune_plugin.data.rows import load_all_rows, load_rows

PROMPT, COMPLETION, LABELS = "Say: {text}\nTone:", " {label}", {0: "bad", 1: "good"}


@pytest.fixture
def rows(tmp_path):
    return load_rows({"path": str(write_rows(tmp_path / "rows.jsonl", ROWS))}, "data.train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n'),
        ("rows.json", '[{"text": "a", "label": 1}, {"text": "b", "label": 0}]'),
        ("rows.csv", "text,label\na,1\nb,0\n"),
        ("rows.tsv", "text\tlabel\na\t1\nb\t0\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_rows(str(tmp_path / name), "data.train").to_list() == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
    ]


def test_text_files_give_a_row_a_paragraph(tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n\nthree\n")
    assert [row["text"].strip() for row in load_rows(str(tmp_path / "texts.txt"), "control")] == ["one\ntwo", "three"]


def test_part_of_a_split(rows, tmp_path):
    part = load_rows({"path": str(tmp_path / "rows.jsonl"), "split": "train[2:5]"}, "data.train")
    assert part.to_list() == ROWS[2:5]


def test_take_gives_the_first_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert load_rows({"path": str(path), "take": 3}, "data.train").to_list() == ROWS[:3]
    assert len(load_rows({"path": str(path), "take": 99}, "data.train")) == len(ROWS)
    # a folder is streamed, as a hub's data set is
    assert load_rows({"path": str(tmp_path), "take": 3}, "data.train").to_list() == ROWS[:3]


def test_several_data_sets_are_put_together(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": 1, "stars": 5}])
    other = write_rows(tmp_path / "other.jsonl", [{"label": 0, "text": "b"}, {"label": 1, "text": "c"}])
    rows = load_all_rows([str(one), {"path": str(other)}], "data.train")
    assert rows.to_list() == [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1}]
    stars = write_rows(tmp_path / "stars.jsonl", [{"stars": 3}])
    with pytest.raises(KappaTuneError, match="the 2 data sets have no column in common: stars; label, text"):
        load_all_rows([str(stars), str(other)], "data.train")
    with pytest.raises(KappaTuneError, match=r"data.train\[1\]: there is no file"):
        load_all_rows([str(one), "nowhere.jsonl"], "data.train")


def test_the_same_labels_under_other_names_are_put_together(tmp_path):
    from datasets import ClassLabel, Dataset

    for name, names in (("one", ["neg", "pos"]), ("other", ["1", "2"])):
        rows = Dataset.from_dict({"text": [name], "label": [1]})
        rows.cast_column("label", ClassLabel(names=names)).to_parquet(tmp_path / f"{name}.parquet")
    rows = load_all_rows([str(tmp_path / "one.parquet"), str(tmp_path / "other.parquet")], "data.train")
    assert rows.to_list() == [{"text": "one", "label": 1}, {"text": "other", "label": 1}]


def test_paths_start_in_the_recipes_folder(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(load_rows({"path": "rows.jsonl"}, "data.train", tmp_path)) == len(ROWS)


@pytest.mark.parametrize(
    ("make", "spec", "words"),
    [
        (None, {"path": "rows.jsonl"}, ["data.train", "no file or folder 'rows.jsonl'"]),
        (None, {"path": "./a/b"}, ["no file or folder"]),
        (("rows.jsonl", ""), {"path": "rows.jsonl"}, ["has no rows"]),
        (("rows.csv", "text,label\n"), {"path": "rows.csv"}, ["has no rows"]),
        (("rows.jsonl", "{not json"), {"path": "rows.jsonl"}, ["can't load"]),
        (("rows.doc", "x"), {"path": "rows.doc"}, ["'.doc'", ".jsonl"]),
        (("rows.jsonl", '{"a": 1}\n'), {"path": "rows.jsonl", "split": "tain"}, ["tain", "split"]),
        (("rows.jsonl", '{"a": 1}\n'), {"path": "rows.jsonl", "colums": ["a"]}, ["colums", "columns"]),
        (None, {"name": "x"}, ["path is missing", "{path: "]),
        (None, 7, ["7 is not a data set"]),
        (None, {"path": "a/b", "trust_remote_code": True}, ["trust_remote_code"]),
        (None, {"path": "a/b", "streaming": True}, ["streaming", "split"]),
        (None, {"path": "nobody/nothing"}, ["nobody/nothing"]),
        (None, "///", ["data.train", "'///' is the root folder"]),
    ],
)
def test_data_that_cannot_be_loaded(tmp_path, monkeypatch, make, spec, words):
    monkeypatch.chdir(tmp_path)
    if make:
        (tmp_path / make[0]).write_text(make[1])
    with pytest.raises(KappaTuneError) as error:
        load_rows(spec, "data.train")
    for word in words:
        assert word in str(error.value)


def test_templates_become_prompts_and_completions(rows):
    made = prompt_completion(rows, PROMPT, COMPLETION, LABELS)
    assert made.column_names == ["prompt", "completion"]
    assert made[1] == {"prompt": "Say: the cat 0 sat on the rug\nTone:", "completion": " bad"}
    assert [row["completion"] for row in made] == [" bad" if row["label"] == 0 else " good" for row in ROWS]


@pytest.mark.parametrize("written", [1, 1.0, "1"])
@pytest.mark.parametrize("named", [1, "1"])
def test_labels_match_however_they_are_written(tmp_path, written, named):
    rows = load_rows(str(write_rows(tmp_path / "one.jsonl", [{"text": "x", "label": written}])), "data.train")
    assert pairs(rows, PROMPT, COMPLETION, {named: "good"}) == [("Say: x\nTone:", " good")]


def test_choices_are_the_labels_in_order(rows):
    examples = choice_examples(rows, PROMPT, COMPLETION, LABELS)
    assert [example.answer for example in examples] == [row["label"] for row in ROWS]
    assert {tuple(example.choices) for example in examples} == {(" bad", " good")}


def test_a_template_takes_the_first_characters_of_a_column(tmp_path):
    rows = load_rows(str(write_rows(tmp_path / "one.jsonl", [{"text": "abcdef", "label": 1}])), "data.train")
    assert pairs(rows, "{text:.4}|{text:.9}", "{label}") == [("abcd|abcdef", "1")]


def test_braces_in_the_data_are_text(tmp_path):
    rows = load_rows(str(write_rows(tmp_path / "one.jsonl", [{"text": "{label} {0}", "label": 1}])), "data.train")
    assert pairs(rows, "{text} {{x}}", "{label}") == [("{label} {0} {x}", "1")]


@pytest.mark.parametrize(
    ("prompt", "completion", "labels", "words"),
    [
        ("Say: {txt}", COMPLETION, LABELS, ["prompt", "no column 'txt'", "Did you mean 'text'?", "label"]),
        (PROMPT, " {lable}", LABELS, ["completion", "lable", "Did you mean 'label'?"]),
        (PROMPT, " yes", None, ["names no column"]),
        (PROMPT, COMPLETION, {0: "bad"}, ["row 2", "label = 1", "labels"]),
        ("{text.upper}", COMPLETION, LABELS, ["prompt", "text.upper"]),
        ("{text[0]}", COMPLETION, LABELS, ["text[0]"]),
        ("{text!r}", COMPLETION, LABELS, ["text!r"]),
        ("{text:>9}", COMPLETION, LABELS, ["text:>9", "{column:.512}"]),
        ("{text:.0}", COMPLETION, LABELS, ["text:.0"]),
        ("{text", COMPLETION, LABELS, ["prompt", "{text"]),
        ("{}", COMPLETION, LABELS, ["not a column's name"]),
        (7, COMPLETION, LABELS, ["prompt", "7"]),
    ],
)
def test_templates_that_do_not_fit(rows, prompt, completion, labels, words):
    with pytest.raises(KappaTuneError) as error:
        prompt_completion(rows, prompt, completion, labels)
    for word in words:
        assert word in str(error.value)


def test_a_missing_value_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 0}) + "\n" + json.dumps({"text": None, "label": 1}) + "\n")
    with pytest.raises(KappaTuneError, match="Row 1 has no value in column 'text'"):
        prompt_completion(load_rows(str(path), "data.train"), PROMPT, COMPLETION, LABELS)


@pytest.mark.parametrize(
    ("prompt", "completion", "labels", "words"),
    [
        (PROMPT, COMPLETION, {0: "same", 1: "same"}, ["no choice"]),
        ("{label} {text}", COMPLETION, LABELS, ["prompt doesn't"]),
        (PROMPT, " {text}", LABELS, ["completion"]),
    ],
)
def test_choices_that_leave_nothing_to_choose(rows, prompt, completion, labels, words):
    with pytest.raises(KappaTuneError) as error:
        choice_examples(rows, prompt, completion, labels)
    for word in words:
        assert word in str(error.value)
