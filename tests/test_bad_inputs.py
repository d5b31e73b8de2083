"""What people type by mistake, over all commands and the Python API: one clear message, or what was meant; never a
traceback, another result than was asked for, or a file of theirs that isn't as it was. All of it with `-m slow`."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kappatune_plugin
from helpers.bad_values import (
    API_CALLS,
    BUDGETS,
    JSON_VALUES,
    NUMBERS,
    RECIPE_KEYS,
    TEXTS,
    YAML_VALUES,
    damaged,
    places,
    with_value,
    write,
)
from helpers.command import kappatune
from helpers.recipes import tiny_recipe, write_recipe
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError, Selection
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run import train
from kappatune_plugin.run.settings import setting_problem

LORA = "model_name_or_path: model\ndataset_name: rows\noutput_dir: out\nuse_peft: true\nlora_r: 4\n"
SOME = pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
FEW = pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])

# of `words`: what isn't wrong there
FINE = {
    *(("--learning_rate", "0"), ("--data.test.split", ""), ("--forgetting.max_delta", ""), ("--model", "")),
    *(("--k", "1000000"), ("--k", ""), ("--k", "null")),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder of somebody's: a model, data, a recipe and its run, a report, a selection, notes. Read only."""
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama", vocab_size=300).save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    content = recipe_of(home)
    config = write_recipe(home / "recipe.yaml", content)
    for words in (
        ["sft", "--config", config],
        ["scan", home / "model", "--full", "--output", home / "report.json"],
        ["select", home / "report.json", "--k", 3, "--output", home / "selection.json"],
    ):
        assert kappatune(*words)[0] == 0
    write(home / "lora.yaml", LORA)
    write(home / "notes.txt", "three weeks of work")
    return home


def recipe_of(home: Path) -> dict:
    control = {"control": {"path": str(home / "control.jsonl")}}
    return tiny_recipe(home, home / "model", max_steps=1, forgetting=control)


@pytest.fixture
def copy(home, tmp_path, monkeypatch) -> Path:
    """A copy of it to stand in."""
    copied = Path(shutil.copytree(home, tmp_path / "home"))
    # data from "~" would be all that the person has who runs the tests
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(copied)
    return copied


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(call: Callable[[], object]) -> tuple[str, object]:
    """("said", the message), ("done", what came), or ("wrong", any other exception)."""
    try:
        return "done", call()
    except KappaTuneError as error:
        return ("said", str(error)) if str(error).strip() else ("wrong", "an error without words")
    except Exception as error:
        return "wrong", repr(error)[:200]


def typed(*words: object) -> tuple[str, object]:
    """The outcome of a command: an error is one message and exit code 2."""

    def call() -> str:
        code, out, errors = kappatune(*words)
        if code == 0:
            return out
        assert code == 2 and "Error" in errors and "Traceback" not in errors, (code, errors[-300:])
        raise KappaTuneError(errors)

    return outcome(call)


def recipes(step: int) -> list[tuple[str, str]]:
    return [(key, raw) for key in RECIPE_KEYS for raw in YAML_VALUES][::step]


@SOME
def test_recipes(copy, step):
    """Every key with every value is refused, or holds the number that was written."""
    wrong, path = [], copy / "changed.yaml"
    for key, raw in recipes(step):
        write(path, with_value(recipe_of(copy), key, raw))
        how, what = outcome(lambda: load_recipe(path))
        if how == "done" and (problem := setting_problem(what.training_args)) is None and "." not in key:
            meant, held = yaml.safe_load(raw), getattr(what.training_args, key, None)
            if type(held) is float and isinstance(meant, int | float) and held != meant:
                how, what = "wrong", f"holds {held}"
        else:
            assert how != "done" or problem is None or problem.strip()
        if how == "wrong":
            wrong.append((key, raw[:30], what))
    assert wrong == []


@pytest.fixture
def quick_runs(monkeypatch) -> Iterator[None]:
    """Runs without what takes half of their time here: the picture at the end, and Python's look at every object."""
    monkeypatch.setattr(train, "plot_forgetting", lambda *_: None)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_runs_of_recipes_that_load(copy, quick_runs, part):
    """They train, or say in one message why not; nothing else in the folder changes."""
    path, wrong, seen = copy / "changed.yaml", [], set()
    shutil.rmtree(copy / "out")
    for key, raw in recipes(1)[part::4]:
        if key == "output_dir" and raw in ("'~'", "///"):
            # they would be written to
            continue
        write(path, with_value(recipe_of(copy), key, raw))
        how, recipe = outcome(lambda: load_recipe(path))
        if how == "done" and recipe.training_args.max_steps > 1000:
            # 12:30:59 is 45059 in YAML: what was asked for, and hours
            continue
        # two spellings of the same are run once
        if how == "done" and (meant := repr(replace(recipe, resolved={}))) not in seen:
            seen.add(meant)
            before = contents(copy)
            how, what = outcome(partial(train.run_sft, recipe))
            after = contents(copy)
            if how == "wrong" or any(after.get(name) != text for name, text in before.items()):
                wrong.append((key, raw[:30], what))
            for left in [each for each in copy.iterdir() if each.is_dir() and each.name not in ("model", ".git")]:
                shutil.rmtree(left)
    assert wrong == [] and seen


def damages(text: str, step: int) -> Iterable[tuple[tuple, str, str]]:
    """(place, value, the JSON with this value in that place)"""
    cases = [(place, raw) for place in places(json.loads(text)) for raw in JSON_VALUES][::step]
    return [(place, raw, damaged(text, place, raw)) for place, raw in cases]


@SOME
@pytest.mark.parametrize("rank_by", ["kappa", "log_volume", "stable_rank", "kappa_over_null"])
def test_reports(copy, step, rank_by):
    wrong, text = [], (copy / "report.json").read_text()
    for place, raw, changed in damages(text, step):
        path, selected = write(copy / "changed.json", changed), copy / "selected.json"
        selected.unlink(missing_ok=True)
        how, what = typed("select", path, "--k", 3, "--rank_by", rank_by, "--output", selected)
        if how == "done" and rank_by == "kappa":
            rows = sorted(json.loads(changed)["units"], key=lambda row: (row["kappa"], row["name"]))
            if [unit.name for unit in Selection.load(selected).units] != [row["name"] for row in rows[:3]]:
                how = "wrong"
        if how == "wrong" or (how == "said" and selected.exists()):
            wrong.append((place, raw, what))
    assert wrong == []


@SOME
def test_selections(copy, step):
    wrong, names = [], [unit.name for unit in Selection.load("selection.json").units]
    for place, raw, changed in damages((copy / "selection.json").read_text(), step):
        path = write(copy / "changed.json", changed)
        how, what = outcome(partial(Selection.load, path))
        if how == "wrong" or (how == "done" and "name" not in place and [unit.name for unit in what.units] != names):
            wrong.append((place, raw, what))
    assert wrong == []


@FEW
def test_adapters(copy, step):
    """What is merged from a damaged adapter_config.json is what is merged from the whole one, or nothing is."""
    wrong, path = [], copy / "out" / "adapter_config.json"
    assert typed("merge", "out", "--output_dir", "whole")[0] == "done"
    expected = load_file(copy / "whole" / "model.safetensors")
    for place, raw, changed in damages(path.read_text(), step):
        write(path, changed)
        how, what = typed("merge", "out", "--output_dir", "merged")
        if how == "done":
            merged = load_file(copy / "merged" / "model.safetensors")
            how = "done" if all(torch.equal(merged[name], value) for name, value in expected.items()) else "wrong"
        if how == "wrong" or (how == "said" and (copy / "merged").exists()):
            wrong.append((place, raw, what))
        shutil.rmtree(copy / "merged", ignore_errors=True)
    assert wrong == []


@FEW
def test_models(copy, step):
    """A config.json that doesn't fit its weights: each row that is reported is that of the right one."""
    wrong, path = [], copy / "model" / "config.json"
    right = {unit["name"]: unit["kappa"] for unit in json.loads((copy / "report.json").read_text())["units"]}
    for place, raw, changed in damages(path.read_text(), step):
        write(path, changed)
        (copy / "found.json").unlink(missing_ok=True)
        how, what = typed("scan", "model", "--full", "--output", "found.json")
        if how == "done":
            found = {unit["name"]: unit["kappa"] for unit in json.loads((copy / "found.json").read_text())["units"]}
            how = "done" if found == right else "wrong"
        if how == "wrong":
            wrong.append((place, raw, what))
    assert wrong == []


def places_to_write(copy: Path) -> list[str]:
    """Where nothing may be written: devices, links, folders, files of somebody's, names that no file can have."""
    (copy / "link").symlink_to("notes.txt")
    (copy / "loop").symlink_to("loop")
    ours = ["model/model.safetensors", "model/config.json", "recipe.yaml", "notes.txt", "train.jsonl"]
    return ["/dev/null", "/proc/nothing/here", "link", "loop", "model", "x" * 300, "notes.txt/x", "a\0b", *ours]


def words(copy: Path) -> Iterable[list[str]]:
    """Commands with one word that can't be."""
    config, made = ["--config", "recipe.yaml"], ["--output", "new.json"]
    every = ["compare", *config, "--methods", "lowest", "--seeds", "1", "--smooth", "1"]
    options = {
        ("scan", "model", *made): {"--k": BUDGETS, "--rank_by": TEXTS, "--include": TEXTS, "--table": TEXTS},
        ("select", "report.json", *made): {"--k": BUDGETS, "--order": TEXTS, "--rank_by": TEXTS, "--seed": NUMBERS[:6]},
        ("sft", *config, "--output_dir", "new"): {
            "--learning_rate": NUMBERS,
            "--per_device_train_batch_size": NUMBERS,
            "--kappatune.k": BUDGETS,
            "--kappatune.order": TEXTS,
            "--no_such_key": TEXTS,
            "--data.test.split": TEXTS,
            "--forgetting.max_delta": NUMBERS[:7],
        },
        ("eval", *config, *made): {"--models": TEXTS, "--dtype": TEXTS},
        tuple(every): {
            "--methods": TEXTS,
            "--learning_rates": NUMBERS,
            "--seeds": NUMBERS,
            "--every": NUMBERS,
            "--smooth": NUMBERS,
            "--validation": NUMBERS,
            "--widen": NUMBERS[:6],
        },
        ("sweep", *config, "--seeds", "1", "--smooth", "1"): {"--k": BUDGETS, "--seeds": NUMBERS, "--every": NUMBERS},
        ("merge", "out", "--output_dir", "new"): {"--model": TEXTS, "--dtype": TEXTS},
        ("interpolate", "out", *config, "--output_dir", "new", "--max_delta", "1"): {"--max_delta": NUMBERS[:7]},
        ("convert", "lora.yaml"): {"--match": TEXTS, "--k": BUDGETS, "--toolkit": TEXTS},
        ("plan", "model", "--for", "trl"): {"--for": TEXTS, "--k": BUDGETS, "--report": TEXTS},
    }
    for command, wrong in options.items():
        for option, values in wrong.items():
            yield from ([*command, f"{option}={value}"] for value in values if (option, value.strip()) not in FINE)
    for place in places_to_write(copy):
        yield ["scan", "model", "--k", "2", f"--output={place}"]
        yield ["scan", "model", "--k", "2", f"--plot={place}", *made]
        yield ["select", "report.json", "--k", "2", f"--output={place}"]
        yield ["eval", *config, f"--output={place}"]
        yield ["merge", "out", f"--output_dir={place}"]
        if place != "model":
            # a checkpoint that may be replaced, and a folder that a run may write to
            yield ["merge", "out", f"--output_dir={place}", "--overwrite"]
            yield ["sft", *config, f"--output_dir={place}"]
        yield ["interpolate", "out", *config, "--max_delta", "1", f"--output_dir={place}"]
        yield ["convert", "lora.yaml", "--write", f"--output={place}"]
    for place in (*TEXTS, "notes.txt", "/dev/null", "link", "loop", "x" * 300, "a\0b", "/", "train.jsonl"):
        yield ["scan", place, *made]
        yield ["select", place, *made]
        yield ["merge", place, "--output_dir", "new"]
        yield ["convert", place]
        yield ["plan", place, "--for", "trl"]
        yield ["sft", f"--config={place}"]
        yield ["eval", f"--config={place}", *made]
        yield ["compare", f"--config={place}"]
        yield ["sweep", f"--config={place}"]
        yield ["interpolate", place, *config, "--max_delta", "1", "--output_dir", "new"]
    yield from ([command, "--nothing"] for command in ("doctor", "merge", "select", "plan"))


@FEW
def test_commands(copy, step):
    """Refused before anything is written or changed."""
    wrong, all_words = [], list(words(copy))
    before = contents(copy)
    assert len(all_words) > 500
    for each in all_words[::step]:
        how, what = typed(*each)
        after = contents(copy)
        if how != "said" or after != before:
            wrong.append((" ".join(each)[:120], how, str(what)[:200], sorted(set(after) ^ set(before))[:3]))
            for name in set(after) - set(before):
                (copy / name).unlink()
            before = contents(copy)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("call", API_CALLS, ids=str)
def test_the_api(home, call):
    """A KappaTuneError with the name of what is wrong."""
    function, arguments, settings, word = call
    how, what = outcome(lambda: getattr(kappatune_plugin, function)(*arguments, **settings))
    assert how == "said" and word in what, what


@pytest.mark.skipif(not hasattr(os, "fsencode"), reason="names of files are bytes")
def test_names_that_are_no_characters(copy):
    name = os.fsdecode(b"report-\xff.json")
    how, _ = typed("scan", "model", "--k", "2", "--output", name)
    assert how == "done" and (copy / name).exists()
    how, what = typed("scan", os.fsdecode(b"\xff"), "--output", "new.json")
    assert how == "said" and "udcff" in what
