"""What a run may write in its output_dir: its own files, whole, and those of an earlier run only when it may."""

import os
import re
import shutil
from pathlib import Path

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import as_umask_says, check_replaceable, check_writable, opening
from kappatune_plugin.forgetting.callback import ANSWERS
from kappatune_plugin.tuner.adapter_folder import ADAPTER, ADAPTER_CONFIG

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# tells a recipe.yaml that a run left from one that somebody wrote
RESOLVED = "# The recipe as it was run, with all overrides. Written by kappatune; env and secrets are left out.\n"
SELECTION, REPORT, FORGETTING, RECIPE = "selection.json", "kappa_report.json", "forgetting.json", "recipe.yaml"
OPENINGS = {
    SELECTION: opening("k"),
    REPORT: opening("units"),
    FORGETTING: opening("control"),
}
UNFINISHED = ".unfinished"


def check_output_dir(output_dir: Path, recipe_folder: Path, model: str, resumes: bool, overwrite: bool) -> None:
    """Refuse, before anything is loaded, a folder where a run would destroy what it doesn't own.

    Args:
        recipe_folder: where the recipe is.
        model: the base model's folder or name.
        resumes: whether the run goes on from a checkpoint.
        overwrite: the recipe's `overwrite_output_dir`.

    Raises:
        KappaTuneError: it can't be written, is the model's own folder, holds files of somebody else under names that a
            run writes, or an earlier run that neither is resumed nor may be overwritten.
    """
    for name, begins in OPENINGS.items():
        check_replaceable(output_dir / name, begins)
    if not _is_older_run(output_dir, recipe_folder):
        check_replaceable(output_dir / RECIPE, re.escape(RESOLVED))
    if os.path.isdir(model) and output_dir.resolve() == Path(model).resolve():
        raise KappaTuneError(f"output_dir '{output_dir}' is the base model's own folder. Give another one.")
    check_writable(output_dir)
    if resumes or overwrite:
        return
    if holds_adapter(output_dir):
        raise KappaTuneError(
            f"output_dir '{output_dir}' holds a finished run. Give another output_dir, or write "
            "`overwrite_output_dir: true` to replace it when training begins."
        )
    if found := checkpoints(output_dir):
        raise KappaTuneError(
            f"output_dir '{output_dir}' holds a run that hasn't finished ({found[-1].name}). Write "
            "`resume_from_checkpoint: true` to go on with it, `overwrite_output_dir: true` to start anew without it, "
            "or give another output_dir."
        )


def _is_older_run(output_dir: Path, recipe_folder: Path) -> bool:
    """Whether a run left the folder whose recipe.yaml may not say yet that a run wrote it."""
    left = (output_dir / SELECTION).exists() and (holds_adapter(output_dir) or bool(checkpoints(output_dir)))
    return left and output_dir.resolve() != recipe_folder.resolve()


def holds_adapter(output_dir: Path) -> bool:
    """Whether a run was trained to its end there."""
    return (output_dir / ADAPTER).exists()


def clear(output_dir: Path) -> None:
    """Delete an earlier run: its adapter, its checkpoints and its reports; other files stay."""
    for name in (ADAPTER_CONFIG, ADAPTER, RECIPE, ANSWERS, *OPENINGS):
        (output_dir / name).unlink(missing_ok=True)
    for folder in checkpoints(output_dir):
        shutil.rmtree(folder)


def staging(output_dir: Path) -> Path:
    """A fresh folder in `output_dir` to save to before `publish`; what a killed run left in it is deleted."""
    folder = output_dir / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish(folder: Path, output_dir: Path) -> None:
    """Move all files of `folder` into `output_dir`, over those of the same names, each in one step; values first."""
    as_umask_says(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG):
        os.replace(path, output_dir / path.name)
    folder.rmdir()


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, complete or not, by step."""
    found = [(CHECKPOINT.fullmatch(folder.name), folder) for folder in output_dir.glob("checkpoint-*")]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found if match)]
