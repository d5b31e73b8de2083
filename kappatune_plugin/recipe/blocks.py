"""The blocks of a recipe: mappings in, settings and a line for each mistake out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.data.rows import TEMPLATES, all_spec_problems
from kappatune_plugin.data.templates import parse_template
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.auto_budget import AUTO, AutoBudget
from kappatune_plugin.tuner.config import KAPPATUNE_KEYS, KappaTuneConfig, config_problems

if TYPE_CHECKING:
    from kappatune_plugin.forgetting.config import ForgettingConfig
    from kappatune_plugin.scanning.gain import GainConfig

# of the block kappatune, what a run decides by and no model needs
RECIPE_KEYS = ("auto", "gain")
DATA_KEYS = ("train", "validation", "test", "prompt", "completion", "labels", "label_column", "max_chars")


def unknown_key(key: Any, known: Iterable[str], prefix: str = "") -> str:
    """What to say behind "unknown key": the key, and which of `known` may be meant."""
    return f"'{prefix}{key}'.{did_you_mean(str(key), known)}"


def _block(name: str, blocks: Mapping[str, Any], known: Iterable[str], problems: list[str]) -> dict[str, Any] | None:
    """The block `name`, {} if it is empty, None if it is not a mapping; unknown keys are added to `problems`."""
    block = {} if blocks[name] is None else blocks[name]
    if not isinstance(block, dict):
        problems.append(f"{name}: expected a mapping of {', '.join(known)}, found {block!r}.")
        return None
    known = list(known)
    unknown = [key for key in block if key not in known]
    problems += [
        f"unknown key {unknown_key(key, known, prefix=f'{name}.')} It takes {', '.join(known)}." for key in unknown
    ]
    return {key: value for key, value in block.items() if key not in unknown}


def kappatune_block(blocks: Mapping[str, Any], problems: list[str]) -> KappaTuneConfig | None:
    """What to train, with the largest budget for `k: auto`; None if the block is missing or wrong."""
    from kappatune_plugin.selection.report import KappaReport
    from kappatune_plugin.selection.selection import Selection

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
    unknown = [
        f"unknown key {unknown_key(key, known)} It takes {', '.join(known)}." for key in block if key not in known
    ]
    if unknown:
        raise KappaTuneError("\n".join(unknown))
    return owner(**block)


def gain_block(blocks: Mapping[str, Any], problems: list[str]) -> "GainConfig | None":
    """The settings of `rank_by: gain_over_forgetting`; a recipe that names no end of the ranking is a problem."""
    from kappatune_plugin.scanning.gain import GAIN, GainConfig

    block = blocks.get("kappatune")
    if not isinstance(block, dict):
        return None
    if block.get("rank_by") == GAIN and block.get("order") is None and block.get("selection") is None:
        problems.append(
            f"kappatune.order is missing: with rank_by {GAIN} the highest are those that gain most. Write `order: "
            "highest`, or lowest for the control."
        )
    if block.get("rank_by") == GAIN and block.get("scan_from") is not None:
        problems.append(f"kappatune.scan_from: {GAIN} is measured on the model that is trained: delete it.")
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


def auto_block(
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
    if block.get("modules_to_save"):
        problems.append("kappatune.modules_to_save: k: auto can't take back what whole modules learned: delete it.")
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


def forgetting_block(blocks: Mapping[str, Any], problems: list[str]) -> "ForgettingConfig | None":
    """What is measured; None if the block is missing or wrong."""
    from kappatune_plugin.forgetting.config import ForgettingConfig

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


def data_problems(data: Any) -> list[str]:
    """What is wrong with the block `data:` before anything is loaded, a line each."""
    problems: list[str] = []
    block = _block("data", {"data": data}, DATA_KEYS, problems)
    if block is None:
        return problems
    if not block.get("train"):
        problems.append("data.train is missing: add `train: {path: rows.jsonl}`.")
    for key in ("train", "validation", "test"):
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
