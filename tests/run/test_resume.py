"""Checkpoints that a kill left half written are skipped, named and never trusted."""

import shutil
from pathlib import Path

import pytest

from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError, Selection
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.resume import checkpoint_problems, checkpoint_to_resume
from kappatune_plugin.run.train import run_sft
from kappatune_plugin.tuner.saved_selection import check_selection, keep_selection

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
)


@pytest.fixture(scope="module")
def run(saved_olmoe, tmp_path_factory) -> Path:
    """The output_dir of a run with checkpoints at steps 2 and 4. Read only."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(folder, saved_olmoe, save_strategy="steps", save_steps=2, forgetting=None)
    return run_sft(load_recipe(write_recipe(folder / "recipe.yaml", recipe))).output_dir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "out"))


def test_the_last_complete_one_is_taken(copy):
    assert checkpoint_to_resume(True, copy) == str(copy / "checkpoint-4")
    assert checkpoint_to_resume(str(copy / "checkpoint-2"), copy) == str(copy / "checkpoint-2")
    assert checkpoint_to_resume(None, copy) is None


def test_steps_are_numbers_not_words(copy):
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-10")
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-backup")
    assert checkpoint_to_resume(True, copy) == str(copy / "checkpoint-10")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_each_file_missing_or_cut_short(copy, name, harm):
    file = copy / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink() if harm == "missing" else file.write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
    problems = checkpoint_problems(copy / "checkpoint-4")
    assert len(problems) == 1 and name in problems[0]
    with pytest.warns(UserWarning, match=f"Resuming from checkpoint-2, since checkpoint-4 is not complete: {name}"):
        assert checkpoint_to_resume(True, copy) == str(copy / "checkpoint-2")
    with pytest.raises(KappaTuneError, match=f"is not a complete checkpoint: {name}"):
        checkpoint_to_resume(str(copy / "checkpoint-4"), copy)


@pytest.mark.parametrize("name", ["selection.json", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"])
def test_what_fsdp2_divides_over_files(copy, name):
    """SHARDED_STATE_DICT leaves no adapter; `.metadata` comes last."""
    folder = copy / "checkpoint-4"
    for adapter in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"):
        (folder / adapter).unlink()
    shutil.copy(copy / "selection.json", folder)
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / part).mkdir()
        (folder / part / ".metadata").write_bytes(b"all parts")
    assert checkpoint_problems(folder) == []
    (folder / name).write_bytes(b"")
    assert [problem.split()[0] for problem in checkpoint_problems(folder)] == [name]
    (folder / name).unlink()
    assert checkpoint_problems(folder) == [f"{name} is missing"]


def test_another_selection_is_refused(copy):
    selection = Selection.load(copy / "selection.json")
    names = [unit.name for unit in selection.units]
    check_selection(copy / "checkpoint-4", names)
    for file in ("adapter_config.json", "selection.json"):
        with pytest.raises(KappaTuneError, match="1 weights only in the checkpoint .*, 1 only here .other.weight"):
            check_selection(copy / "checkpoint-4", [*names[1:], "other.weight"])
        (copy / "checkpoint-4" / file).unlink(missing_ok=True)
        keep_selection(copy / "checkpoint-4", selection)


def test_none_complete_is_an_error(copy, tmp_path):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(KappaTuneError, match=r"checkpoint-4 is not complete.*checkpoint-2 is not complete"):
        checkpoint_to_resume(True, copy)
    assert checkpoint_to_resume(True, copy, save_only_model=True) == str(copy / "checkpoint-4")
    with pytest.raises(KappaTuneError, match="there is none at all"):
        checkpoint_to_resume(True, tmp_path / "empty")
    with pytest.raises(KappaTuneError, match="it is not a folder"):
        checkpoint_to_resume(str(tmp_path / "empty"), copy)
    with pytest.raises(KappaTuneError, match="it is not a folder"):
        checkpoint_to_resume("m" * 300, copy)
