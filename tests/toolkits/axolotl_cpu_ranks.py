"""An Axolotl plugin for the tests: several ranks without a GPU, which Axolotl takes for granted."""

from typing import Any

from axolotl.integrations.base import BasePlugin


class CpuRanks(BasePlugin):
    """Gloo in the place of NCCL, and the model on the CPU."""

    def register(self, cfg: dict[str, Any]) -> None:
        if not cfg.get("deepspeed"):
            return
        import deepspeed
        import deepspeed.comm

        original = deepspeed.comm.init_distributed

        def init_distributed(dist_backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return original("gloo" if dist_backend == "nccl" else dist_backend, *args, **kwargs)

        deepspeed.init_distributed = deepspeed.comm.init_distributed = init_distributed

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        # the last hook before Axolotl reads it
        cfg.device_map = {"": "cpu"}
