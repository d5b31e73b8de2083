"""YAML in, the dataclasses of TRL and the blocks of this package out; every mistake of a recipe in one message."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.data.rows import find_local, local_spec
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.config import ForgettingConfig
from kappatune_plugin.recipe.blocks import audio_problems, auto_problems, read_blocks
from kappatune_plugin.recipe.launch_keys import is_launch_key, warn_of_unused
from kappatune_plugin.recipe.text import BLOCKS, FLAT, apply_overrides, nest_flat_keys, read_yaml
from kappatune_plugin.recipe.trl_keys import convert, gone_key, take_overwrite, trl_classes, trl_keys
from kappatune_plugin.scanning.gain import GainConfig
from kappatune_plugin.selection.auto_budget import AUTO, AutoBudget
from kappatune_plugin.speech.settings import AudioBlock
from kappatune_plugin.tuner.config import KAPPATUNE_KEYS, KappaTuneConfig

# keys of TRL's ModelConfig that ask for another method
OTHER_METHODS = ("use_peft", "use_rslora", "use_dora")
OTHER_PREFIX = "lora_"


@dataclass(frozen=True)
class Recipe:
    """A recipe that is right as far as can be told before anything is loaded.

    Attributes:
        script_args, training_args, model_args, dataset_args: TRL's own.
        kappatune: what to train.
        data: the block `data:`; None if the recipe uses TRL's `dataset_name` or `datasets`.
        forgetting: the block `forgetting:`; None if there is none.
        resolved: all keys with the overrides in, as recipe.yaml holds them.
        folder: of the recipe; relative paths that don't lead anywhere from the current folder start here.
        auto: how `k: auto` decides; `kappatune.k` is its largest budget then. None for a fixed k.
        gain: how `rank_by: gain_over_forgetting` is measured; None for its defaults.
        audio: the block `audio:`; None for a recipe of text.
        quantize_experts: whether fused experts are quantized where the recipe quantizes the model.
        overwrite: whether an earlier run in `output_dir` may be replaced (`overwrite_output_dir`).
    """

    script_args: ScriptArguments
    training_args: SFTConfig
    model_args: ModelConfig
    dataset_args: DatasetMixtureConfig
    kappatune: KappaTuneConfig
    data: dict[str, Any] | None
    forgetting: ForgettingConfig | None
    resolved: dict[str, Any]
    folder: Path
    auto: AutoBudget | None = None
    gain: GainConfig | None = None
    overwrite: bool = False
    audio: AudioBlock | None = None
    quantize_experts: bool = True

    @property
    def replay(self) -> ReplayConfig | None:
        """What `data.replay` mixes in; None without it."""
        block = (self.data or {}).get("replay")
        return None if block is None else ReplayConfig(**block)

    @property
    def end_token(self) -> bool:
        """Whether the end-of-text token of the task's rows is in the loss: `data.end_token`, true without it."""
        return (self.data or {}).get("end_token", True)


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = (), launches: bool = False) -> Recipe:
    """Read the recipe at `path` with the command line's `overrides` (["--learning_rate", "1e-4", ...]) laid over it.

    Sets the environment variables of its `env:` mapping, as TRL does.

    Args:
        launches: whether the caller starts processes as the keys of `accelerate launch` say (num_processes, ...).
            Otherwise a warning names those that the recipe has.

    Raises:
        KappaTuneError: everything that is wrong with it, in one message.
    """
    path = Path(path)
    content, problems = read_yaml(path)
    problems += nest_flat_keys(content)
    problems += apply_overrides(content, list(overrides))
    problems += _set_environment(content.get("env"))
    if not launches:
        warn_of_unused(content)
    overwrite = take_overwrite(content, problems)
    blocks = {name: content.pop(name) for name in BLOCKS if name in content}
    arguments, found = _trl_arguments(content)
    problems += found + _cross_problems(arguments, blocks)
    folder = path.resolve().parent
    _find_local_paths(arguments, blocks, folder)
    kappatune, data, audio, forgetting = read_blocks(blocks, problems)
    if "audio" in blocks:
        problems += audio_problems(kappatune, data, arguments)
    built = [_build(owner, arguments, problems) for owner in trl_classes()]
    if kappatune is not None:
        problems += auto_problems(kappatune, blocks.get("forgetting"), built[1])
    if problems or kappatune is None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise KappaTuneError("\n  - ".join([f"Recipe {path} has {count}:", *problems]))
    resolved = {**arguments, **blocks}
    auto = (kappatune.auto or AutoBudget()) if kappatune.k == AUTO else None
    given = data and data.model_dump(exclude_unset=True)
    settings = auto, kappatune.gain, overwrite, audio, kappatune.quantize_experts
    return Recipe(*built, kappatune.config(), given, forgetting, resolved, folder, *settings)


def _set_environment(variables: Any) -> list[str]:
    if variables is None:
        return []
    if not isinstance(variables, Mapping):
        return [f"env: expected a mapping of variables, found {variables!r}."]
    try:
        os.environ.update({str(name): str(value) for name, value in variables.items()})
    except ValueError as error:
        # "=" in a name, NUL in a value
        return [f"env: {error}: the names of variables have no = in them, and values no NUL."]
    return []


def _trl_arguments(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The top level's values in the types that TRL declares, and what is wrong with them."""
    known = [*trl_keys(), *BLOCKS, *(FLAT + key for key in KAPPATUNE_KEYS)]
    arguments, problems = {}, []
    for key, value in content.items():
        if key not in trl_keys():
            if is_launch_key(str(key)):
                continue
            gone = gone_key(key, value)
            problems.append(f"{key}: {gone}." if gone else f"unknown key '{key}'.{did_you_mean(str(key), known)}")
            continue
        try:
            arguments[key] = convert(key, value)
        except ValueError as error:
            problems.append(f"{key}: {error}.".replace("..", "."))
    return arguments, problems


def _cross_problems(arguments: Mapping[str, Any], blocks: Mapping[str, Any]) -> list[str]:
    """What is missing, and what can't be together."""
    problems = []
    if not arguments.get("model_name_or_path"):
        problems.append("model_name_or_path is missing: add `model_name_or_path: allenai/OLMoE-1B-7B-0924`, or yours.")
    if not arguments.get("output_dir"):
        problems.append("output_dir is missing: add `output_dir: outputs/my-run`.")
    if "kappatune" not in blocks:
        problems.append("the block kappatune is missing: add the lines `kappatune:` and `  k: 75`.")
    other = [key for key in OTHER_METHODS if arguments.get(key)]
    other += [key for key in arguments if key.startswith(OTHER_PREFIX)]
    if other:
        problems.append(f"{', '.join(other)}: another method's; KappaTune trains the weights. Delete these lines.")
    named = [key for key in ("dataset_name", "datasets") if arguments.get(key)]
    if "data" in blocks and named:
        problems.append(f"data and {' and '.join(named)} both give the training data: delete one.")
    elif "data" not in blocks and not named:
        problems.append("the data is missing: add a block data with train, or TRL's dataset_name or datasets.")
    data = blocks.get("data")
    if isinstance(data, Mapping) and not data.get("test") and arguments.get("eval_strategy", "no") != "no":
        problems.append(
            f"eval_strategy: {arguments['eval_strategy']} needs data.test: add it, or delete eval_strategy."
        )
    return problems


def _find_local_paths(arguments: dict[str, Any], blocks: Mapping[str, Any], folder: Path) -> None:
    """Let relative paths start in the recipe's folder where they don't lead anywhere from the current one."""
    if isinstance(arguments.get("model_name_or_path"), str):
        arguments["model_name_or_path"] = find_local(arguments["model_name_or_path"], folder)
    kappatune = blocks.get("kappatune")
    if isinstance(kappatune, dict):
        for key in ("report", "selection", "scan_from"):
            if isinstance(kappatune.get(key), str):
                kappatune[key] = find_local(kappatune[key], folder)
    data = blocks.get("data")
    replay = data.get("replay") if isinstance(data, dict) else None
    if isinstance(replay, dict) and isinstance(replay.get("from"), Mapping):
        replay["from"] = local_spec(replay["from"], folder)
    for key in ("train", "validation", "test"):
        if isinstance(data, dict) and isinstance(data.get(key), str | Mapping):
            data[key] = local_spec(data[key], folder)
        elif isinstance(data, dict) and isinstance(data.get(key), list):
            known = [isinstance(spec, str | Mapping) for spec in data[key]]
            data[key] = [local_spec(spec, folder) for spec in data[key]] if all(known) else data[key]


def _build(owner: type, arguments: dict[str, Any], problems: list[str]) -> Any:
    """TRL's dataclass `owner` from those of `arguments` that are its; what it refuses is added to `problems`."""
    keys = trl_keys()
    mine = {key: value for key, value in arguments.items() if keys[key][0] is owner}
    if "bf16" in keys and keys["bf16"][0] is owner and _no_bf16_here(mine):
        # TRL's default is mixed precision in bfloat16, an error on a machine that hasn't got it
        arguments["bf16"] = mine["bf16"] = False
    try:
        return owner(**mine)
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        problems.append(str(error).strip())


def _no_bf16_here(arguments: Mapping[str, Any]) -> bool:
    """Whether the recipe says nothing about precision or device, and this machine can't do TRL's default."""
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

    if arguments.get("bf16") is not None or arguments.get("fp16") or arguments.get("use_cpu"):
        return False
    return not is_torch_bf16_gpu_available() and not is_torch_xla_available()
