"""A run writes only its own files, whole, and replaces an earlier run only when it may; a merge too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from helpers.recipes import tiny_recipe, write_recipe, write_rows
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.training import train as train_tiny
from kappatune_plugin import KappaTuneError, model_folder
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.files import alone
from kappatune_plugin.forgetting.probe import ForgettingProbe
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.resume import checkpoint_problems
from kappatune_plugin.run.train import RunResult, run_sft
from kappatune_plugin.toolkits.shared import remove_models_with_adapters

SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}


def train(folder: Path, model: Path, *overrides: str, **changes: object) -> RunResult:
    return train_tiny(folder, model, *overrides, **{**SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(saved_olmoe, tmp_path_factory) -> Path:
    """The folder of a recipe and its finished run. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, saved_olmoe)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def again(folder: Path, *overrides: str):
    return run_sft(load_recipe(folder / "recipe.yaml", ["--output_dir", str(folder / "out"), *overrides]))


def test_the_same_command_typed_again_changes_nothing(copy):
    before = contents(copy)
    with pytest.raises(KappaTuneError, match=r"holds a finished run.*overwrite_output_dir: true"):
        again(copy)
    (copy / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(KappaTuneError, match=r"hasn't finished \(checkpoint-3\).*resume_from_checkpoint: true"):
        again(copy)
    assert contents(copy) == {name: text for name, text in before.items() if name != "out/adapter_model.safetensors"}


def test_overwriting_takes_away_the_earlier_run_and_nothing_else(copy):
    (copy / "out" / "notes.txt").write_text("precious")
    before = contents(copy / "out")
    for wrong in ("--learning_rate=-1", "--per_device_eval_batch_size=0", "--learning_rate=nan"):
        with pytest.raises(KappaTuneError, match=wrong[2:].partition("=")[0]):
            again(copy, "--overwrite_output_dir", wrong)
    assert contents(copy / "out") == before
    result = again(copy, "--overwrite_output_dir", "--kappatune.order", "random", "--save_strategy", "no")
    assert not (copy / "out" / "checkpoint-3").exists() and (copy / "out" / "notes.txt").read_text() == "precious"
    for name in ("selection.json", "adapter_config.json"):
        assert '"random"' in (copy / "out" / name).read_text(), name
    assert result.forgetting.after


def test_a_recipe_that_somebody_wrote_is_not_replaced(saved_olmoe, tmp_path):
    with pytest.raises(KappaTuneError, match="recipe.yaml' is there already"):
        train(tmp_path, saved_olmoe, "--output_dir", str(tmp_path))
    assert not (tmp_path / "selection.json").exists()
    with pytest.raises(KappaTuneError, match="the base model's own folder"):
        train(tmp_path, saved_olmoe, "--output_dir", str(saved_olmoe))


def test_two_runs_at_once_are_refused(saved_olmoe, tmp_path):
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out", "run"), pytest.raises(KappaTuneError, match="Another run is at work"):
        train(tmp_path, saved_olmoe)


@pytest.mark.parametrize("length", [("--max_steps", "3"), ("--max_steps", "-1", "--num_train_epochs", "0.75")])
def test_finished_means_finished(copy, length):
    """The Trainer makes one step more: at `max_steps`, and at a part of an epoch."""
    before = contents(copy / "out")
    result = again(copy, "--resume_from_checkpoint", "true", *length)
    after = contents(copy / "out")
    assert result.trainer.state.global_step == 3 and not (copy / "out" / "checkpoint-4").exists()
    for name in ("adapter_model.safetensors", "selection.json", "kappa_report.json", "forgetting.json"):
        assert after[name] == before[name], name
    assert before.keys() == after.keys()


def test_finished_means_finished_for_a_stream_too(saved_olmoe, tmp_path):
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", [{"prompt": "the cat", "completion": " yes"}] * 16)
    changes = {"data": None, "forgetting": None, "dataset_name": str(tmp_path / "rows"), "dataset_streaming": True}
    train(tmp_path, saved_olmoe, **changes)
    before = contents(tmp_path / "out")
    result = train(tmp_path, saved_olmoe, "--resume_from_checkpoint", "true", **changes)
    assert result.trainer.state.global_step == 3
    after = contents(tmp_path / "out")
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"] and after.keys() == before.keys()


def test_a_run_of_an_older_version_can_be_resumed(copy):
    """Its recipe.yaml doesn't say that a run wrote it."""
    path = copy / "out" / "recipe.yaml"
    path.write_text(path.read_text().partition("\n")[2])
    again(copy, "--resume_from_checkpoint", "true")
    assert path.read_text().startswith("# The recipe as it was run")


def test_a_run_resumed_with_more_steps_goes_on(copy):
    result = again(copy, "--resume_from_checkpoint", "true", "--max_steps", "5")
    assert result.trainer.state.global_step == 5
    logged = [entry["step"] for entry in result.trainer.state.log_history if "forgetting/control_loss" in entry]
    assert logged == [0, 2, 4, 5], "the base's measure is step 0's, not the resumed step's"


def test_a_checkpoint_written_over_counts_as_none_until_it_is_whole(copy, monkeypatch):
    """Resumed from an earlier one; a kill in the middle of saving would leave two runs' files as one."""

    def killed(trainer, folder):
        raise KeyboardInterrupt

    again(copy, "--overwrite_output_dir", "--save_steps", "1")
    out = copy / "out"
    assert checkpoint_problems(out / "checkpoint-3") == []
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        again(copy, "--resume_from_checkpoint", str(out / "checkpoint-2"), "--save_steps", "1")
    assert checkpoint_problems(out / "checkpoint-3") == ["trainer_state.json is missing"]
    assert checkpoint_problems(out / "checkpoint-2") == []


def test_the_adapter_is_there_before_the_last_measurement(saved_olmoe, tmp_path, monkeypatch):
    def fails(self, model):
        raise RuntimeError("no data")

    monkeypatch.setattr(ForgettingProbe, "divergences", fails)
    with pytest.raises(KappaTuneError, match=r"measuring after it failed: RuntimeError: no data.*was saved before"):
        train(tmp_path, saved_olmoe, save_strategy="no")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(name.endswith(".weight") for name in saved) == 7 and (tmp_path / "out" / "adapter_config.json").exists()


def test_no_file_of_a_run_holds_a_secret(saved_olmoe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("DATABASE_URL", "")
    secret = "SECRET-a1b2"
    changes = {"hub_token": secret, "env": {"DATABASE_URL": f"postgres://u:{secret}@h/db"}}
    train(tmp_path, saved_olmoe, **changes, model_init_kwargs={"token": secret}, forgetting=None)
    assert [name for name, text in contents(tmp_path / "out").items() if secret.encode() in text] == []
    assert os.environ["HF_TOKEN"] == secret


def test_rows_that_are_left_out_are_counted(saved_olmoe, tmp_path, capsys):
    rows = [{"text": "the cat sat " * (60 if position else 1), "label": position % 2} for position in range(8)]
    data = {"train": {"path": str(write_rows(tmp_path / "long.jsonl", rows))}, "prompt": "{text}:"}
    data |= {"completion": " {label}", "labels": {0: "bad", 1: "good"}}
    changes = {"data": data, "max_length": 32, "forgetting": None}
    train(tmp_path, saved_olmoe, **changes)
    assert "7 of 8 training rows are left out" in capsys.readouterr().out
    write_rows(tmp_path / "long.jsonl", rows[1:])
    with pytest.raises(KappaTuneError, match="In all 7 training rows the prompt alone fills max_length"):
        train(tmp_path, saved_olmoe, "--overwrite_output_dir", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kappatune": {"k": 7, "modules_to_save": ["lm_haed"]}}, "no module lm_haed. Did you mean 'lm_head'"),
        ({"kappatune": {"k": 1000}}, "k = 1000 is more than there is"),
        ({"chat_template_path": "nope.jinja"}, "chat_template_path: nope.jinja"),
        ({"dataset_kwargs": "7"}, "dataset_kwargs"),
        ({"push_to_hub": True}, "push_to_hub: can't make the repository"),
        ({"run_name": "2024-02-30", "output_dir": "o\0ut"}, "NUL, or half a character"),
        ({"output_dir": "o" * 300}, "Can't write"),
        ({"model_init_kwargs": {"a": 1}}, "unexpected keyword argument 'a'"),
        ({"model_init_kwargs": "x"}, "model_init_kwargs: x is not a mapping"),
        ({"model_init_kwargs": {1: 2}}, "has the key 1; keys are names"),
        ({"optim_args": "x"}, "optim_args: x is not"),
        ({"seed": -1}, "seed: -1 is not a whole number from 0"),
        ({"data": {"train": {"path": "m" * 300 + ".jsonl"}}}, "there is no file"),
        ({"env": {"A=B": "x"}}, "env: "),
    ],
)
def test_what_cannot_be_is_said(saved_olmoe, tmp_path, changes, words):
    with pytest.raises(KappaTuneError, match=words):
        train(tmp_path, saved_olmoe, **changes)


def test_a_merge_leaves_files_of_others_alone(finished, tmp_path):
    docs = tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    (docs / "thesis.tex").write_text("precious")
    with pytest.raises(KappaTuneError, match="files of no checkpoint, such as figures"):
        merge_adapter(finished / "out", docs, overwrite=True)
    assert sorted(path.name for path in docs.iterdir()) == ["figures", "thesis.tex"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(KappaTuneError, match="is no folder"):
        merge_adapter(finished / "out", tmp_path / "loop")


def test_a_merge_into_a_link_the_current_folder_and_over_a_checkpoint(finished, saved_olmoe, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge_adapter(finished / "out", tmp_path / "link")
    expected = contents(tmp_path / "real")
    assert "config.json" in expected and (tmp_path / "link").is_symlink()
    (tmp_path / "real" / "model-00002-of-00002.safetensors").write_bytes(b"of an older one")
    left = tmp_path / "real" / ".real.unfinished-0123"
    (left / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "real")
    merge_adapter(finished / "out", ".", overwrite=True)
    assert contents(tmp_path / "real") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_merge_says_what_rounding_takes_away(tmp_path):
    tiny_model("llama", vocab_size=300, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    train(tmp_path, tmp_path / "base", learning_rate=5e-5, forgetting=None)
    with pytest.warns(UserWarning, match=r"rounding changes what was trained by \d+% of its size.*--dtype float32"):
        merge_adapter(tmp_path / "out", tmp_path / "rounded")
    merge_adapter(tmp_path / "out", tmp_path / "whole", dtype="float32")
    adapter, whole = (
        load_file(path)
        for path in (tmp_path / "out" / "adapter_model.safetensors", tmp_path / "whole" / "model.safetensors")
    )
    masters = {name: value for name, value in adapter.items() if name.endswith("kappatune_values.weight")}
    stored = [value for value in whole.values() if any(torch.equal(value, master) for master in masters.values())]
    assert len(stored) == len(masters) == 7


def test_values_in_another_number_format_are_refused(copy):
    path = copy / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: value.to(torch.int8) if name.endswith(".weight") else value for name, value in tensors.items()}, path
    )
    with pytest.raises(KappaTuneError, match="is I8, expected one of F64"):
        merge_adapter(copy / "out", copy / "merged")


def test_an_adapter_whose_files_disagree_is_not_merged(copy):
    """The message blames the files: nobody resumes here."""
    path = copy / "out" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["selection"]["units"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(KappaTuneError, match="1 weights only among them.*files disagree, one was damaged or edited"):
        merge_adapter(copy / "out", copy / "merged")
    assert not (copy / "merged").exists()


def test_only_models_with_adapters_are_removed(tmp_path):
    names = {
        "model.safetensors": "model.x.kappatune_weight.kappatune_master.default",
        "model_before_dpo.safetensors": "a",
    }
    names["model-00001-of-00002.safetensors"] = "b"
    for file, name in names.items():
        save_file({name: torch.ones(2)}, tmp_path / file)
    remove_models_with_adapters(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(list(names)[1:])


@pytest.mark.slow
def test_kills_at_any_time_damage_nothing(finished, tmp_path):
    """kill -9 while it merges over a checkpoint: the folder holds the old one or the new one."""
    merge_adapter(finished / "out", tmp_path / "merged")
    whole = contents(tmp_path / "merged")
    command = [sys.executable, "-m", "kappatune_plugin", "merge", str(finished / "out")]
    command += ["--output_dir", str(tmp_path / "merged"), "--overwrite"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    lasts = time.monotonic() - started
    for moment in range(8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(lasts * (0.6 + 0.05 * moment))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert contents(tmp_path / "merged") == whole
    merge_adapter(finished / "out", tmp_path / "merged", overwrite=True)
    assert contents(tmp_path / "merged") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merge_over_a_checkpoint_takes_its_place_in_one_step(finished, tmp_path, monkeypatch):
    """Where the system has no such step, the old one's config.json goes first."""
    out, calls = tmp_path / "merged", []
    merge_adapter(finished / "out", out)
    out.chmod(0o750)
    before, inode = contents(out), out.stat().st_ino
    monkeypatch.setattr(Path, "unlink", lambda path, **_: calls.append(path.name) or os.unlink(path))
    merge_adapter(finished / "out", out, overwrite=True)
    assert contents(out) == before and out.stat().st_ino != inode and "config.json" not in calls
    assert out.stat().st_mode & 0o777 == 0o750
    monkeypatch.setattr(model_folder, "exchange", lambda one, other: False)
    merge_adapter(finished / "out", out, overwrite=True)
    assert contents(out) == before and [name for name in calls if name != ".lock"][0] == "config.json"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(saved_olmoe, tmp_path):
    """kill -9 at growing times; each start resumes what is there, also when only the last measurement was missing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    changes = {"save_steps": 1, "max_steps": 4}
    train(whole, saved_olmoe, **changes)
    recipe = write_recipe(parts / "recipe.yaml", tiny_recipe(parts, saved_olmoe, **{**SETTINGS, **changes}))
    command = [sys.executable, "-m", "kappatune_plugin", "sft", "--config", str(recipe)]
    for seconds in (14, 16, 18, 20, 22, 600):
        found = list((parts / "out").glob("checkpoint-*/trainer_state.json"))
        words = ["--resume_from_checkpoint", "true"] if found else ["--overwrite_output_dir", "true"]
        try:
            subprocess.run([*command, *words], timeout=seconds, check=True, capture_output=True)
        except subprocess.TimeoutExpired:
            # `run` has killed it
            continue
    one, other = contents(whole / "out"), contents(parts / "out")
    for name in ("adapter_model.safetensors", "selection.json", "kappa_report.json", "forgetting.json"):
        assert one[name] == other[name], name
    assert one.keys() == other.keys()
