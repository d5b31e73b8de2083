"""The methods of a comparison, by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from kappatune_plugin.checks import did_you_mean, is_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import expectations, not_one_of, read
from kappatune_plugin.selection.criteria import ON_ROWS
from kappatune_plugin.selection.ranking import ORDERS
from kappatune_plugin.study import DEFAULT_METHODS
from kappatune_plugin.tuner.config import LORA_KEYS, KappaTuneSettings

ALIASES = {"attention_only": "lowest_attention"}
PARTS = ("mlp", "attention")
PER_TYPE = "per_type"
# what `NAME:key=value` may set for a KappaTune method; the rest is the recipe's, or matched. `within` is a criterion
# among whose choice is ranked, `seed` is added to the run's for other draws
KAPPATUNE_SETTINGS = ("k", "rank_by", "within", "seed", "include", "exclude", "adapter", *LORA_KEYS)
EXPONENT = r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        name: as it was written; names it everywhere.
        kind: "kappatune", "peft" or "full".
        base: the order of a KappaTune method, or PEFT's name of the method.
        part: "mlp" or "attention" to train (or adapt) in these weights only; "per_type" for a budget that is divided
            over the types of matrix; None for no restriction.
        settings: of KappaTuneConfig, or of the PEFT method's config.
        replay: share of the rows that is text mixed in, as `data.replay.share`; 0 for none, None for the recipe's.
    """

    name: str
    kind: str
    base: str
    part: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    replay: float | None = None


def parse_methods(text: str) -> list[Method]:
    """The methods in "lowest,lora:r=8,lowest:rank_by=log_volume".

    A name is an order (lowest, highest, random, shape_matched_random), a method that PEFT has registered, or full. An
    order may end in _per_type; all but full may end in _mlp or _attention. `:key=value` sets something, as YAML;
    `:replay=0.25`, of every method, mixes in text that the base writes.

    Raises:
        KappaTuneError: unknown names or settings, or a method that is there twice; all in one message.
    """
    methods, problems = [], []
    for word in split_list(text):
        try:
            methods.append(_parse(word))
        except KappaTuneError as error:
            problems.append(str(error))
    names = [method.name for method in methods]
    problems += [f"'{name}' is there twice." for name in dict.fromkeys(names) if names.count(name) > 1]
    if not methods and not problems:
        problems.append(f"there are none. Write {DEFAULT_METHODS}.")
    if problems:
        raise KappaTuneError("\n  - ".join(["methods:", *problems]))
    return methods


def split_list(text: str) -> list[str]:
    """The parts of "a,b:k={params: 1M},c:exclude=[x, y]"; commas inside brackets part nothing."""
    parts = re.split(r",(?![^\[{]*[\]}])", text)
    return [part.strip() for part in parts if part.strip()]


def peft_methods() -> dict[str, type]:
    """PEFT's registered methods that compare can run: name -> class of its config."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind != "KAPPATUNE"}


def _parse(word: str) -> Method:
    name, colon, rest = word.partition(":")
    # colons inside a value, as in {params: 1M}, don't start another setting
    assignments = re.split(r":(?=[^:]*=)", rest) if colon else ()
    settings = dict(_setting(word, each) for each in assignments)
    replay = settings.pop("replay", None)
    if replay is not None and not (is_number(replay) and 0 <= replay < 1):
        raise KappaTuneError(f"{word}: replay is {replay!r}, and takes a share of the rows, from 0 to below 1.")
    base, part = _without_part(ALIASES.get(name, name))
    known = peft_methods()
    if name == "full":
        _refuse_unknown(word, settings, ())
        return Method(word, "full", "full", replay=replay)
    if base in ORDERS:
        return Method(word, "kappatune", base, part, _kappatune_settings(word, settings), replay)
    if base in known and part != PER_TYPE:
        return Method(word, "peft", base, part, _peft_settings(word, settings, known[base]), replay)
    names = [*ORDERS, *ALIASES, *(f"{order}_{part}" for order in ORDERS for part in (*PARTS, PER_TYPE)), "full"]
    names += [f"{each}{ending}" for each in known for ending in ("", *(f"_{part}" for part in PARTS))]
    there_are = (
        f" There are {', '.join([*ORDERS, *ALIASES, 'full'])}, these orders with _mlp, _attention or _per_type, and "
        f"PEFT's own: {', '.join(sorted(known))}."
    )
    raise KappaTuneError(f"'{name}' is no method.{did_you_mean(name, names) or there_are}")


def _setting(word: str, assignment: str) -> tuple[str, Any]:
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise KappaTuneError(f"'{word}': '{assignment}' sets nothing. Write lora:r=8 or lowest:rank_by=log_volume.")
    try:
        read_value = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise KappaTuneError(f"'{word}': {value!r} isn't YAML.") from error
    # YAML reads 5e-5 as a text
    return key, float(value) if isinstance(read_value, str) and re.fullmatch(EXPONENT, value) else read_value


def _refuse_unknown(word: str, settings: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in settings:
        if key not in known:
            takes = f" It takes {', '.join([*known, 'replay'])}."
            raise KappaTuneError(f"'{word}' has no setting '{key}'.{did_you_mean(key, known) or takes}")


def _kappatune_settings(word: str, settings: dict[str, Any]) -> dict[str, Any]:
    _refuse_unknown(word, settings, KAPPATUNE_SETTINGS)
    problems = read(KappaTuneSettings, {key: settings[key] for key in settings if key != "within"})[1]
    if settings.get("within", ON_ROWS[0]) not in ON_ROWS:
        problems.append(f"within: {not_one_of(settings['within'], ON_ROWS)}")
    if problems:
        raise KappaTuneError(f"'{word}': {' '.join(problems)}")
    return settings


def _peft_settings(word: str, settings: dict[str, Any], config: type) -> dict[str, Any]:
    """`settings` in the types that PEFT's dataclass `config` names; strictly: r=true isn't r=1."""
    _refuse_unknown(word, settings, config.__dataclass_fields__)
    hints, typed, problems = get_type_hints(config), {}, []
    for key, value in settings.items():
        adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            typed[key] = adapter.validate_python(value, strict=True)
        except ValidationError as error:
            problems.append(f"{key} is {value!r}, and takes {' or '.join(expectations(error))}.")
    if problems:
        raise KappaTuneError(f"'{word}': {' '.join(problems)}")
    return typed


def _without_part(name: str) -> tuple[str, str | None]:
    for part in (*PARTS, PER_TYPE):
        if name.endswith(f"_{part}"):
            return name.removesuffix(f"_{part}"), part
    return name, None
