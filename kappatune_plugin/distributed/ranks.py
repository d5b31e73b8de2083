"""Which process this is, how many there are, and how they exchange objects."""

import os
from typing import Any

import torch.distributed as dist

# set for the processes that `launch` starts, since accelerate sets nothing for one that runs alone
LAUNCHED = "KAPPATUNE_LAUNCHED"


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes run together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join() -> None:
    """Meet the other processes that a launcher (torchrun, accelerate, deepspeed) started with this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def exchange(mine: Any) -> list[Any]:
    """Gather `mine` of every rank, in the order of ranks, on all of them. Collective; for anything that pickles."""
    if world() == 1:
        return [mine]
    everything: list[Any] = [None] * world()
    dist.all_gather_object(everything, mine)
    return everything


def from_first(value: Any) -> Any:
    """Broadcast the first rank's `value` to all. Collective; for anything that pickles."""
    return exchange(value if rank() == 0 else None)[0]


def switched_on(variable: str) -> bool:
    """Whether the environment variable is set to one of accelerate's words for true."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def is_launched() -> bool:
    """Whether this process is one that accelerate, torchrun or deepspeed started."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ
