"""docs/RESULTS.md says what the committed comparisons say."""

import json
import sys
from pathlib import Path
from statistics import median

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import conclusions  # noqa: E402
import figures  # noqa: E402
import results  # noqa: E402
import study  # noqa: E402


def test_the_page_is_what_the_script_writes():
    assert (REPOSITORY / "docs" / "RESULTS.md").read_text(encoding="utf-8") == results.text(results.committed())


def test_the_readme_shows_what_was_measured():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    contents = results.committed()
    target = contents["quickstart-target"]
    ratios = [ratio for name in conclusions.TUNED for ratio in figures.times_a_third(contents[name])]

    def both(name):
        found = (figures.method_of(contents[f"{model}-subj-choices"], name) for model in ("dense", "moe"))
        return " and ".join(f"{each['matched']['control_loss_change']['mean']:.2f}" for each in found)

    words = " ".join(readme.split())
    for said in (
        f"κ-lowest raised the control loss by {figures.outcome(target, 'lowest')}, LoRA by "
        f"{figures.outcome(target, 'lora')}, full fine-tuning by {figures.outcome(target, 'full')} (nats a token).",
        f"`random_mlp`: {figures.outcome(target, 'random_mlp')}",
        f"three times the rate forgot {median(ratios):.1f} times as much",
        f"it forgot {both('lowest')} nats a token, κ-highest {both('highest')}.",
        f"κ-lowest forgot {both('lowest_mlp')}, random matrices {both('random_mlp')}, κ-highest (`order: highest`) "
        f"{both('highest_mlp')}.",
    ):
        assert said in words, said


@pytest.mark.parametrize("name", results.committed())
def test_a_committed_comparison_is_whole(name):
    content = results.committed()[name]
    assert content["format"] == 1 and len(content["settings"]["seeds"]) >= 3
    names = [method["name"] for method in content["methods"]]
    assert len(names) == len(set(names))
    if "recommendation" in content:
        assert len(names) == 4 and all(each.startswith("lowest:k=") for each in names)
    else:
        assert {"lowest", "random_mlp", "highest" if name.endswith("choices") else "lora"} <= set(names)
    assert "/work" not in json.dumps(content) and "/tmp" not in json.dumps(content)
    for picture in results.pictures(content):
        assert (REPOSITORY / "docs" / "results" / f"{name}-{picture}.png").exists()


def test_the_difference_from_lora_is_paired_and_bold_where_it_is_not_zero():
    def rise(*values):
        return {"control_loss_change": {"mean": 0.0, "half": None, "values": list(values)}}

    # differences .1, .2, .3: mean .2, s = .1, t(2) = 4.303: ± .248
    assert results.against(rise(1.1, 2.2, 3.3), rise(1.0, 2.0, 3.0)) == "+0.200 ± .248"
    assert results.against(rise(1.2, 2.2, 3.21), rise(1.0, 2.0, 3.0)).startswith("**+0.203 ± .0")
    assert results.against(rise(1.2, None, 3.2), rise(None, 2.0, 3.0)) == "+0.200"
    assert results.against(rise(None), rise(1.0)) == "" and results.against(rise(1.0), None) == ""


def test_a_published_comparison_names_no_folder_of_this_machine(tmp_path):
    data, output = tmp_path / "shared" / "data", tmp_path / "out"
    output.mkdir()
    content = {
        "model": f"{data}/models/m",
        "train": f"{output}/dense/data/train.jsonl",
        "recipe": f"{REPOSITORY}/recipes/q",
        "methods": [{"name": "a", "loss": 1.23456789}, {"name": "b", "loss": None}],
    }
    (output / "compare.json").write_text(json.dumps(content))
    study.publish(output / "compare.json", tmp_path / "published" / "q.json", {data: "data", output: "study"})
    text = (tmp_path / "published" / "q.json").read_text()
    assert json.loads(text) == {
        "model": "data/models/m",
        "train": "study/dense/data/train.jsonl",
        "recipe": "./recipes/q",
        "methods": [{"name": "a", "loss": 1.23457}, {"name": "b", "loss": None}],
    }
    # a line a record
    assert len(text.splitlines()) == 8


def test_sentences_are_a_seeded_sample_of_the_short_ones(tmp_path):
    lines = [f"{i % 2} sentence number {i} \x85 ends" for i in range(20)] + ["1 " + "long " * 40, ""]
    (tmp_path / "task.all").write_text("\n".join(lines), encoding="latin-1")
    train, _ = study.sentences(tmp_path / "task.all", tmp_path)
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines() if line]
    assert len(rows) == 20 and all(row["label"] == int(row["sentence"].split()[2]) % 2 for row in rows)


def tried(validation_loss, forgotten):
    return {"validation_loss": validation_loss, "final": {"control_loss_change": forgotten}}


def test_the_gentlest_rate_that_learns_as_well():
    grids = {
        "a": {"0.001": tried(0.5, 0.1), "0.003": tried(0.3, 0.2), "0.01": tried(0.2, 0.9)},
        "b": {"0.001": tried(0.4, 0.3), "0.003": tried(0.6, 0.2), "0.01": tried(None, None)},
    }
    content = {"methods": [{"name": name, "grid": grid} for name, grid in grids.items()]}
    # b at its best has .4 on held-out rows: a gets there from 3e-3 on
    assert figures.gentlest(content) == {"a": (0.003, 0.2), "b": (0.001, 0.3)}
    assert figures.times_a_third(content) == [2.0, pytest.approx(4.5), pytest.approx(2 / 3)]
