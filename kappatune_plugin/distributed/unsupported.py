"""Modes of training in which something can't work, each as a message that says what to write instead."""

import os
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from kappatune_plugin.distributed import ranks, shards
from kappatune_plugin.errors import KappaTuneError

FSDP1 = (
    "FSDP's first version flattens several weights into one, in which a matrix can't be found: use its second "
    "(`--accelerate_config fsdp2`, `fsdp_version: 2`)."
)

OFFLOADED = (
    "{name} is offloaded by accelerate (cpu_offload, disk_offload, or a device_map with parts on the CPU or a disk): "
    "its values are there only while it runs, so it can't be ranked or trained. Load the model whole on a device, "
    "divide it over GPUs (device_map), or offload by ZeRO-3."
)


def offloads(module: nn.Module) -> bool:
    """Whether a hook of accelerate takes the values of `module` away between two forwards."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))


def check_mode(model: nn.Module, args: Any) -> None:
    """Raise KappaTuneError if training `model` in a Trainer with the arguments `args` would fail or save nothing."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    zero3 = is_deepspeed_zero3_enabled()
    problem = devices_problem(args) or (FSDP1 if is_fsdp1(model) else None)
    problem = problem or checkpointing_problem(model, _finds_unused(args), version("deepspeed") if zero3 else None)
    problem = problem or (saving_problem(deepspeed_config()["zero_optimization"]) if zero3 else None)
    if problem:
        raise KappaTuneError(problem)


def devices_problem(training_args: Any) -> str | None:
    """Why a Trainer with these arguments can't train here: one process that sees several GPUs; None if it can."""
    if training_args.n_gpu <= 1:
        return None
    return (
        f"This one process sees {training_args.n_gpu} GPUs, and torch.nn.DataParallel isn't supported. Start one for "
        f"each (`kappatune sft --num_processes {training_args.n_gpu}`, `torchrun --nproc_per_node "
        f"{training_args.n_gpu}`), or let it see one: CUDA_VISIBLE_DEVICES=0."
    )


def is_fsdp1(model: nn.Module) -> bool:
    """Whether `model` has modules wrapped by the first version of FSDP."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def fsdp_problem(training_args: Any) -> str | None:
    """Why FSDP as requested can't run here, as far as is known before the model is loaded; None if it can."""
    launched = ranks.switched_on("ACCELERATE_USE_FSDP")
    if launched and not training_args.fsdp and os.environ.get("FSDP_VERSION", "1") == "1":
        return FSDP1
    offloads = training_args.fsdp and (training_args.fsdp_config or {}).get("cpu_offload")
    if not (offloads or (launched and ranks.switched_on("FSDP_OFFLOAD_PARAMS"))):
        return None
    if torch.accelerator.is_available():
        return None
    # it pins offloaded memory for copies to a GPU
    return "FSDP2 offloads to the CPU from a GPU, and this machine has none: delete cpu_offload (fsdp_offload_params)."


def _finds_unused(args: Any) -> bool:
    """Whether the Trainer of `args` runs DDP with its search for unused parameters, the default for PEFT models."""
    ddp = ranks.world() > 1 and args.deepspeed_plugin is None and args.ddp_find_unused_parameters is not False
    return ddp and not shards.shards_with_fsdp()


def checkpointing_problem(model: nn.Module, finds_unused: bool, deepspeed: str | None) -> str | None:
    """Why the gradient checkpointing of `model` would fail; None if it won't.

    Args:
        deepspeed: DeepSpeed's version if ZeRO-3 partitions the model.
    """
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    reentrant = {getattr(function, "keywords", {}).get("use_reentrant") for function in functions}
    if True in reentrant and finds_unused:
        return (
            "Re-entrant gradient checkpointing fails under DDP while it looks for unused parameters: write "
            "`gradient_checkpointing_kwargs: {use_reentrant: false}`, or `ddp_find_unused_parameters: false`."
        )
    if False in reentrant and deepspeed is not None and Version(deepspeed) < Version("0.19"):
        return (
            f"Non-reentrant gradient checkpointing fails under ZeRO-3 of DeepSpeed {deepspeed} where weights are "
            "frozen: write `gradient_checkpointing_kwargs: {use_reentrant: true}`, or install deepspeed>=0.19."
        )
    return None


def saving_problem(zero3: dict[str, Any]) -> str | None:
    """Why the Trainer would save no adapter; None if it will. `zero3` is DeepSpeed's `zero_optimization` of stage 3."""
    if zero3.get("stage3_gather_16bit_weights_on_model_save") or Version(version("transformers")) >= Version("5.6"):
        return None
    return (
        f"With transformers {version('transformers')} a run under ZeRO-3 saves no adapter unless zero_optimization "
        "has `stage3_gather_16bit_weights_on_model_save: true` (accelerate's `zero3_save_16bit_model`): write that."
    )
