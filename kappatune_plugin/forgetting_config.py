"""The block `forgetting:` of a recipe, and what can be wrong with it before anything is loaded."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappatune_plugin.data import spec_problems
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.templates import parse_template

SELF = "self"
COUNTS = ("batch_size", "max_length", "samples")
RECALL_EXAMPLE = '{path: facts.jsonl, prompt: "{question}", completion: "{answer}"}'


@dataclass
class ForgettingConfig:
    """The block `forgetting:` of a recipe.

    Attributes:
        control: a data set ({path, name, split, ...}), several ({NAME: data set}), or "self": text that the base model
            writes. None measures the task (and recall) only.
        every: measure every so many steps; 0 only before and after.
        recall: a data set of facts with the templates `prompt` and `completion`.
        batch_size, max_length: of measuring; longer texts are cut in pieces of `max_length` tokens.
        max_samples: texts of each control, and facts; None for all.
        text_column: the control's column.
        samples, seed: of "self".

    Raises:
        KappaTuneError: values that can't be right, a line each.
    """

    control: str | dict[str, Any] | None = None
    every: int = 0
    recall: dict[str, Any] | None = None
    batch_size: int = 8
    max_length: int = 256
    max_samples: int | None = 200
    text_column: str = "text"
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        problems = _number_problems(self) + _control_problems(self.control) + _recall_problems(self.recall)
        if problems:
            raise KappaTuneError("\n".join(problems))

    def controls(self) -> dict[str, Any]:
        """Name -> data set, or -> "self"."""
        if self.control is None:
            return {}
        if self.control == SELF:
            return {SELF: SELF}
        if "path" in self.control:
            return {Path(self.control.get("name") or self.control["path"]).stem: self.control}
        return self.control


def _number_problems(config: ForgettingConfig) -> list[str]:
    least = {"every": 0, "seed": 0, **dict.fromkeys(COUNTS, 1), "max_length": 2}
    if config.max_samples is not None:
        least["max_samples"] = 1
    problems = []
    for key, smallest in least.items():
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            problems.append(f"{key}: {value!r} is not a whole number from {smallest} on.")
    if not isinstance(config.text_column, str):
        problems.append(f"text_column: {config.text_column!r} is not a column's name.")
    return problems


def _control_problems(control: Any) -> list[str]:
    if control is None or control == SELF:
        return []
    if isinstance(control, str):
        near = difflib.get_close_matches(control, [SELF], n=1, cutoff=0.5)
        hint = " Did you mean 'self'?" if near else ""
        return [f"control: '{control}' is neither self nor a data set.{hint} Write {{path: {control}}}."]
    if not isinstance(control, dict) or not control:
        return [f"control: {control!r} is no data set. Write {{path: texts.jsonl}}, {{NAME: {{path: ...}}}} or self."]
    if "path" in control:
        return spec_problems(control, "control")
    return [
        problem
        for name, spec in control.items()
        if spec != SELF
        for problem in ([f"control: the name {name!r} is not a text."] if not isinstance(name, str) else [])
        + spec_problems(spec, f"control {name}")
    ]


def _recall_problems(recall: Any) -> list[str]:
    if recall is None:
        return []
    if not isinstance(recall, dict):
        return [f"recall: {recall!r} is not a mapping. Write {RECALL_EXAMPLE}."]
    problems = spec_problems(recall, "recall")
    for key in ("prompt", "completion"):
        if key not in recall:
            problems.append(f"recall: {key} is missing. Write {RECALL_EXAMPLE}.")
            continue
        try:
            parse_template(recall[key], f"recall.{key}")
        except KappaTuneError as error:
            problems.append(str(error))
    return problems
