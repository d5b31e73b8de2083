"""The block `forgetting:` of a recipe, and what can be wrong with it before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, field_validator

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.data.examples import Labels
from kappatune_plugin.data.rows import DataSet
from kappatune_plugin.data.templates import TemplateText
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Block, Number, Whole

SELF, TASK = "self", "task"
RECALL_EXAMPLE = '{path: facts.jsonl, prompt: "{question}", completion: "{answer}"}'
HARNESS_EXAMPLE = "[hellaswag, arc_challenge], or {tasks: [hellaswag], limit: 200}"


def _named_control(spec: Any) -> Any:
    return spec if spec == SELF else DataSet.given(spec)


class Recall(DataSet):
    """The block `forgetting.recall:`, a data set of facts, or of another task, and how to ask for them."""

    prompt: TemplateText = Field(description="Template of the question.", examples=[RECALL_EXAMPLE])
    completion: TemplateText = Field(description="Template of the right answer.", examples=[RECALL_EXAMPLE])
    labels: Labels = Field(
        default=None,
        description="As data.labels, for another task that isn't trained: right is the likeliest of these answers. "
        "null: right is what greedy decoding gives.",
    )
    label_column: str = Field(default="label", description="The column that labels words.")


class Generate(Block):
    """The block `forgetting.generate:`, as `answers.answer_accuracy` takes it."""

    max_new_tokens: Whole = Field(default=300, ge=1, description="Longest answer, in tokens.")
    max_length: Whole | None = Field(
        default=None, ge=2, description="Longest prompt and answer together, in tokens; null for no limit."
    )
    batch_size: Whole | None = Field(
        default=None, ge=1, description="Answers written at once; null as forgetting.batch_size."
    )


class Harness(Block):
    """The block `forgetting.lm_eval:`, tasks of the lm-evaluation-harness."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Names of tasks or groups.", examples=[HARNESS_EXAMPLE]
    )
    limit: Whole | None = Field(default=None, ge=1, description="Examples of each task; null for all.")
    num_fewshot: Whole | None = Field(
        default=None, ge=0, description="Examples shown before the question; null as each task says."
    )
    include_path: str | None = Field(default=None, description="A folder with tasks of one's own, as YAML files.")


class ForgettingConfig(Block):
    """The block `forgetting:` of a recipe.

    Raises:
        KappaTuneError: values that can't be right, a line each.
    """

    control: str | dict[str, Any] | None = Field(
        default=None,
        description="A data set ({path, name, split, ...}; a `text_column` in it overrides the block's), several "
        "({NAME: data set}), or self: text that the base model writes. null measures the task (and recall) only.",
    )
    every: Whole = Field(default=0, ge=0, description="Measure every so many steps; 0 only before and after.")
    recall: Recall | None = Field(
        default=None, description="A data set of facts, or of another task, with the templates prompt and completion."
    )
    batch_size: Whole = Field(default=8, ge=1, description="Texts measured at once.")
    max_length: Whole = Field(default=256, ge=2, description="Longest piece of text that is measured, in tokens.")
    max_samples: Whole | None = Field(
        default=200,
        ge=1,
        description="Texts of each control, at even distances over all of them, and the first facts; null for all.",
    )
    running_text: bool = Field(
        default=False,
        description="Read all of a control's texts as one, in blocks of max_length tokens, whatever max_samples: so "
        "perplexities of WikiText are reported.",
    )
    text_column: str = Field(default="text", description="The control's column.")
    samples: Whole = Field(default=64, ge=1, description="Texts that the base model writes for control: self.")
    seed: Whole = Field(default=0, ge=0, description="Of what the base model writes.")
    long_texts: Literal["split", "truncate"] = Field(
        default="split",
        description="Texts above max_length tokens are cut in pieces of that length (split), or only their first piece "
        "is measured (truncate, as PEFT's MetaMathQA benchmark does).",
    )
    generate: Generate | None = Field(
        default=None,
        description="Measure the task by answers that the model writes, before and after; null by likelihood.",
        examples=["generate: {max_new_tokens: 300}"],
    )
    lm_eval: Harness | None = Field(
        default=None,
        description="Tasks of the lm-evaluation-harness, measured before and after: names, or a mapping.",
    )
    max_delta: Number | None = Field(
        default=None,
        gt=0,
        description="How much the loss of a control may rise, in nats a token: what was trained is scaled back until "
        "that holds, and `k: auto` stops there. null sets no limit.",
        examples=["max_delta: 0.05"],
    )
    interpolate: Literal["per_matrix", "one", "off"] | None = Field(
        default=None,
        description="Scale back what was trained until max_delta is kept, with a scale for each matrix (per_matrix), "
        "one for all (one), or not (off). null: per_matrix with max_delta, off without it and for `k: auto`.",
    )

    @field_validator("control", mode="plain")
    @classmethod
    def _data_sets(cls, control: Any) -> Any:
        if control is None or control == SELF:
            return control
        if isinstance(control, str):
            hint = did_you_mean(control, [SELF])
            raise KappaTuneError(f"'{control}' is neither self nor a data set.{hint} Write {{path: {control}}}.")
        if not isinstance(control, dict) or not control:
            raise KappaTuneError(
                f"{control!r} is not a data set. Write {{path: texts.jsonl}}, {{NAME: {{path: ...}}}} or self."
            )
        if "path" in control:
            return DataSet.given(control)
        return TypeAdapter(dict[str, Annotated[Any, AfterValidator(_named_control)]]).validate_python(control)

    @field_validator("recall", mode="before")
    @classmethod
    def _facts(cls, recall: Any) -> Any:
        if not isinstance(recall, dict | None):
            raise KappaTuneError(f"{recall!r} is not a mapping. Write {RECALL_EXAMPLE}.")
        return recall

    @field_validator("lm_eval", mode="before")
    @classmethod
    def _names_alone(cls, tasks: Any) -> Any:
        if not isinstance(tasks, dict | list | None):
            raise KappaTuneError(f"{tasks!r} is not a list of tasks. Write {HARNESS_EXAMPLE}.")
        return {"tasks": tasks} if isinstance(tasks, list) else tasks

    def contradictions(self) -> list[str]:
        """A control that is called as the task is, and scales without a limit that they keep."""
        problems, named = [], self.controls().get(TASK)
        if named:
            problems.append(f"control: the name '{TASK}' stands for the task: write {{NAME: {named}}}.")
        if self.interpolate in ("per_matrix", "one") and self.max_delta is None:
            problems.append(f"interpolate: {self.interpolate} needs a limit to keep: add `max_delta: 0.05`.")
        return problems

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
        """`lm_eval` as what `run_harness` takes; None for no harness."""
        return self.lm_eval.model_dump(exclude_unset=True) if self.lm_eval else None
