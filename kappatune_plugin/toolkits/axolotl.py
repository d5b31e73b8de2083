"""KappaTune as an adapter of Axolotl (0.17 or later). In its YAML:

plugins: [kappatune_plugin.toolkits.axolotl.KappaTunePlugin]
adapter: kappatune
kappatune:
  k: 75
"""

from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.toolkits.shared import (
    WriteDecisions,
    kappatune_config,
    new_adapter,
    remove_models_with_adapters,
    trained_adapter,
)
from kappatune_plugin.tuner.adapter_folder import is_adapter
from kappatune_plugin.version import NAME
from kappatune_plugin.weights.quantized import whole_model

try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin

    from kappatune_plugin.toolkits.axolotl_args import KappaTuneArgs, axolotl_problems
except ImportError as error:
    # as an ImportError, Axolotl would print it and train on without the plugin
    raise KappaTuneError(
        f"KappaTune needs Axolotl 0.17 or later, with its adapters from plugins ({error}): pip install -U axolotl"
    ) from error


class KappaTunePlugin(BasePlugin):
    """The adapter `kappatune`: Axolotl trains, resumes, saves and merges it as it does LoRA."""

    _inference = False

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the configuration as written, before Axolotl fills in defaults.

        Raises:
            KappaTuneError: everything in it that contradicts KappaTune or would be ignored.
        """
        problems = axolotl_problems(cfg)
        if problems:
            raise KappaTuneError("\n  - ".join(["Axolotl's configuration doesn't fit KappaTune:", *problems]))
        # `axolotl inference` sets a key that its checked configuration lacks, and loads as `train` does
        self._inference = bool(cfg.get("inference"))
        if cfg.get("merge_lora"):
            # the other way knows only LoRA's matrices
            cfg["merge_method"] = "legacy"

    def get_input_args(self) -> str:
        """Where Axolotl finds the schema of the block."""
        return f"{KappaTuneArgs.__module__}.{KappaTuneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, not of LoRA's kind."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig | None] | None:
        """A new adapter on `model`, or the one in `lora_model_dir`; for DPO, KTO and IPO only the config of a new one.

        Raises:
            KappaTuneError: there is no trained adapter to merge or to run, or it was trained with other settings.
        """
        if cfg.adapter != NAME:
            return None
        given = {key: value for key, value in (cfg.kappatune or {}).items() if value is not None}
        if cfg.lora_modules_to_save:
            given["modules_to_save"] = list(cfg.lora_modules_to_save)
        inference = bool(inference or self._inference or cfg.merge_lora)
        folder = cfg.lora_model_dir or (_output(cfg) if inference else None)
        if config_only:
            if folder:
                raise KappaTuneError(
                    f"rl: {cfg.rl} starts a new adapter, it can't go on with lora_model_dir '{folder}'. Merge that "
                    "one into a base_model first."
                )
            return None, kappatune_config(model, given)
        if cfg.merge_lora:
            # `merge-lora` writes plain checkpoints
            model = whole_model(model)
        dtype = cfg.peft_autocast_adapter_dtype
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        if folder:
            model = trained_adapter(model, folder, given, trainable=not inference, **options)
        else:
            model = new_adapter(model, given, **options)
        if cfg.local_rank in (0, None):
            model.print_trainable_parameters()
        return model, model.peft_config["default"]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Write selection.json and kappa_report.json beside the adapter."""
        return [WriteDecisions()] if cfg.adapter == NAME else []

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Remove the weights that `rl` writes beside the adapter: the whole model with the adapter's parts in it."""
        if cfg.adapter == NAME and cfg.rl and cfg.local_rank in (0, None):
            remove_models_with_adapters(cfg.output_dir)


def _output(cfg: Any) -> str:
    """The folder of the trained adapter. Raises if there is none: `inference` would answer with the untrained base."""
    if cfg.output_dir and is_adapter(cfg.output_dir):
        return cfg.output_dir
    raise KappaTuneError(
        f"There is no trained adapter in output_dir '{cfg.output_dir}'. Train first, or say where it is: "
        "--lora-model-dir=DIR."
    )
