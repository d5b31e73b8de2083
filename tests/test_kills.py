"""kill -9 at random moments of commands that write: nothing saved is damaged, and the next start ends as ever.

KAPPATUNE_KILLS says how many times each is killed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin.cli import app
from kappatune_plugin.study import session  # noqa: F401  what a command imports, before its time is taken

KILLS = int(os.environ.get("KAPPATUNE_KILLS", "20"))
# what differs between two runs of the same recipe
OF_ITS_TIME = ("trainer_state.json", "training_args.bin", ".png", "README.md", "interpolation.json")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")]


def start(*words: object) -> int:
    """The process that runs `kappatune WORDS`, with everything imported already."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
            app([str(word) for word in words])
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os._exit(code)


def finish(*words: object) -> float:
    """Run the command to its end; its seconds."""
    started = time.monotonic()
    _, status = os.waitpid(start(*words), 0)
    assert status == 0, words
    return time.monotonic() - started


def kill(seconds: float, *words: object) -> bool:
    """Start the command and kill it after so long; whether it was still running."""
    pid = start(*words)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in it, but for those that tell of when they were made."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(OF_ITS_TIME)}


def check_whole(folder: Path) -> None:
    """Every file under its final name can be read."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") or "unfinished" in part or "checkpoint-" in part for part in path.parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert [file.get_tensor(name) for name in file.keys()]


def kill_again_and_again(
    folder: Path, lasts: float, words: list[object], check: Callable[[], None], fresh: Callable[[], None]
) -> int:
    """Kill the command at moments spread over all its time and `check` what it left; how often it was at work."""
    chance, killed = random.Random(0), 0
    fresh()
    # the first time took the files into memory
    lasts = min(lasts, finish(*words))
    for number in range(KILLS):
        fresh()
        killed += kill(lasts * (number + chance.random()) / KILLS, *words)
        check_whole(folder)
        check()
    print(f"{words[0]}: {killed} of {KILLS} killed within {lasts:.1f} s", file=sys.stderr)
    assert killed > KILLS / 3
    return killed


@pytest.fixture(scope="module")
def trained(saved_olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output_dir, with its recipe beside it. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(folder, saved_olmoe, save_strategy="steps", save_steps=1, max_steps=3)
    finish("sft", "--config", write_recipe(folder / "recipe.yaml", recipe))
    return folder / "out"


def test_sft(trained: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", trained.parent / "recipe.yaml"
    words = ["sft", "--config", config, "--output_dir", out]
    lasts, whole = finish(*words), contents(out)

    def check() -> None:
        """Started again, and killed once more while it goes on, it ends as if nothing had been."""
        for seconds in (lasts / 2, None):
            found = list(out.glob("checkpoint-*/trainer_state.json"))
            more = ["--resume_from_checkpoint", "true"] if found else ["--overwrite_output_dir", "true"]
            if seconds is None:
                finish(*words, *more)
            else:
                kill(seconds, *words, *more)
        again = contents(out)
        assert again.keys() == whole.keys()
        for name in ("adapter_model.safetensors", "selection.json", "kappa_report.json", "forgetting.json"):
            assert again[name] == whole[name], name

    kill_again_and_again(tmp_path, lasts, words, check, lambda: shutil.rmtree(out, ignore_errors=True))


def test_a_finished_run_stays_finished(trained: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", trained.parent / "recipe.yaml"
    words = ["sft", "--config", config, "--output_dir", out]
    lasts, whole = finish(*words), contents(out)
    words += ["--resume_from_checkpoint", "true"]

    def check() -> None:
        found = contents(out)
        # which says that it is resumed
        assert [name for name in whole if name != "recipe.yaml" and found.get(name) != whole[name]] == []

    chance = random.Random(1)
    for _ in range(max(2, KILLS // 4)):
        kill(lasts * chance.random(), *words)
        check()
    finish(*words)
    check()


@pytest.mark.parametrize("command", ["merge", "export --as patch", "export --as lora", "interpolate"])
def test_what_writes_a_folder(trained: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    words: list[object] = [*command.split(), trained, "--output_dir", out]
    if command == "interpolate":
        rows = {"path": str(trained.parent / "test.jsonl")}
        words += ["--config", trained.parent / "recipe.yaml", "--max_delta", 0.5, "--data.validation", json.dumps(rows)]
    lasts, whole = finish(*words), contents(out)

    def check() -> None:
        assert not out.exists() or contents(out) == whole
        if not out.exists():
            finish(*words)
        assert contents(out) == whole and [path.name for path in tmp_path.iterdir()] == ["out"]

    kill_again_and_again(tmp_path, lasts, words, check, lambda: shutil.rmtree(out, ignore_errors=True))


def test_scan(saved_olmoe: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ["scan", saved_olmoe, "--output", report]
    lasts = finish(*words, "--no-cache")
    whole = report.read_bytes()

    def check() -> None:
        assert not report.exists() or report.read_bytes() == whole
        finish(*words)
        assert report.read_bytes() == whole

    def fresh() -> None:
        report.unlink(missing_ok=True)
        shutil.rmtree(os.environ["KAPPATUNE_CACHE"], ignore_errors=True)

    kill_again_and_again(tmp_path, lasts, words, check, fresh)


def test_compare(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compare", "--config", trained.parent / "recipe.yaml", "--methods", "lowest,lora", "--seeds", 2]
    words += ["--learning_rates", "1e-2", "--smooth", 2, "--output_dir", out]
    lasts, whole = finish(*words), _measured(out)

    def check() -> None:
        finish(*words)
        assert _measured(out) == whole

    kill_again_and_again(tmp_path, lasts, words, check, lambda: shutil.rmtree(out, ignore_errors=True))


def _measured(folder: Path) -> dict:
    content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    for method in content["methods"]:
        del method["seconds"]
    return content
