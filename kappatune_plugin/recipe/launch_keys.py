"""Which keys of a recipe speak to `accelerate launch`, and how they are given to it."""

import os
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from kappatune_plugin.distributed.ranks import LAUNCHED, is_launched
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.text import BLOCKS
from kappatune_plugin.recipe.trl_keys import trl_keys

CONFIG = "accelerate_config"


def warn_of_unused(content: Mapping[str, Any]) -> None:
    """Say which launch keys of a recipe are not used, where it isn't `kappatune sft` that starts the processes."""
    keys = [str(key) for key in content if is_launch_key(str(key))]
    if keys and LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0":
        why = "a launcher has started the processes" if is_launched() else "only `kappatune sft` starts processes"
        warnings.warn(f"{', '.join(keys)}: not used, {why}.", stacklevel=3)


def is_launch_key(key: str) -> bool:
    """Whether `key` speaks to `accelerate launch` (num_processes, main_process_port, ...) and not to TRL."""
    # a recipe's `env` is a block, accelerate's an option
    return key not in trl_keys() and key not in BLOCKS and (key == CONFIG or key in _launch_options())


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
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    return frozenset(option[2:].replace("-", "_") for option in options)


def _as_words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", str(value)]
