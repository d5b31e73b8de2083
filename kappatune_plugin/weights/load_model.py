"""Load a model from a folder or the hub, with or without its values."""

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kappatune_plugin.errors import KappaTuneError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig

# hundreds are the most that anybody has trained
MOST_LAYERS = 100_000


def load_model(path: str, trust_remote_code: bool = False) -> nn.Module:
    """The model in the folder `path` or of that name on the hub, on the CPU, in the dtype it was saved in.

    Raises:
        KappaTuneError: transformers can't load it, or the checkpoint lacks weights.
    """
    options = {"trust_remote_code": trust_remote_code}
    try:
        loader = model_class(model_config(path, trust_remote_code))
        model, info = loader.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
    except KappaTuneError:
        raise
    except Exception as error:
        # transformers raises anything here: OSError, ValueError, KeyError, SafetensorError, errors of remote code
        raise cannot_load(path, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise KappaTuneError(
            f"'{path}' lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: they would be "
            "random numbers. Load the model yourself and scan it, or repair the checkpoint."
        )
    return model


def empty_model(path: str, trust_remote_code: bool = False) -> nn.Module:
    """The same model without values: its parameters are on the meta device."""
    config = model_config(path, trust_remote_code)
    loader = model_class(config)
    with torch.device("meta"):
        if hasattr(loader, "from_config"):
            return loader.from_config(config, trust_remote_code=trust_remote_code)
        return loader._from_config(config)


def trained_without_values(model: nn.Module, config: "PeftConfig") -> tuple["PeftModel", int]:
    """`model` with PEFT's adapter, which has no values either, and how many parameters it would train.

    Raises:
        ValueError, TypeError, RuntimeError, ...: whatever PEFT raises for a config that doesn't fit the model.
    """
    from peft import get_peft_model

    with torch.device("meta"), warnings.catch_warnings():
        # PEFT's warnings are about training, and this model is only looked at
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted, sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def model_config(path: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config in the folder `path` or of that name on the hub. Raises KappaTuneError if there is none to build."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise cannot_load(path, error) from error
    layers = getattr(getattr(config, "text_config", config), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        # transformers would build them until the memory is full
        raise KappaTuneError(
            f"The config.json of '{path}' is damaged: num_hidden_layers is {layers}, expected at most "
            f"{MOST_LAYERS}. Download it again."
        )
    return config


def model_class(config: "PretrainedConfig") -> Any:
    """The class that the checkpoint was saved from; if unknown, AutoModelForCausalLM, else AutoModel."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is not None:
        return architecture
    remote = getattr(config, "auto_map", None) or {}
    causal = "AutoModelForCausalLM" in remote or type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModel


def cannot_load(path: str, error: Exception) -> KappaTuneError:
    """The error for a model that transformers can't load."""
    # transformers takes a path that doesn't exist for a wrong hub name
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    reason = f"{type(error).__name__}: {error}" if os.path.exists(path) or not is_path else "there is no such folder."
    return KappaTuneError(
        f"Can't load a model from '{path}': {reason}\nGive a folder that `save_pretrained` wrote, or a model's name on "
        "the hub."
    )
