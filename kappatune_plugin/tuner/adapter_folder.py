"""The adapter of any PEFT method, in a folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kappatune_plugin.errors import KappaTuneError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


def adapter_config(adapter: Path) -> "PeftConfig":
    """The config in a folder. Raises KappaTuneError if there is none, or none that PEFT can read."""
    from peft import PeftConfig

    if not (adapter / ADAPTER_CONFIG).is_file():
        raise KappaTuneError(f"'{adapter}' holds no {ADAPTER_CONFIG}. Give the output_dir of a run.")
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except KeyError as error:
        raise KappaTuneError(f"{adapter / ADAPTER_CONFIG}: peft_type {error} is no method of PEFT.") from error
    except (ValueError, TypeError, OSError) as error:
        raise KappaTuneError(f"Can't read {adapter / ADAPTER_CONFIG}: {error}") from error


def check_adapter(adapter: Path) -> None:
    """Raise KappaTuneError for an adapter whose values are missing or damaged.

    PEFT looks for a missing file on the hub, and takes one without values for an untrained adapter.
    """
    from safetensors import SafetensorError, safe_open

    weights = adapter / ADAPTER
    if not weights.is_file():
        raise KappaTuneError(
            f"Can't load the adapter '{adapter}': it holds no {ADAPTER}. Give the output_dir of a run that ended, or "
            "one of its checkpoints."
        )
    try:
        with safe_open(weights, "pt") as file:
            empty = not list(file.keys())
    except (OSError, SafetensorError) as error:
        raise KappaTuneError(
            f"Can't load the adapter '{adapter}': {ADAPTER} is damaged or cut off ({error}). Copy it again, or give "
            "another checkpoint of the run."
        ) from error
    if empty:
        raise KappaTuneError(f"Can't load the adapter '{adapter}': {ADAPTER} holds no values. Copy it again.")


def load_adapter(model: "nn.Module", adapter: Path) -> "PeftModel":
    """`model` with the adapter on it. Raises KappaTuneError if it can't be loaded, or isn't this model's."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except KappaTuneError:
        raise
    except Exception as error:
        # a damaged adapter_model.safetensors raises SafetensorError, RuntimeError or OSError
        raise KappaTuneError(f"Can't load the adapter '{adapter}': {error}") from error


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a run left an adapter in `folder`."""
    return (Path(folder) / ADAPTER).is_file()
