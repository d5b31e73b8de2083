"""Python imports this at its start where this folder is on PYTHONPATH: several processes on a machine without a GPU.

accelerate and DeepSpeed take it for granted that processes which run together have one each.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from typing import Any


def accelerate_state(module: Any) -> None:
    """gloo where accelerate finds no backend, for DeepSpeed, and FSDP where it sees no GPU."""
    real = module.PartialState._prepare_backend

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> tuple:
        found = real(self, cpu, sagemaker_dp, backend)
        if "LOCAL_RANK" not in os.environ or cpu:
            return found
        return "gloo", module.DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = module.torch.device("cpu")

    module.PartialState._prepare_backend = prepare
    module.PartialState.set_device = set_device


def deepspeed_comm(module: Any) -> None:
    """gloo alone: DeepSpeed's own extension for the CPU would have to be compiled, minutes on busy cores."""
    module.build_shm_op = lambda: None


def training_args(module: Any) -> None:
    module.is_torch_bf16_gpu_available = lambda: True


PATCHES = {
    "accelerate.state": accelerate_state,
    "deepspeed.comm.torch": deepspeed_comm,
    "transformers.training_args": training_args,
}


class Patcher(MetaPathFinder):
    """Changes a module right after it was imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader.exec_module = partial(_run_and_patch, spec.loader.exec_module, patch)
                return spec
        return None


def _run_and_patch(run: Callable[[Any], None], patch: Callable[[Any], None], module: Any) -> None:
    run(module)
    patch(module)


sys.meta_path.insert(0, Patcher())
