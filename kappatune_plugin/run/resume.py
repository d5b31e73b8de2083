"""Which checkpoint of a run can be resumed: a save that was killed leaves a folder that looks like one."""

import json
import os
import warnings
import zipfile
from pathlib import Path

from safetensors import safe_open

from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.run.output_dir import checkpoints
from kappatune_plugin.tuner.adapter_folder import ADAPTER, ADAPTER_CONFIG
from kappatune_plugin.tuner.saved_selection import SELECTION, SHARDS


def checkpoint_to_resume(wanted: str | bool | None, output_dir: Path, save_only_model: bool = False) -> str | None:
    """The folder for `trainer.train(resume_from_checkpoint=...)`, None to start anew.

    Args:
        wanted: the recipe's `resume_from_checkpoint`; True means the last complete checkpoint in `output_dir`. One
            that is skipped because its saving was interrupted gives a warning.
        save_only_model: the checkpoints have no optimizer.

    Raises:
        KappaTuneError: there is no complete checkpoint, or the one asked for isn't complete.
    """
    if not wanted:
        return None
    if isinstance(wanted, str):
        problems = checkpoint_problems(Path(wanted), save_only_model)
        if problems:
            raise KappaTuneError(
                f"resume_from_checkpoint: '{wanted}' is not a complete checkpoint: {'; '.join(problems)}. "
                "Give another one, or write `resume_from_checkpoint: true` for the last complete one."
            )
        return wanted
    skipped = []
    for folder in reversed(checkpoints(output_dir)):
        problems = checkpoint_problems(folder, save_only_model)
        if not problems:
            if skipped:
                warnings.warn(f"Resuming from {folder.name}, since {' '.join(skipped)}", stacklevel=2)
            return str(folder)
        skipped.append(f"{folder.name} is not complete: {'; '.join(problems)}.")
    found = " ".join(skipped) or "there is none at all."
    raise KappaTuneError(
        f"resume_from_checkpoint: no complete checkpoint in '{output_dir}': {found} Check output_dir, or delete "
        "resume_from_checkpoint to start anew."
    )


def checkpoint_problems(folder: Path, save_only_model: bool = False) -> list[str]:
    """What keeps the checkpoint in `folder` from being complete; reads no tensor."""
    # which is false, and no error, for a name that no file can have
    if not os.path.isdir(folder):
        return ["it is not a folder"]
    adapter = [(ADAPTER_CONFIG, _check_json), (ADAPTER, _check_safetensors)]
    # .metadata is written when all ranks have written theirs
    shards = [(SELECTION, _check_json), (f"{SHARDS}/.metadata", _check_not_empty)]
    checks = [*(shards if (folder / SHARDS).is_dir() else adapter), ("trainer_state.json", _check_json)]
    if not save_only_model and (folder / SHARDS).is_dir():
        checks += [("scheduler.pt", _check_zip), ("optimizer_0/.metadata", _check_not_empty)]
    elif not save_only_model:
        checks += [("scheduler.pt", _check_zip), *((name, _check_zip) for name in _optimizer_files(folder))]
    problems = _world_problems(folder)
    for name, check in checks:
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            check(folder / name)
        except Exception as error:
            # each reader has errors of its own: JSONDecodeError, SafetensorError, BadZipFile, OSError
            problems.append(f"{name} is damaged ({error})")
    return problems


def _optimizer_files(folder: Path) -> list[str]:
    """What holds the optimizer: DeepSpeed and FSDP have files of their own."""
    if list(folder.glob("global_step*")):
        # written last, when all ranks have written theirs
        latest = folder / "latest"
        tag = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
        states = [f"{tag}/{path.name}" for path in sorted((folder / tag).glob("*_states.pt"))] if tag else []
        return states or ["latest"]
    if list(folder.glob("pytorch_model_fsdp*")):
        return ["pytorch_model_fsdp.bin", "optimizer.bin"]
    return ["optimizer.pt"]


def _world_problems(folder: Path) -> list[str]:
    """DeepSpeed's optimizer states fit the number of ranks that saved them."""
    saved = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if saved in (0, ranks.world()):
        return []
    return [
        f"DeepSpeed saved it on {saved} ranks and can't load it on {ranks.world()} (run it on {saved}, or start "
        "anew; DDP and FSDP resume on any number)"
    ]


def _check_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _check_safetensors(path: Path) -> None:
    # opening compares the file's size with what its header announces
    with safe_open(path, framework="pt") as file:
        if not list(file.keys()):
            raise ValueError("it holds no tensors")


def _check_zip(path: Path) -> None:
    # torch.save writes a zip file; its directory comes last, so a file that was cut short has none
    with zipfile.ZipFile(path) as file:
        if not file.namelist():
            raise ValueError("it is empty")


def _check_not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
