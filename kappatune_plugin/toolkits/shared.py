"""Shared by the integrations: a toolkit's model in, the PEFT model to train or a trained one out."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.selection import Selection, differences
from kappatune_plugin.tuner.config import LORA, LORA_KEYS, KappaTuneConfig
from kappatune_plugin.tuner.plain_lora import check_resumed, decided, peft_config_for
from kappatune_plugin.tuner.register import PREFIX


def kappatune_config(model: nn.Module, given: Mapping[str, Any]) -> KappaTuneConfig:
    """The config for the keys that a toolkit's YAML gives, with the task type of the model it loaded."""
    kind = type(model).__name__
    classifiers = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
    tasks = [task for name, task in classifiers.items() if name in kind]
    return KappaTuneConfig(task_type=tasks[0] if tasks else TaskType.CAUSAL_LM, **given)


def new_adapter(model: nn.Module, given: Mapping[str, Any], **options: Any) -> PeftModel:
    """`model` with a new KappaTune adapter; `options` go to `get_peft_model`."""
    return get_peft_model(model, peft_config_for(model, kappatune_config(model, given)), **options)


def trained_adapter(
    model: nn.Module, adapter: str, given: Mapping[str, Any], trainable: bool, **options: Any
) -> PeftModel:
    """`model` with the adapter that `checked_adapter` accepts; `options` go to `from_pretrained`."""
    checked_adapter(adapter, given)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable, **options)


def checked_adapter(adapter: str, given: Mapping[str, Any]) -> KappaTuneConfig | LoraConfig:
    """The config of the trained KappaTune adapter in the folder or hub repository `adapter`, LoRA's where it is one.

    Raises:
        KappaTuneError: there is none, it isn't KappaTune's, or it was trained with other settings than `given`.
    """
    try:
        saved = PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise KappaTuneError(f"Can't read an adapter from '{adapter}': {error}") from error
    if isinstance(saved, LoraConfig) and given.get("adapter") == LORA:
        # what led to the selection isn't kept there
        given = {key: given[key] for key in LORA_KEYS if key in given}
    elif not isinstance(saved, KappaTuneConfig):
        raise KappaTuneError(f"'{adapter}' is an adapter of {saved.peft_type.value}, not of KappaTune.")
    differing = [key for key, value in given.items() if not _same(key, value, getattr(saved, key))]
    if differing:
        words = [_difference(key, getattr(saved, key), given[key]) for key in differing]
        raise KappaTuneError(
            f"The adapter '{adapter}' was trained with other settings: {'; '.join(words)}. Write those, or leave the "
            "adapter out to train a new one."
        )
    return saved


def _same(key: str, given: Any, saved: Any) -> bool:
    if key in ("report", "rtol", "scan_from"):
        # these led to the selection, which the adapter holds itself
        return True
    if key == "selection":
        return not differences(Selection.load(given), Selection.from_dict(saved))
    if key == "k":
        return parse_budget(given, least=0) == parse_budget(saved, least=0)
    return given == saved or (isinstance(given, list) and isinstance(saved, list | set) and set(given) == set(saved))


def _difference(key: str, there: Any, here: Any) -> str:
    return f"another selection than {here}" if key == "selection" else f"{key} is {there!r} there, {here!r} here"


class WriteDecisions(TrainerCallback):
    """Writes selection.json and kappa_report.json of a run to its output_dir."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        found = decided(model, model.active_adapters[0]) if isinstance(model, PeftModel) else None
        if found is not None and args.resume_from_checkpoint:
            check_resumed(model, Path(args.resume_from_checkpoint))
        if found is not None and state.is_world_process_zero:
            found.save(Path(args.output_dir))


def remove_models_with_adapters(folder: str | os.PathLike) -> None:
    """Delete the weights in `folder` that hold a whole model and an adapter inside: nothing loads them as they are.

    Those are model.safetensors, or the parts that model.safetensors.index.json names with it; other files stay.
    """
    index, whole = Path(folder) / "model.safetensors.index.json", Path(folder) / "model.safetensors"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(f".{PREFIX}" in name for name in content):
            for path in [*(Path(folder) / name for name in set(content.values())), index]:
                path.unlink()
    if whole.is_file():
        with safe_open(whole, "pt") as file:
            names = list(file.keys())
        if any(f".{PREFIX}" in name for name in names):
            whole.unlink()
