"""`kappatune sft` in several processes: what `trl sft` gives to `accelerate launch`, given to it as well."""

import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from kappatune_plugin.errors import KappaTuneError

CONFIG = "accelerate_config"
# set for the processes that `launch` starts: accelerate tells one that runs alone nothing
LAUNCHED = "KAPPATUNE_LAUNCHED"


def is_launched() -> bool:
    """Whether this process is one that accelerate, torchrun or deepspeed started."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ


def starts_several() -> bool:
    """Whether `trl sft` may start several processes here: there are several GPUs, or `accelerate config` was run."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.accelerator.device_count() > 1 or Path(default_config_file).is_file()


def warn_of_unused(content: Mapping[str, Any]) -> None:
    """Say which launch keys of a recipe are not used, where it isn't `kappatune sft` that starts the processes."""
    keys = [str(key) for key in content if is_launch_key(str(key))]
    if keys and LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0":
        why = "a launcher has started the processes" if is_launched() else "only `kappatune sft` starts processes"
        warnings.warn(f"{', '.join(keys)}: not used, {why}.", stacklevel=3)


def is_launch_key(key: str) -> bool:
    """Whether `key` speaks to `accelerate launch` (num_processes, main_process_port, ...) and not to TRL."""
    from kappatune_plugin.recipe_yaml import BLOCKS
    from kappatune_plugin.trl_keys import trl_keys

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


def launch(arguments: list[str], words: list[str]) -> None:
    """Run `kappatune WORDS` as `accelerate launch ARGUMENTS` does.

    Raises:
        KappaTuneError: a process failed; the message says which.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = launch_command_parser().parse_args([*arguments, "--module", "kappatune_plugin", *words])
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:
        raise KappaTuneError(f"The process ended with exit code {error.returncode}. What it says is above.") from error
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
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    return frozenset(option[2:].replace("-", "_") for option in options)


def _as_words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", str(value)]
