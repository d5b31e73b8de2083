"""Which process this is, how many there are, and how they exchange objects."""

import os
from typing import Any

import torch.distributed as dist

# set for the processes that `launch` starts: accelerate tells one that runs alone nothing
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
    """What each rank gives, in the order of the ranks, on all of them. Collective; anything that pickles."""
    if world() == 1:
        return [mine]
    everything: list[Any] = [None] * world()
    dist.all_gather_object(everything, mine)
    return everything


def from_first(value: Any) -> Any:
    """The first rank's value, on all of them. Collective; anything that pickles."""
    return exchange(value if rank() == 0 else None)[0]


def switched_on(variable: str) -> bool:
    """Whether the environment's `variable` says yes, as accelerate spells it."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def is_launched() -> bool:
    """Whether this process is one that accelerate, torchrun or deepspeed started."""
    return "LOCAL_RANK" in os.environ or LAUNCHED in os.environ
