"""`kappatune sft` in several processes: what `trl sft` gives to `accelerate launch`, given to it as well."""

import os
import subprocess
from pathlib import Path

from kappatune_plugin.distributed.ranks import LAUNCHED
from kappatune_plugin.errors import KappaTuneError


def starts_several() -> bool:
    """Whether `trl sft` may start several processes here: there are several GPUs, or `accelerate config` was run."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.accelerator.device_count() > 1 or Path(default_config_file).is_file()


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
