"""The `kappatune_*` keys of a LLaMA-Factory YAML, as the dataclass that its parser fills. Needs no LLaMA-Factory."""

import functools
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, Literal, get_args, get_type_hints

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.text import FLAT
from kappatune_plugin.schema import read
from kappatune_plugin.selection.budget import budget
from kappatune_plugin.tuner.config import KAPPATUNE_KEYS, KappaTuneConfig, KappaTuneSettings
from kappatune_plugin.version import NAME

# what the rest of LLaMA-Factory sees: a PEFT adapter is saved, resumed, merged and disabled for DPO under this name
STAND_IN = "lora"
# groups of LLaMA-Factory's settings that belong to other methods
OTHER_GROUPS = (
    "LoraArguments",
    "OFTArguments",
    "FreezeArguments",
    "GaloreArguments",
    "ApolloArguments",
    "BAdamArgument",
)
OTHER_KEYS = ("use_llama_pro", "use_mca", "use_hyper_parallel")
SHARED = ("create_new_adapter", "additional_target")
# its parser builds command line options, which have one type
ONE_TYPE = {"k": str, "match": str, "report": str, "selection": str}


def arguments_class(base: type) -> type:
    """A dataclass with the keys of `base`, LLaMA-Factory's FinetuningArguments, and ours.

    Its instances have an attribute `kappatune`: the settings given, or None if the file asks for another method.
    """
    types, declared = get_type_hints(KappaTuneConfig), KappaTuneConfig.__dataclass_fields__
    methods = Literal[(*get_args(get_type_hints(base)["finetuning_type"]), NAME)]
    original = base.__dataclass_fields__["finetuning_type"]
    ours = [("finetuning_type", methods, field(default=original.default, metadata=original.metadata))]
    for key in KAPPATUNE_KEYS:
        help_text = {"help": declared[key].metadata["help"]}
        ours.append((FLAT + key, ONE_TYPE.get(key, types[key]) | None, field(default=None, metadata=help_text)))
    combined = make_dataclass(base.__name__, ours, bases=(base,), namespace={"__post_init__": _post_init(base)})
    combined.__init__ = _noting_what_is_given(combined.__init__)
    return combined


def _noting_what_is_given(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, **values: Any) -> None:
        # from the command line come all keys, at their defaults; from a YAML those that it has
        everything = len(values) == len(fields(self))
        self.explicit = {
            each.name
            for each in fields(self)
            if each.name in values and not (everything and values[each.name] == _default(each))
        }
        original(self, **values)

    return __init__


def _post_init(base: type) -> Callable[[Any], None]:
    def __post_init__(self: Any) -> None:
        given = {key: getattr(self, FLAT + key) for key in KAPPATUNE_KEYS}
        given = {key: value for key, value in given.items() if value is not None}
        given |= {key: budget(given[key]) for key in ("k", "match") if isinstance(given.get(key), str)}
        asked = self.finetuning_type == NAME
        problems = _problems(base, self, given) if asked else []
        if given and not asked:
            keys = ", ".join(FLAT + key for key in given)
            problems = [f"{keys}: ignored with finetuning_type: {self.finetuning_type}. Write {NAME}, or delete them."]
        if problems:
            raise KappaTuneError("\n  - ".join(["LLaMA-Factory's settings don't fit KappaTune:", *problems]))
        if asked:
            self.finetuning_type = STAND_IN
        base.__post_init__(self)
        if self.additional_target:
            given["modules_to_save"] = list(self.additional_target)
        self.kappatune = given if asked else None

    return __post_init__


def _problems(base: type, values: Any, given: dict[str, Any]) -> list[str]:
    problems = read(KappaTuneSettings, given, FLAT)[1]
    groups = [group for group in base.__mro__ if group.__name__ in OTHER_GROUPS]
    of_others = [*dict.fromkeys(each.name for group in groups for each in fields(group)), *OTHER_KEYS]
    other = [name for name in of_others if name in values.explicit and name not in SHARED and getattr(values, name)]
    if other:
        problems.append(f"{', '.join(other)}: another method's, and ignored here. Delete these lines.")
    if values.additional_target and "modules_to_save" in given:
        problems.append(f"additional_target and {FLAT}modules_to_save say the same: delete one.")
    return problems


def _default(each: Field) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
