"""The recipes of the paper's studies and of PEFT's benchmark, each whole, on a tiny model and local rows."""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.recipes import write_rows
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaReport
from kappatune_plugin.cli.app import app
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import compact  # noqa: E402
import real_page  # noqa: E402
import study_gpu  # noqa: E402

DATA = Path(os.environ.get("KAPPATUNE_DATA", REPOSITORY.parent / "shared" / "data"))
TWEETS = [{"text": f"what a {word} day {i}", "label": i % 2} for i in range(8) for word in ("lovely", "rainy")]
PAIRS = [{"sentence1": "the cat sat", "sentence2": "yes", "label": i % 2} for i in range(16)]
SENTENCES = [{"sentence": row["text"], "label": row["label"]} for row in TWEETS]
WIKI = [{"text": "the cat sat on the mat " * 20}, {"text": ""}]


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", vocab_size=300, max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(name: str, folder: Path, model: Path, data: dict, **changes):
    """The recipe with its model, data and what has to do with their size replaced."""
    settings = {
        "model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "logging_steps": 1,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "kappatune.k": 6,
        "forgetting.control": json.dumps({"wiki": {"path": str(write_rows(folder / "wiki.jsonl", WIKI))}}),
        **data,
        **changes,
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return run_sft(load_recipe(REPOSITORY / "recipes" / f"{name}.yaml", flags))


def files(folder: Path, rows: list[dict]) -> dict[str, str]:
    path = str(write_rows(folder / "rows.jsonl", rows))
    return {"data.train": json.dumps({"path": path}), "data.test": json.dumps({"path": path, "take": 6})}


@pytest.mark.parametrize(
    ("name", "rows", "order"),
    [
        ("glue_budget", SENTENCES, "lowest"),
        ("glue_inverse", PAIRS, "highest"),
        ("sentiment_domains", TWEETS, "lowest"),
        ("sentiment_few_shot", TWEETS, "lowest"),
    ],
)
def test_analysis_recipes(saved_llama, tmp_path, name, rows, order):
    data = files(tmp_path, rows)
    if name == "sentiment_domains":
        path = json.loads(data["data.train"])["path"]
        data["data.train"] = json.dumps([{"path": path}, {"path": path, "split": "train[:4]+train[-4:]"}])
    result = run(f"analysis/{name}", tmp_path, saved_llama, data)
    measured = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert result.trainer.state.global_step == 4
    assert len(result.trainer.train_dataset) == (24 if name == "sentiment_domains" else 16)
    assert result.selection.order == order and len(result.selection.units) == 6
    kappas = [unit.kappa for unit in result.selection.units]
    assert kappas == sorted(kappas, reverse=order == "highest")
    assert measured["task"]["metric"] == "accuracy" and measured["control"]["wiki"]["kl_after"] > 0


def test_kappa_of_a_bert_by_layer(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    files = ["--plot", str(tmp_path / "bert.png"), "--output", str(tmp_path / "report.json")]
    arguments = ["scan", str(tmp_path / "bert"), "--k", "10%", *files]
    with pytest.raises(SystemExit) as end:
        app(arguments)
    shown = capsys.readouterr().out
    report = KappaReport.load(tmp_path / "report.json")
    assert end.value.code == 0
    for layer in (0, 1):
        kinds = {unit.name.partition(f"layer.{layer}.")[2] for unit in report.units if f"layer.{layer}." in unit.name}
        assert f"layer.{layer}" in shown and len(kinds) == 6
    assert "attention.self.query" in shown and (tmp_path / "bert.png").stat().st_size > 10_000


@pytest.mark.skipif(not (DATA / "tasks" / "gsm8k").is_dir(), reason=f"no GSM8K in {DATA} (set KAPPATUNE_DATA)")
def test_the_metamathqa_recipe_on_gsm8k(saved_llama, tmp_path):
    questions = [json.loads(line) for line in (DATA / "tasks" / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    rows = [{"query": row["question"], "response": row["answer"]} for row in questions[:40]]
    template = len("Question:  Think step by step.\nAnswer:")
    fitting = [row for row in rows if len(row["query"]) + len(row["response"]) + template <= 600]
    assert 20 < len(fitting) < 40
    test = {"path": str(DATA / "tasks" / "gsm8k" / "test.jsonl"), "take": 3}
    templates = {"prompt": "Question: {question} Think step by step.\nAnswer:", "completion": "{answer}"}
    data = {
        "data.train": json.dumps({"path": str(write_rows(tmp_path / "train.jsonl", rows))}),
        "data.test": json.dumps({**test, **templates}),
        "data.max_chars": 600,
        "forgetting.generate": "{max_new_tokens: 4, max_length: 800, batch_size: 2}",
        "forgetting.every": 2,
        "warmup_steps": 1,
    }
    result = run("metamathqa_llama32_3b", tmp_path, saved_llama, data)
    measured = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert measured["task"]["metric"] == "answer_accuracy" and measured["task"]["after"] == 0
    assert measured["steps"][0].keys() == {"step", "wiki_loss", "wiki_ppl"}
    assert len(result.trainer.train_dataset) == len(fitting)
    # its template, the end token, in order, question and answer both in the loss
    first = next(iter(result.trainer.get_train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(saved_llama)
    for ids, labels, row in zip(first["input_ids"], first["labels"], fitting, strict=False):
        text = f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}<eos>"
        assert tokenizer.decode(ids[labels != -100]) == text


@pytest.fixture(scope="module")
def saved_kinds(tmp_path_factory) -> Path:
    """Tiny models in the place of those of the study for a GPU, each in the folder of its name. Read only."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, kind in (("olmoe", "olmoe"), ("deepseek", "deepseek_v2"), ("llama32", "llama")):
        tiny_model(kind, vocab_size=300).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    "setting", [pytest.param(each, marks=[pytest.mark.slow] * (each != "olmoe-irony")) for each in study_gpu.SETTINGS]
)
def test_the_study_for_a_gpu(saved_kinds, tmp_path, setting):
    """As it stands but for the model, the rows and their number; bfloat16 as there."""
    # both tasks' columns, since each asks the other
    rows = [{**row, "sentence": row["text"]} for row in TWEETS]
    controls = study_gpu.changed(setting, None)["forgetting.control"]
    asked = study_gpu.changed(setting, None)["forgetting.recall"]
    data = files(tmp_path, rows)
    local = json.loads(data["data.test"])
    given = {
        **data,
        "forgetting.control": json.dumps(
            {**controls, "wikitext": {"path": str(write_rows(tmp_path / "w.jsonl", WIKI))}}
        ),
        "forgetting.recall": json.dumps({key: asked[key] for key in ("prompt", "completion", "labels")} | local),
        "forgetting.samples": 2,
        "forgetting.max_length": 16,
        "kappatune.k": 6,
        "max_steps": 2,
        "use_cpu": "true",
        "bf16": "false",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    methods = "lora," + ("highest:rank_by=expert_share" if "expert_share" in study_gpu.SETTINGS[setting] else "lowest")
    words += ["--models", str(saved_kinds), "--settings", setting, "--methods", methods, "--seeds", "1"]
    words += ["--learning_rates", "1e-4", "--widen", "0", "--every", "1", "--smooth", "1"]
    study_gpu.main([*words, "--output", str(tmp_path / "out"), "--results", str(tmp_path)])
    assert str(saved_kinds) not in (tmp_path / f"{setting}.json").read_text(encoding="utf-8")
    content = compact.read(tmp_path / f"{setting}.json")
    model = setting.partition("-")[0]
    assert content["recipe"]["dtype"] == "bfloat16" and content["recipe"]["model_name_or_path"] == f"models/{model}"
    assert all(len(method["grid"]) == 1 and len(method["frontier"]["within"]) == 4 for method in content["methods"])
    assert "| `lora` |" in real_page.text({setting: content}, [], "")
