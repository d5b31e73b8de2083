"""The adapter of any PEFT method, in a folder."""

import os
from pathlib import Path

from peft import PeftConfig, PeftModel
from torch import nn

from kappatune_plugin.checks import NO_CHARACTER
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.values import VALUES, renamed
from kappatune_plugin.version import NAME

FLOATING = ("F64", "F32", "F16", "BF16")
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


def claims_adapter(place: Path) -> bool:
    """Whether it is a folder of an adapter of any PEFT method, whole or not."""
    return (place / ADAPTER_CONFIG).is_file()


def adapter_config(adapter: Path) -> PeftConfig:
    """The config in a folder. Raises KappaTuneError if there is none, or none that PEFT can read."""
    from peft import PeftConfig

    if not claims_adapter(adapter):
        raise KappaTuneError(f"'{adapter}' holds no {ADAPTER_CONFIG}. Give the output_dir of a run.")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        base = config.base_model_name_or_path
        if not isinstance(base, str | None) or NO_CHARACTER.search(base or ""):
            raise TypeError(f"base_model_name_or_path is {base!r}, expected a text")
        return config
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
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys() if _holds_values(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise KappaTuneError(
            f"Can't load the adapter '{adapter}': {ADAPTER} is damaged or cut off ({error}). Copy it again, or give "
            "another checkpoint of the run."
        ) from error
    wrong = next((name for name, dtype in dtypes.items() if dtype not in FLOATING), None)
    if wrong is not None:
        raise KappaTuneError(
            f"Can't load the adapter '{adapter}': {wrong} is {dtypes[wrong]}, expected one of {', '.join(FLOATING)}. "
            "Such values were never trained: give another adapter."
        )
    if empty:
        raise KappaTuneError(f"Can't load the adapter '{adapter}': {ADAPTER} holds no values. Copy it again.")


def _holds_values(name: str) -> bool:
    """Whether a tensor of an adapter holds trained values of this method; beside them are fingerprints."""
    (today,) = renamed({name: None})
    return VALUES in today and not today.endswith(".base")


def load_adapter(model: nn.Module, adapter: Path) -> PeftModel:
    """`model` with the adapter on it. Raises KappaTuneError if it can't be loaded, or isn't this model's."""
    from peft import PeftModel

    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except KappaTuneError:
        raise
    except Exception as error:
        # a damaged adapter_model.safetensors raises SafetensorError, RuntimeError or OSError
        raise KappaTuneError(f"Can't load the adapter '{adapter}': {error}") from error
    _check_that_it_fits(tuned, adapter)
    return tuned


def _check_that_it_fits(tuned: PeftModel, adapter: Path) -> None:
    """PEFT only warns of an adapter none of whose tensors is the model's, and goes on with the base."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    if tuned.active_peft_config.peft_type.value == NAME.upper():
        # checked when it was loaded
        return
    with safe_open(adapter / ADAPTER, "pt") as file:
        there = set(file.keys())
    here = set(get_peft_model_state_dict(tuned))
    if not there & here:
        raise KappaTuneError(
            f"The adapter '{adapter}' is of another model: none of its {len(there)} tensors, such as {min(there)}, has "
            f"a place in this one ({min(here, default='it has no adapter')}). Give the base it was trained on."
        )


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a run left an adapter in `folder`."""
    return (Path(folder) / ADAPTER).is_file()
