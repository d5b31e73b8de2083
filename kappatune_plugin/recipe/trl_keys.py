"""The keys of `trl sft`, and their values brought to the type that TRL's dataclasses declare."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from enum import Enum
from functools import cache
from importlib.metadata import version
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kappatune_plugin.checks import did_you_mean

# keys of TRL's YAML that came and went between the versions which this package works with, and what to write today
GONE_KEYS = {
    "warmup_ratio": "give the share as warmup_steps: {value}",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "delete it, safetensors is the only format",
    "evaluation_strategy": "it is called eval_strategy",
    "max_seq_length": "it is called max_length",
    "torch_dtype": "it is called dtype",
    "no_cuda": "write use_cpu: true",
}

OVERWRITE = "overwrite_output_dir"
YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}


@cache
def trl_classes() -> tuple[type, ...]:
    """The dataclasses that `trl sft` parses, in its order."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    return ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig


@cache
def trl_keys() -> dict[str, tuple[type, Any, tuple[str, ...]]]:
    """Key -> (its dataclass, its declared type, the choices it is limited to, if any)."""
    keys = {}
    for owner in trl_classes():
        hints = get_type_hints(owner)
        for field in fields(owner):
            if field.init:
                keys[field.name] = owner, hints[field.name], tuple(field.metadata.get("choices") or ())
    return keys


def convert(key: str, value: Any) -> Any:
    """`value`, as YAML or the command line gives it, in the type that TRL declares for `key`.

    YAML reads 5e-5 as a string and a bare `no` as false; the command line gives strings only. None of them is a
    mistake.

    Raises:
        ValueError: no such type can be made of it; the message says what was expected.
    """
    if key == "resume_from_checkpoint":
        return _resume(value)
    _, hint, choices = trl_keys()[key]
    value = _convert(value, _types(hint))
    if choices and value is not None and value not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, found {value!r}.{did_you_mean(str(value), choices)}")
    return value


def take_overwrite(content: dict[str, Any], problems: list[str]) -> bool:
    """Take `overwrite_output_dir` out of a recipe: transformers 5 hasn't got it any more, so it is this package's."""
    value = content.pop(OVERWRITE, False)
    try:
        return _convert(value, (bool,))
    except ValueError as error:
        problems.append(f"{OVERWRITE}: {error}.")
        return False


def is_flag(key: str) -> bool:
    """Whether `--key` alone means true."""
    return key == OVERWRITE or key in trl_keys() and bool in _types(trl_keys()[key][1])


def takes_list(key: str) -> bool:
    """Whether `--key a b` means a list."""
    return key in trl_keys() and any(get_origin(each) is list for each in _types(trl_keys()[key][1]))


def _types(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _convert(value: Any, types: tuple[Any, ...]) -> Any:
    enums = [each for each in types if isinstance(each, type) and issubclass(each, Enum)]
    if enums:
        return _member(value, enums[0])
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and str not in types):
        if NoneType in types:
            return None
    elif any(get_origin(each) is Literal and value in get_args(each) for each in types):
        return value
    elif isinstance(value, list):
        lists = [each for each in types if get_origin(each) is list]
        if lists:
            return [_convert(item, get_args(lists[0])) for item in value]
    elif isinstance(value, Mapping):
        if any(each is dict or get_origin(each) is dict or is_dataclass(each) for each in types):
            return dict(value)
    else:
        return _scalar(value, types)
    raise ValueError(f"expected {_expected(types)}, found {value!r}")


def _scalar(value: Any, types: tuple[Any, ...]) -> Any:
    """A string, number or truth value in the one of `types` that holds it without loss."""
    if type(value) in types:
        return value
    if bool in types and str(value).lower() in YES + NO:
        return str(value).lower() in YES
    if not isinstance(value, bool):
        for each in (int, float):
            number = _number(value, each) if each in types else None
            if number is not None:
                return number
        if str in types and isinstance(value, str | int | float | date):
            return str(value)
    lists = [each for each in types if get_origin(each) is list]
    if lists and isinstance(value, str):
        return [_convert(value, get_args(lists[0]))]
    if isinstance(value, str) and value.startswith("{") and any(get_origin(each) is dict for each in types):
        return json.loads(value)
    raise ValueError(f"expected {_expected(types)}, found {value!r}")


def _number(value: Any, kind: type) -> int | float | None:
    """`value` as an int or a float, None if that would change it."""
    try:
        number = kind(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if number == float(value) else None


def _member(value: Any, enum: type[Enum]) -> str:
    names = [member.value for member in enum]
    # YAML 1.1 reads a bare `no` as false
    value = "no" if value is False and "no" in names else value
    if value not in names:
        raise ValueError(f"expected one of {', '.join(names)}, found {value!r}.{did_you_mean(str(value), names)}")
    return value


def _resume(value: Any) -> str | bool | None:
    """Declared as a path, but true means the last checkpoint."""
    if isinstance(value, str) and value.lower() in ("none", "null", "true", "false"):
        value = value.lower() == "true"
    if value is None or isinstance(value, str | bool):
        return value or None
    raise ValueError(f"expected true or the folder of a checkpoint, found {value!r}")


def _expected(types: tuple[Any, ...]) -> str:
    others = {list: "a list", dict: NAMES[dict], NoneType: "null"}
    names = [NAMES[each] for each in types if each in NAMES]
    names += [others[kind] for each in types if (kind := get_origin(each) or each) in others]
    return " or ".join(dict.fromkeys(names)) or "nothing a recipe can say"


def gone_key(key: str, value: Any = None) -> str | None:
    """What to do about a key that the installed versions of TRL and transformers don't know; None if nobody did."""
    if key not in GONE_KEYS:
        return None
    what_to_do = GONE_KEYS[key].format(value=value)
    return f"transformers {version('transformers')} and TRL {version('trl')} don't have it: {what_to_do}"
