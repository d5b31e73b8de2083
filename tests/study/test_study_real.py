"""benchmarks/study_real.py: what each setting makes of the recipe, on made-up data."""

import json
import sys
from pathlib import Path

import pytest

from kappatune_plugin.recipe.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

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
    assert list(recipe.forgetting.controls()) == ["wikitext", "self"]
    task, other = ((each or {}).values() for each in (recipe.data["labels"], recipe.forgetting.recall.labels))
    free = "gsm8k" in name
    assert set(task).isdisjoint(other) and len(other) == 2 and len(task) == (0 if free else 2)
    train, test = (
        [json.loads(line)["question" if free else "sentence"] for line in (tmp_path / "rows" / f"{part}.jsonl").open()]
        for part in ("train", "test")
    )
    assert "<<" not in (tmp_path / "rows" / "train.jsonl").read_text()
    assert (len(train), len(test)) == (study_real.TRAIN, study_real.TEST) and not set(train) & set(test)


def test_given_words_take_precedence():
    assert study_real.words_of({"max_steps": 40, "data.prompt": "x"}, ["--max_steps", "2"]) == [
        "--data.prompt",
        "x",
        "--max_steps",
        "2",
    ]
