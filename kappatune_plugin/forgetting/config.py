"""The block `forgetting:` of a recipe, and what can be wrong with it before anything is loaded."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kappatune_plugin.checks import is_number
from kappatune_plugin.data.rows import spec_problems
from kappatune_plugin.data.templates import parse_template
from kappatune_plugin.errors import KappaTuneError

SELF, TASK = "self", "task"
LONG_TEXTS = ("split", "truncate")
INTERPOLATE = ("per_matrix", "one", "off")
COUNTS = ("batch_size", "max_length", "samples")
RECALL_EXAMPLE = '{path: facts.jsonl, prompt: "{question}", completion: "{answer}"}'
# what generating answers and the harness take, with the least value of each number
GENERATE_KEYS = {"max_new_tokens": 1, "max_length": 2, "batch_size": 1}
HARNESS_NUMBERS = {"limit": 1, "num_fewshot": 0}
HARNESS_EXAMPLE = "[hellaswag, arc_challenge], or {tasks: [hellaswag], limit: 200}"


@dataclass
class ForgettingConfig:
    """The block `forgetting:` of a recipe.

    Attributes:
        control: a data set ({path, name, split, ...}; `text_column` in it overrides the block's), several ({NAME: data
            set}), or "self": text that the base model writes. None measures the task (and recall) only.
        every: measure every so many steps; 0 only before and after.
        recall: a data set of facts with the templates `prompt` and `completion`.
        batch_size, max_length: of measuring.
        long_texts: texts above `max_length` tokens are cut in pieces of that length ("split"), or only their first
            piece is measured ("truncate", as PEFT's MetaMathQA benchmark does).
        max_samples: texts of each control, and facts; None for all.
        text_column: the control's column.
        samples, seed: of "self".
        generate: {max_new_tokens, max_length, batch_size}: measure the task by answers that the model writes, before
            and after, see `answers.answer_accuracy`. None measures it by likelihood.
        lm_eval: tasks of the lm-evaluation-harness, measured before and after: names, or {tasks, limit, num_fewshot,
            include_path}.
        max_delta: how much the loss of a control may rise, in nats a token: what the end of a run is judged by, and
            where `k: auto` stops. None judges nothing.
        interpolate: scale back what was trained until `max_delta` is kept, with a scale for each matrix ("per_matrix"),
            one for all ("one"), or not ("off"). None: "per_matrix" with `max_delta`, "off" without and for `k: auto`.

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
    long_texts: str = "split"
    generate: dict[str, Any] | None = None
    lm_eval: list[str] | dict[str, Any] | None = None
    max_delta: float | None = None
    interpolate: str | None = None

    def __post_init__(self) -> None:
        problems = _number_problems(self) + _control_problems(self.control) + _recall_problems(self.recall)
        problems += _generate_problems(self.generate) + _harness_problems(self.lm_eval)
        if not problems and TASK in self.controls():
            problems.append(f"control: the name '{TASK}' stands for the task: write {{NAME: {self.controls()[TASK]}}}.")
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

    def harness(self) -> dict[str, Any] | None:
        """`lm_eval` as a mapping; None for no harness."""
        return {"tasks": self.lm_eval} if isinstance(self.lm_eval, list) else self.lm_eval


def _number_problems(config: ForgettingConfig) -> list[str]:
    least = {"every": 0, "seed": 0, **dict.fromkeys(COUNTS, 1), "max_length": 2}
    if config.max_samples is not None:
        least["max_samples"] = 1
    problems = _count_problems({key: getattr(config, key) for key in least}, least)
    if not isinstance(config.text_column, str):
        problems.append(f"text_column: {config.text_column!r} is not a column's name.")
    if config.long_texts not in LONG_TEXTS:
        problems.append(f"long_texts: {config.long_texts!r} is none of {', '.join(LONG_TEXTS)}.")
    if config.interpolate not in (None, *INTERPOLATE):
        problems.append(f"interpolate: {config.interpolate!r} is none of {', '.join(INTERPOLATE)}.")
    if config.interpolate in ("per_matrix", "one") and config.max_delta is None:
        problems.append(f"interpolate: {config.interpolate} needs a limit to keep: add `max_delta: 0.05`.")
    if config.max_delta is not None and not (is_number(config.max_delta) and config.max_delta > 0):
        problems.append(f"max_delta: {config.max_delta!r} is not a number of nats above 0, such as 0.05.")
    return problems


def _count_problems(values: dict[str, Any], least: dict[str, int], what: str = "") -> list[str]:
    """A line for each of `values` that isn't a whole number from `least` of its key on."""
    return [
        f"{what}{key}: {value!r} is not a whole number from {least[key]} on."
        for key, value in values.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < least[key]
    ]


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


def _generate_problems(generate: Any) -> list[str]:
    if generate is None:
        return []
    if not isinstance(generate, dict):
        return [f"generate: {generate!r} is not a mapping. Write {{max_new_tokens: 300}}."]
    unknown = [key for key in generate if key not in GENERATE_KEYS]
    known = {key: value for key, value in generate.items() if key in GENERATE_KEYS}
    return [
        f"generate: unknown key {key!r}; it takes {', '.join(GENERATE_KEYS)}." for key in unknown
    ] + _count_problems(known, GENERATE_KEYS, "generate.")


def _harness_problems(harness: Any) -> list[str]:
    if harness is None:
        return []
    block = {"tasks": harness} if isinstance(harness, list) else harness
    if not isinstance(block, dict):
        return [f"lm_eval: {harness!r} is no list of tasks. Write {HARNESS_EXAMPLE}."]
    known = ("tasks", "include_path", *HARNESS_NUMBERS)
    problems = [f"lm_eval: unknown key {key!r}; it takes {', '.join(known)}." for key in block if key not in known]
    tasks = block.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) and task for task in tasks):
        problems.append(f"lm_eval: tasks: {tasks!r} is no list of names. Write {HARNESS_EXAMPLE}.")
    if not isinstance(block.get("include_path", ""), str):
        problems.append(f"lm_eval: include_path: {block['include_path']!r} is not a folder.")
    numbers = {key: block[key] for key in HARNESS_NUMBERS if block.get(key) is not None}
    return problems + _count_problems(numbers, HARNESS_NUMBERS, "lm_eval.")
