"""A recipe's text: the YAML file, and the `--key value` overrides of the command line laid over it."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from kappatune_plugin.checks import NO_CHARACTER
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.trl_keys import is_flag, takes_list

BLOCKS = ("kappatune", "data", "audio", "forgetting", "env")
# `kappatune_k: 75` at the top level says `kappatune: {k: 75}`, the spelling of a LoRA recipe's `lora_r`
FLAT = "kappatune_"
# YAML would read "Tweet: {text}" as a mapping, " {label}" too, and a split or a name of digits as a number
TEXTS = ("prompt", "completion", "path", "name", "split", "label_column")


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, which silently keeps the last of two equal keys, with a note of each repeated one.

    It refuses characters that no path and no file can hold, which YAML can spell ("\\0", "\\uD800").
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar, as `yaml` has it."""
        text = super().construct_scalar(node)
        if isinstance(text, str) and NO_CHARACTER.search(text):
            raise ConstructorError(None, None, "NUL, or half a character (a surrogate): delete it", node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                self.repeated.append(f"{key.value} is there twice, in lines {lines[key.value]} and {line}: delete one.")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping in the file at `path`, and a line for each key that it holds twice.

    Raises:
        KappaTuneError: missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KappaTuneError(f"Can't read the recipe {path}: {reason}. Give the path of a YAML file.") from error
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date that is none (2024-02-30), a number of thousands of digits
        raise KappaTuneError(f"Recipe {path} isn't YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise KappaTuneError(f"Recipe {path} holds {found}; expected lines such as `model_name_or_path: ...`.")
    return content, loader.repeated


def nest_flat_keys(content: dict[str, Any]) -> list[str]:
    """Move each `kappatune_KEY` of `content` into its block `kappatune`, in place.

    Returns:
        A line for each key that is spelled both ways.
    """
    problems = []
    for flat in [key for key in content if isinstance(key, str) and key.startswith(FLAT)]:
        key, value = flat.removeprefix(FLAT), content.pop(flat)
        if content.get("kappatune") is None:
            content["kappatune"] = {}
        block = content["kappatune"]
        if not isinstance(block, dict):
            problems.append(f"{flat} and kappatune: {block!r}: make kappatune a mapping, or delete it.")
        elif key in block:
            problems.append(f"{flat} and kappatune.{key} say the same: delete one.")
        else:
            block[key] = value
    return problems


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> list[str]:
    """Lay `--key value` (`=value`), `--flag`, `--block.key value` and `--kappatune_key value` over `content`, in place.

    The values of TRL's keys stay as they were typed: their types are brought in with the recipe's. Those of blocks are
    YAML.

    Returns:
        What is wrong, a line each.
    """
    flags, problems = _split(overrides)
    # a block as a whole first, then what is in it
    for name in sorted(flags, key=lambda name: name.count(".")):
        values = flags[name]
        block, *inner = name.split(".")
        if block not in BLOCKS:
            content.update([_top_level(name, values)])
        elif len(values) != 1:
            problems.append(f"--{name} takes one value, found {len(values)}. Write a list as --{name} '[a, b]'.")
        else:
            problems += _set(content, [block, *inner], values[0])
    return problems


def _split(overrides: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flag -> the words after it; dashes in a flag's name mean underscores."""
    flags: dict[str, list[str]] = {}
    problems, name = [], ""
    for word in overrides:
        if not word.startswith("--"):
            if name:
                flags[name].append(word)
            else:
                problems.append(f"'{word}' belongs to no flag. Write --key {word}.")
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith(FLAT):
            name = f"kappatune.{name.removeprefix(FLAT)}"
        if name in flags:
            problems.append(f"--{name} is given twice: delete one.")
        flags[name] = [value] if equals else []
    return flags, problems


def _top_level(name: str, values: list[str]) -> tuple[str, Any]:
    if not values:
        negated = name.removeprefix("no_")
        return (negated, False) if negated != name and is_flag(negated) else (name, True if is_flag(name) else None)
    return name, values[0] if len(values) == 1 and not takes_list(name) else values


def _set(content: dict[str, Any], keys: list[str], text: str) -> list[str]:
    """Set the value at `keys`, a path into nested mappings, making those that aren't there."""
    inside = content
    for depth, key in enumerate(keys[:-1], start=1):
        if inside.get(key) is None:
            inside[key] = {}
        if not isinstance(inside[key], dict):
            where = ".".join(keys[:depth])
            return [f"--{'.'.join(keys)}: {where} is {inside[key]!r}, not a mapping. Give --{where} as a whole."]
        inside = inside[key]
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text
    inside[keys[-1]] = text if keys[-1] in TEXTS and value is not None else value
    return []
