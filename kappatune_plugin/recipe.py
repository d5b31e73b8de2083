"""YAML in, the dataclasses of TRL and the blocks of this package out; every mistake of a recipe in one message."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappatune_plugin.auto_budget import AUTO, AutoBudget
from kappatune_plugin.config import KAPPATUNE_KEYS, KappaTuneConfig, config_problems
from kappatune_plugin.data import TEMPLATES, all_spec_problems, find_local, local_spec
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe_yaml import BLOCKS, FLAT, apply_overrides, nest_flat_keys, read_yaml
from kappatune_plugin.templates import did_you_mean, parse_template
from kappatune_plugin.versions import gone_key

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    from kappatune_plugin.forgetting_config import ForgettingConfig
    from kappatune_plugin.gain import GainConfig

# of the block kappatune, what a run decides by and no model needs
RECIPE_KEYS = ("auto", "gain")
DATA_KEYS = ("train", "test", "prompt", "completion", "labels", "label_column", "max_chars")
# keys of TRL's ModelConfig that ask for another method
OTHER_METHODS = ("use_peft", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit", "use_bnb_nested_quant")
OTHER_PREFIXES = ("lora_", "bnb_")


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
    """

    script_args: "ScriptArguments"
    training_args: "SFTConfig"
    model_args: "ModelConfig"
    dataset_args: "DatasetMixtureConfig"
    kappatune: KappaTuneConfig
    data: dict[str, Any] | None
    forgetting: "ForgettingConfig | None"
    resolved: dict[str, Any]
    folder: Path
    auto: AutoBudget | None = None
    gain: "GainConfig | None" = None


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe at `path` with the command line's `overrides` (["--learning_rate", "1e-4", ...]) laid over it.

    Sets the environment variables of its `env:` mapping, as TRL does.

    Raises:
        KappaTuneError: everything that is wrong with it, in one message.
    """
    path = Path(path)
    content, problems = read_yaml(path)
    problems += nest_flat_keys(content)
    problems += apply_overrides(content, list(overrides))
    problems += _set_environment(content.get("env"))
    blocks = {name: content.pop(name) for name in BLOCKS if name in content}
    arguments, found = _trl_arguments(content)
    problems += found + _cross_problems(arguments, blocks)
    folder = path.resolve().parent
    _find_local_paths(arguments, blocks, folder)
    built = [_build(owner, arguments, problems) for owner in _trl_classes()]
    kappatune = _kappatune(blocks, problems)
    forgetting = _forgetting(blocks, problems)
    auto, gain = _auto(blocks, forgetting, built[1], problems), _gain(blocks, problems)
    if "data" in blocks:
        problems += _data_problems(blocks["data"])
    if problems:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise KappaTuneError("\n  - ".join([f"Recipe {path} has {count}:", *problems]))
    resolved = {**arguments, **blocks}
    return Recipe(*built, kappatune, blocks.get("data"), forgetting, resolved, folder, auto, gain)


def _trl_classes() -> tuple[type, ...]:
    from kappatune_plugin.trl_keys import trl_classes

    return trl_classes()


def _set_environment(variables: Any) -> list[str]:
    if variables is None:
        return []
    if not isinstance(variables, Mapping):
        return [f"env: expected a mapping of variables, found {variables!r}."]
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return []


def _trl_arguments(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The top level's values in the types that TRL declares, and what is wrong with them."""
    from kappatune_plugin.launch import is_launch_key
    from kappatune_plugin.trl_keys import convert, trl_keys

    known = [*trl_keys(), *BLOCKS, *(FLAT + key for key in KAPPATUNE_KEYS)]
    arguments, problems = {}, []
    for key, value in content.items():
        if key not in trl_keys():
            if is_launch_key(str(key)):
                continue
            gone = gone_key(key)
            problems.append(f"{key}: {gone}." if gone else f"unknown key {_unknown(key, known)}")
            continue
        try:
            arguments[key] = convert(key, value)
        except ValueError as error:
            problems.append(f"{key}: {error}.".replace("..", "."))
    return arguments, problems


def _unknown(key: Any, known: Iterable[str], prefix: str = "") -> str:
    return f"'{prefix}{key}'.{did_you_mean(str(key), known)}"


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
    other += [key for key in arguments if key.startswith(OTHER_PREFIXES)]
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
    for key in ("train", "test"):
        if isinstance(data, dict) and isinstance(data.get(key), str | Mapping):
            data[key] = local_spec(data[key], folder)
        elif isinstance(data, dict) and isinstance(data.get(key), list):
            known = [isinstance(spec, str | Mapping) for spec in data[key]]
            data[key] = [local_spec(spec, folder) for spec in data[key]] if all(known) else data[key]


def _build(owner: type, arguments: dict[str, Any], problems: list[str]) -> Any:
    """TRL's dataclass `owner` from those of `arguments` that are its; what it refuses is added to `problems`."""
    from kappatune_plugin.trl_keys import trl_keys

    keys = trl_keys()
    mine = {key: value for key, value in arguments.items() if keys[key][0] is owner}
    if "bf16" in keys and keys["bf16"][0] is owner and _no_bf16_here(mine):
        # TRL's default is mixed precision in bfloat16, an error on a machine that hasn't got it
        arguments["bf16"] = mine["bf16"] = False
    try:
        return owner(**mine)
    except (ValueError, TypeError, ImportError, OSError) as error:
        problems.append(str(error).strip())


def _no_bf16_here(arguments: Mapping[str, Any]) -> bool:
    """Whether the recipe says nothing about precision or device, and this machine can't do TRL's default."""
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

    if arguments.get("bf16") is not None or arguments.get("fp16") or arguments.get("use_cpu"):
        return False
    return not is_torch_bf16_gpu_available() and not is_torch_xla_available()


def _block(name: str, blocks: Mapping[str, Any], known: Iterable[str], problems: list[str]) -> dict[str, Any] | None:
    """The block `name`, {} if it is empty, None if it is not a mapping; unknown keys are added to `problems`."""
    block = {} if blocks[name] is None else blocks[name]
    if not isinstance(block, dict):
        problems.append(f"{name}: expected a mapping of {', '.join(known)}, found {block!r}.")
        return None
    known = list(known)
    unknown = [key for key in block if key not in known]
    problems += [
        f"unknown key {_unknown(key, known, prefix=f'{name}.')} It takes {', '.join(known)}." for key in unknown
    ]
    return {key: value for key, value in block.items() if key not in unknown}


def _kappatune(blocks: Mapping[str, Any], problems: list[str]) -> KappaTuneConfig | None:
    from kappatune_plugin.report import KappaReport
    from kappatune_plugin.selection import Selection

    if "kappatune" not in blocks:
        return None
    values = _block("kappatune", blocks, (*KAPPATUNE_KEYS, *RECIPE_KEYS), problems)
    if values is None:
        return None
    values.pop("gain", None)
    if values.pop("auto", None) is not None and values.get("k") != AUTO:
        problems.append(f"kappatune.auto is given, but k is {values.get('k')!r}: write `k: auto`, or delete auto.")
    if values.get("k") == AUTO:
        # all that may be trained; `auto` says how many of them are, and is judged on its own
        values["k"] = None if values.get("selection") is not None else _most(blocks)
    found = config_problems(values)
    loaders: dict[str, Callable[[Any], Any]] = {"report": KappaReport.load, "selection": Selection.load}
    for key, load in loaders.items():
        if values.get(key) is not None:
            found += _reading_problem(key, values[key], load)
    problems += [f"kappatune: {problem}" for problem in found]
    return None if found else KappaTuneConfig(task_type="CAUSAL_LM", **values)


def _inner(owner: type, block: Any) -> Any:
    """The dataclass `owner` from a mapping inside a block; None means all defaults.

    Raises:
        KappaTuneError: what it refuses, and unknown keys; a line each.
    """
    block = {} if block is None else block
    known = [field.name for field in fields(owner)]
    if not isinstance(block, Mapping):
        raise KappaTuneError(f"expected a mapping of {', '.join(known)}, found {block!r}.")
    unknown = [f"unknown key {_unknown(key, known)} It takes {', '.join(known)}." for key in block if key not in known]
    if unknown:
        raise KappaTuneError("\n".join(unknown))
    return owner(**block)


def _gain(blocks: Mapping[str, Any], problems: list[str]) -> "GainConfig | None":
    """The settings of `rank_by: gain_over_forgetting`; a recipe that names no end of the ranking is a problem."""
    from kappatune_plugin.gain import GAIN, GainConfig

    block = blocks.get("kappatune")
    if not isinstance(block, dict):
        return None
    if block.get("rank_by") == GAIN and block.get("order") is None and block.get("selection") is None:
        problems.append(
            f"kappatune.order is missing: with rank_by {GAIN} the highest are those that gain most. Write `order: "
            "highest`, or lowest for the control."
        )
    try:
        return _inner(GainConfig, block["gain"]) if block.get("gain") is not None else None
    except KappaTuneError as error:
        problems += [f"kappatune.gain: {line}" for line in str(error).splitlines()]
    return None


def _most(blocks: Mapping[str, Any]) -> Any:
    """The largest budget of `k: auto`; None if its block is wrong."""
    try:
        return _inner(AutoBudget, blocks["kappatune"].get("auto")).most
    except KappaTuneError:
        return None


def _auto(
    blocks: Mapping[str, Any], forgetting: "ForgettingConfig | None", args: Any, problems: list[str]
) -> AutoBudget | None:
    """The settings of `k: auto`; what is missing for it is added to `problems`."""
    block = blocks.get("kappatune")
    if not isinstance(block, dict) or block.get("k") != AUTO:
        return None
    try:
        auto = _inner(AutoBudget, block.get("auto"))
    except KappaTuneError as error:
        problems += [f"kappatune.auto: {line}" for line in str(error).splitlines()]
        return None
    measured = blocks.get("forgetting") or {}
    for key, example in (("control", "self"), ("every", 50), ("max_delta", 0.05)):
        if isinstance(measured, dict) and not measured.get(key):
            problems.append(f"kappatune.k: auto needs forgetting.{key}: add `{key}: {example}` to that block.")
    if args is not None and (args.logging_strategy != "steps" or args.logging_steps > auto.window):
        problems.append(
            f"kappatune.auto.window: within {auto.window} steps no training loss is logged (logging_strategy "
            f"{args.logging_strategy.value}, logging_steps {args.logging_steps}): lower logging_steps or raise window."
        )
    if args is not None and args.load_best_model_at_end:
        problems.append("load_best_model_at_end: k: auto keeps the last values within forgetting.max_delta. Delete it.")
    return auto


def _reading_problem(key: str, path: Any, load: Callable[[Any], Any]) -> list[str]:
    """Reads the file at once: the mistake would otherwise show after the model is loaded."""
    if not isinstance(path, str):
        return [f"{key}: expected the path of a file, found {path!r}."]
    try:
        load(path)
    except KappaTuneError as error:
        return [f"{key}: {error}"]
    return []


def _forgetting(blocks: Mapping[str, Any], problems: list[str]) -> "ForgettingConfig | None":
    from kappatune_plugin.forgetting_config import ForgettingConfig

    if "forgetting" not in blocks:
        return None
    values = _block("forgetting", blocks, [field.name for field in fields(ForgettingConfig)], problems)
    if values is None:
        return None
    try:
        return ForgettingConfig(**values)
    except KappaTuneError as error:
        problems += [f"forgetting: {line}" for line in str(error).splitlines()]
    return None


def _data_problems(data: Any) -> list[str]:
    problems: list[str] = []
    block = _block("data", {"data": data}, DATA_KEYS, problems)
    if block is None:
        return problems
    if not block.get("train"):
        problems.append("data.train is missing: add `train: {path: rows.jsonl}`.")
    for key in ("train", "test"):
        if block.get(key):
            problems += all_spec_problems(block[key], f"data.{key}")
    given = [key for key in TEMPLATES if block.get(key) is not None]
    if len(given) == 1:
        problems.append(f"data: {given[0]} is given alone; prompt and completion go together.")
    problems += _template_problems({f"data.{key}": block[key] for key in given})
    if isinstance(block.get("test"), Mapping):
        own = {f"data.test.{key}": block["test"][key] for key in TEMPLATES if key in block["test"]}
        problems += _template_problems(own)
        if own and not given:
            problems.append(f"{', '.join(own)}: the test rows' own; data.prompt and data.completion are missing.")
    problems += _max_chars_problems(block.get("max_chars"), given)
    if block.get("labels") is not None:
        problems += _labels_problems(block["labels"])
        if not given:
            problems.append("data.labels is given without prompt and completion, which would show them.")
    if not isinstance(block.get("label_column", ""), str):
        problems.append(f"data.label_column: expected a column's name, found {block['label_column']!r}.")
    return problems


def _template_problems(templates: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, template in templates.items():
        try:
            parse_template(template, key)
        except KappaTuneError as error:
            problems.append(str(error))
    return problems


def _max_chars_problems(max_chars: Any, given: list[str]) -> list[str]:
    if max_chars is None:
        return []
    if isinstance(max_chars, bool) or not isinstance(max_chars, int) or max_chars < 1:
        return [f"data.max_chars: {max_chars!r} is not a number of characters from 1 on."]
    return [] if given else ["data.max_chars counts the characters of prompt and completion, which are missing."]


def _labels_problems(labels: Any) -> list[str]:
    if not isinstance(labels, Mapping) or not labels:
        return [f"data.labels: expected a mapping such as {{0: 'no', 1: 'yes'}}, found {labels!r}."]
    problems = []
    for value, word in labels.items():
        if isinstance(word, bool):
            problems.append(f"data.labels: YAML reads a bare yes or no as true or false: quote the word of {value!r}.")
        elif not isinstance(word, str | int | float):
            problems.append(f"data.labels: the word of {value!r} is {word!r}; expected a text.")
    return problems
