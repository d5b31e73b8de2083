"""benchmarks/study_real.py: what each setting makes of the recipe, on made-up data."""

import json
import sys
from pathlib import Path

import pytest

from helpers.made_up_comparisons import entry, made_up
from kappatune_plugin.recipe.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compact  # noqa: E402
import study_real  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The files that the study reads, of made-up rows."""
    folder = tmp_path_factory.mktemp("data")
    files = {
        "tasks/sent-conv/stsa.binary.train": [f"{i % 2} review {i}" for i in range(450)],
        "tasks/sent-conv/stsa.binary.test": [f"{i % 2} unseen review {i}" for i in range(100)],
        **{
            f"tasks/gsm8k/{part}.jsonl": [
                json.dumps({"question": f"{part} {i}?", "answer": f"<<{i}>>{i}"}) for i in range(450)
            ]
            for part in ("train", "test")
        },
        "text/wikitext-2/raw_test.txt": [f"paragraph {i} " + "word " * 60 for i in range(90)],
    }
    for part, count in (("train", 450), ("test", 100)):
        files[f"tasks/tweeteval/irony/{part}_text.txt"] = [f"{part} tweet {i}" for i in range(count)]
        files[f"tasks/tweeteval/irony/{part}_labels.txt"] = [str(i % 2) for i in range(count)]
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", study_real.SETTINGS)
def test_a_setting_is_a_recipe(data, tmp_path, name):
    changes = study_real.changed(name, tmp_path / "models", data, tmp_path / "rows")
    recipe = load_recipe(study_real.RECIPE, study_real.words_of(changes))
    assert recipe.end_token is not name.endswith("_no_end")
    assert recipe.forgetting.max_delta == (0.05 if name.endswith("_per_matrix") else None)
    assert list(recipe.forgetting.controls()) == ["wikitext", "self"]
    task, other = ((each or {}).values() for each in (recipe.data["labels"], recipe.forgetting.recall.labels))
    free = "gsm8k" in name
    assert set(task).isdisjoint(other) and len(other) == 2 and len(task) == (0 if free else 2)
    train, test = (
        [json.loads(line)["question" if free else "sentence"] for line in (tmp_path / "rows" / f"{part}.jsonl").open()]
        for part in ("train", "test")
    )
    assert "<<" not in (tmp_path / "rows" / "train.jsonl").read_text()
    share = study_real.HALF if free else 1
    assert (len(train) * share, len(test) * share) == (study_real.TRAIN, study_real.TEST) and not set(train) & set(test)


def test_given_words_take_precedence():
    assert study_real.words_of({"max_steps": 40, "data.prompt": "x"}, ["--max_steps", "2"]) == [
        "--data.prompt",
        "x",
        "--max_steps",
        "2",
    ]


def results(*names: str, loss: float = 4.0) -> dict:
    methods = [{**entry(name, [0.5], [0.1]), "grid": {}} for name in names]
    return {**made_up(*methods), "hashes": {"base": "a"}, "matched_parameters": 9, "before": {"task_loss": loss}}


def test_methods_that_are_missing_are_added_in_the_order_asked_for():
    order, known = "a,b:k={params: 1M},c", results("c", "a")
    assert study_real.missing(order, None) == order
    assert study_real.missing(order, known) == "b:k={params: 1M}"
    # another processor rounds differently
    whole = study_real.joined(known, results("b:k={params: 1M}", loss=4.01), order)
    assert [each["name"] for each in whole["methods"]] == ["a", "b:k={params: 1M}", "c"]
    assert whole["before"] == {"task_loss": 4.0} and study_real.missing(order, whole) == ""
    assert study_real.joined(None, known, order) == known


@pytest.mark.parametrize("key, value", [("hashes", {"base": "b"}), ("settings", {}), ("before", {"task_loss": 4.1})])
def test_results_of_other_runs_are_not_added_to(key, value):
    with pytest.raises(SystemExit, match=f"they differ in {'task_loss' if key == 'before' else key}"):
        study_real.joined(results("a"), {**results("b"), key: value}, "a,b")


def test_results_that_are_written_are_added_to(data, tmp_path, monkeypatch):
    """Each setting's methods are run once, however often it is asked for."""
    ran = []

    def compare(asked, methods):
        ran.append(methods)
        (asked.output_dir / "compare.json").write_text(json.dumps(results(*methods.split(","))))

    monkeypatch.setattr(study_real, "compare_session", compare)
    monkeypatch.setattr(study_real.torch, "set_float32_matmul_precision", lambda _: None)
    places = {"models": tmp_path, "data": data, "output": tmp_path / "out", "results": tmp_path / "results"}
    words = [word for key, value in places.items() for word in (f"--{key}", str(value))]
    for methods in ("full", "lora,full", "lora"):
        monkeypatch.setattr(sys, "argv", ["x", *words, "--settings", "gemma3-irony", "--methods", methods])
        study_real.main()
    assert ran == ["full", "lora"]
    names = [each["name"] for each in compact.read(tmp_path / "results" / "gemma3-irony.json")["methods"]]
    assert names == ["lora", "full"]
