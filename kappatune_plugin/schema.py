"""Checked blocks of settings: pydantic finds what is wrong, and here it is said in this package's words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError, model_validator

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.errors import KappaTuneError

# pydantic's type of an error -> what the value was to be, with the numbers of the error's context
EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "string_too_short": "a text that isn't empty",
    "string_": "a text",
    "bool_": "true or false",
    "list_": "a list such as [a, b]",
    "tuple_": "a list",
    "dict_": "a mapping such as {{key: value}}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than_equal": "a number from {ge} on",
    "greater_than": "a number above {gt}",
    "less_than_equal": "a number up to {le}",
    "less_than": "a number below {lt}",
}


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise KappaTuneError(f"{value!r} is not a number.")
    return value


# pydantic alone would take True for 1
Whole = Annotated[int, Strict()]
Number = Annotated[float, BeforeValidator(_no_truth_value)]


class Block(BaseModel):
    """Settings without unknown keys and without numbers that aren't finite.

    Raises:
        KappaTuneError: all that is wrong with the values it is made of, a line each.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise KappaTuneError("\n".join(problem_lines(error, type(self), values))) from error

    # pydantic's own mark of an __init__ that blocks inside of others are made without: their errors are gathered
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def contradictions(self) -> list[str]:
        """What can't be together in keys that are each right, a line each."""
        return []

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Block":
        problems = self.contradictions()
        if problems:
            raise KappaTuneError("\n".join(problems))
        return self

    @classmethod
    def given(cls, values: Any) -> dict[str, Any]:
        """`values` in the types of this block, without the keys that they leave out; for validators of other models."""
        return cls.model_validate(values).model_dump(exclude_unset=True)


Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], values: Any, where: str = "") -> tuple[Model | None, list[str]]:
    """The block `model` from `values` (None: all defaults) and no problems, or None and a line for each problem.

    Args:
        where: what keys are called by in front, "kappatune." or "kappatune_".
    """
    values = {} if values is None else values
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        return None, problem_lines(error, model, values, where)


def read_as(kind: Any, content: Any) -> tuple[Any, list[str]]:
    """As `read`, for any type that pydantic knows, such as a dataclass with __pydantic_config__."""
    try:
        return TypeAdapter(kind).validate_python(content), []
    except ValidationError as error:
        return None, problem_lines(error, None, content)


def problem_lines(error: ValidationError, model: type[BaseModel] | None, values: Any, where: str = "") -> list[str]:
    """What is wrong, a line each: the key's path, what was found and what is expected.

    Args:
        model: that refused `values`; names the keys there are. None for a dataclass.
    """
    lines = []
    for each in error.errors(include_url=False):
        path = where + key_path(each["loc"], values)
        inside, field = _at(model, each["loc"])
        write = f" Write {field.examples[0]}." if field is not None and field.examples else ""
        if each["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = keys_of(inside) if inside else []
            takes = f" It takes {', '.join(known)}." if known else ""
            lines.append(f"unknown key '{path}'.{did_you_mean(str(each['loc'][-1]), known)}{takes}")
        elif each["type"].startswith("missing"):
            lines.append(f"{path} is missing.{write}")
        elif each["type"] == "value_error":
            text = str(each["ctx"]["error"])
            # a block as a whole may be wrong, and its validators name their keys themselves
            before = f"{path}: " if each["loc"] else where
            lines += [before + line for line in text.splitlines()]
        else:
            path = path.rstrip("._: ")
            before = f"{path}: " if path else ""
            lines.append(before + _type_problem(each, inside) + write)
    return lines


def _type_problem(each: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    found, kind, context = each["input"], each["type"], each.get("ctx", {})
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        keys = f" of {', '.join(keys_of(model))}" if model else ""
        return f"expected a mapping{keys}, found {found!r:.80}."
    if kind == "literal_error":
        return not_one_of(found, re.findall(r"'([^']+)'", context["expected"]) or [context["expected"]])
    words = _expected(each)
    return f"{found!r:.80} is not {words}." if words else f"{found!r:.80}: {each['msg']}."


def _expected(each: Mapping[str, Any]) -> str | None:
    found = [words for start, words in EXPECTED.items() if each["type"].startswith(start)]
    return found[0].format(**each.get("ctx", {})) if found else None


def expectations(error: ValidationError) -> list[str]:
    """What a value of one of several types was to be, each type's once."""
    found = (_expected(each) or str(each["msg"]) for each in error.errors(include_url=False))
    return list(dict.fromkeys(found))


def key_path(location: Sequence[int | str], values: Any) -> str:
    """units[3].kappa, with the name of each numbered row that has one: units[3] (lm_head.weight).kappa."""
    path = ""
    for step in location:
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            values = None
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        if isinstance(step, int) and isinstance(values, Mapping) and isinstance(values.get("name"), str):
            path += f" ({values['name']})"
    return path


def _at(model: type[BaseModel] | None, location: Sequence[int | str]) -> tuple[type[BaseModel] | None, Any]:
    """The block that the last key of `location` is one of (or stands for), and that key's field."""
    field = None
    for depth, step in enumerate(location, start=1):
        if model is None or step not in model.model_fields:
            return model, None
        field = model.model_fields[step]
        inner = block_of(field.annotation)
        if inner is None:
            # inside of a list or mapping it is another's key
            inside = any(isinstance(each, str) for each in location[depth:])
            return (None, None) if inside else (model, field)
        model = inner
    return model, field


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a block, as they are written."""
    return [field.alias or name for name, field in model.model_fields.items()]


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The block that an annotation `Block` or `Block | None` names; None if it names none."""
    found = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return next((each for each in found if issubclass(each, BaseModel)), None)


def not_one_of(value: Any, choices: Iterable[str]) -> str:
    """What to say about a value that is none of the `choices`."""
    choices = list(choices)
    return f"{value!r:.60} is none of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
