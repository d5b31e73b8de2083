"""`kappatune sft` in several processes: what `trl sft` gives to `accelerate launch`, given to it as well."""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from kappatune_plugin.errors import KappaTuneError

CONFIG = "accelerate_config"


def is_launched() -> bool:
    """Whether this process is one that accelerate, torchrun or deepspeed started."""
    return "LOCAL_RANK" in os.environ


def is_launch_key(key: str) -> bool:
    """Whether `key` speaks to `accelerate launch` (num_processes, main_process_port, ...) and not to TRL."""
    from kappatune_plugin.trl_keys import trl_keys

    return key not in trl_keys() and (key == CONFIG or key in _launch_options())


def split_words(words: Iterable[str], content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The command line's words after `kappatune sft --config X`: those for `accelerate launch`, and the others.

    Args:
        content: the recipe; its launch keys come before those of the command line.
    """
    launch = [word for key, value in content.items() if is_launch_key(str(key)) for word in _as_words(key, value)]
    rest: list[str] = []
    current = rest
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            current = launch if is_launch_key(name) else rest
        current.append(word)
    return _with_config_file(launch), rest


def launch(arguments: list[str], words: list[str]) -> None:
    """Run `kappatune WORDS` as `accelerate launch ARGUMENTS` does.

    Raises:
        KappaTuneError: a process failed; the message says which.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = launch_command_parser().parse_args([*arguments, "--module", "kappatune_plugin", *words])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise KappaTuneError(
            f"Rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}; the others were stopped. "
            "What it says is above."
        ) from error


def _with_config_file(launch: list[str]) -> list[str]:
    """`--accelerate_config NAME` as accelerate's `--config_file PATH`."""
    words = [part for word in launch for part in (word.split("=", 1) if word.startswith(f"--{CONFIG}=") else [word])]
    found = [position for position, word in enumerate(words) if word == f"--{CONFIG}"]
    if not found:
        return words
    # the command line's comes last and counts
    name = words[found[-1] + 1] if found[-1] + 1 < len(words) else ""
    for position in reversed(found):
        del words[position : position + 2]
    return ["--config_file", str(_config_file(name)), *words]


def _config_file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("trl"))) / "accelerate_configs"
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in shipped:
        raise KappaTuneError(
            f"{CONFIG}: '{name}' is neither a file nor one of TRL's configurations ({', '.join(shipped)}). Write "
            f"--{CONFIG} zero3, or the path of a file from `accelerate config`."
        )
    return folder / f"{name}.yaml"


@cache
def _launch_options() -> frozenset[str]:
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    return frozenset(option[2:].replace("-", "_") for action in actions for option in action.option_strings)


def _as_words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", str(value)]
