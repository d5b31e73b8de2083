"""The blocks of a recipe: mappings in, settings and a line for each mistake out."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, ValidationInfo, field_validator, model_validator

from kappatune_plugin.data.examples import Labels
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.data.rows import TEMPLATES, DataSet, DataSets, one_or_more
from kappatune_plugin.data.templates import TemplateText, check_template
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.config import ForgettingConfig
from kappatune_plugin.scanning.gain import GainConfig
from kappatune_plugin.schema import Block, Whole, read
from kappatune_plugin.selection.auto_budget import AUTO, AutoBudget
from kappatune_plugin.selection.criteria import ON_ROWS
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.selection.settings import check_budget
from kappatune_plugin.speech.settings import AudioBlock
from kappatune_plugin.tuner.config import KAPPATUNE_KEYS, LORA, KappaTuneConfig, KappaTuneSettings


class KappaTuneBlock(KappaTuneSettings):
    """The block `kappatune:` of a recipe: what to train, and what a run decides by and no model needs."""

    k: Any = Field(
        default=None,
        description=f"{KappaTuneSettings.model_fields['k'].description} auto decides it during training.",
    )
    auto: AutoBudget | None = Field(default=None, description="How `k: auto` decides.")
    gain: GainConfig | None = Field(default=None, description=f"How a `rank_by` of {', '.join(ON_ROWS)} is measured.")
    quantize_experts: StrictBool = Field(
        default=True,
        description="With load_in_4bit also quantize fused experts, which transformers leaves unquantized.",
    )

    @field_validator("k")
    @classmethod
    def _budget_or_auto(cls, k: Any) -> Any:
        return k if k is None or k == AUTO else check_budget(k, least=0)

    @field_validator("report", "selection")
    @classmethod
    def _readable(cls, path: Any, key: ValidationInfo) -> Any:
        """Reads the file at once: the mistake would otherwise show after the model is loaded."""
        if path is not None and not isinstance(path, str):
            raise KappaTuneError(f"{path!r} is not the path of a file.")
        if path is not None:
            (KappaReport if key.field_name == "report" else Selection).load(path)
        return path

    def contradictions(self) -> list[str]:
        """Between what is trained and how a run decides it, and what `KappaTuneSettings` names."""
        problems = super().contradictions()
        if self.auto is not None and self.k != AUTO:
            problems.append(f"auto is given, but k is {self.k!r}: write `k: auto`, or delete auto.")
        if self.k == AUTO and self.adapter == LORA:
            problems.append("adapter: lora needs a number for k: `k: auto` takes back whole matrices.")
        if self.k == AUTO and self.match is not None:
            problems.append("match and `k: auto` both say how much is trained: delete one.")
        if self.k == AUTO and self.modules_to_save:
            problems.append("modules_to_save: k: auto can't take back what whole modules learned: delete it.")
        if self.rank_by in ON_ROWS and "order" not in self.model_fields_set and self.selection is None:
            problems.append(
                f"order is missing: with rank_by {self.rank_by} the highest are those to train. Write `order: "
                "highest`, or lowest for the control."
            )
        if self.rank_by in ON_ROWS and self.scan_from is not None:
            problems.append(f"scan_from: {self.rank_by} is measured on the model that is trained: delete it.")
        return problems

    def config(self) -> KappaTuneConfig:
        """For PEFT, with the largest budget for `k: auto`."""
        values = {key: getattr(self, key) for key in KAPPATUNE_KEYS}
        if self.k == AUTO:
            # all that may be trained; `auto` says how many of them are
            values["k"] = None if self.selection is not None else (self.auto or AutoBudget()).most
        return KappaTuneConfig(task_type="CAUSAL_LM", **values)


class TestSet(DataSet):
    """The block `data.test:`, which may word its rows in its own way."""

    prompt: TemplateText = Field(default=None, description="In the place of data.prompt.")
    completion: TemplateText = Field(default=None, description="In the place of data.completion.")


def _test_sets(specs: Any) -> Any:
    return TestSet.given(specs) if isinstance(specs, Mapping) else one_or_more(specs)


def _if_given(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: check(value) if value is not None else None


class DataBlock(Block):
    """The block `data:` of a recipe: the rows to train on and to test with, and the templates that word them."""

    train: DataSets = Field(
        description="The rows to train on: a data set (a path, or {path, name, split, take, ...}), or a list of them.",
        examples=["`train: {path: rows.jsonl}`"],
    )
    validation: DataSets | None = Field(
        default=None,
        description="Rows of the task held out from training, by which it is chosen how much of what was trained is "
        "kept (forgetting.max_delta). Without it a tenth of train.",
    )
    test: Annotated[Any, AfterValidator(lambda specs: _test_sets(specs) if specs else None)] = Field(
        default=None,
        description="The rows to measure the task on, as train; prompt and completion in it go before the block's.",
    )
    prompt: Annotated[Any, AfterValidator(_if_given(check_template))] = Field(
        default=None, description='Template of what the model is shown: "Tweet: {text}\\nSarcasm:".'
    )
    completion: Annotated[Any, AfterValidator(_if_given(check_template))] = Field(
        default=None, description='Template of what it learns to answer: " {label}".'
    )
    labels: Labels = Field(
        default=None,
        description="The word of each value of the label column: {0: 'no', 1: 'yes'}; without templates the answers "
        "that the rows of data.test choose between: ['no', 'yes'].",
    )
    label_column: str | None = Field(
        default=None, description="The column that labels words; needed where completion names several."
    )
    max_chars: Whole | None = Field(
        default=None, ge=1, description="Leave out training rows with more characters in prompt and completion."
    )
    replay: ReplayConfig | None = Field(
        default=None, description="Plain text mixed in beside the task's rows, so that less is forgotten."
    )
    end_token: StrictBool = Field(
        default=True, description="false leaves the end-of-text token that TRL appends out of the loss."
    )

    @model_validator(mode="before")
    @classmethod
    def _something_to_train_on(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return block
        # an empty `train:` is none
        return {key: value for key, value in block.items() if key != "train" or value}

    def contradictions(self) -> list[str]:
        """Keys that only say something beside templates."""
        problems, given = [], [key for key in TEMPLATES if getattr(self, key) is not None]
        own = [key for key in TEMPLATES if isinstance(self.test, dict) and key in self.test]
        if len(given) == 1:
            problems.append(f"{given[0]} is given alone; prompt and completion go together.")
        if own and not given:
            keys = ", ".join(f"test.{key}" for key in own)
            problems.append(f"{keys}: the test rows' own; prompt and completion of the block are missing.")
        if self.max_chars is not None and not given:
            problems.append("max_chars counts the characters of prompt and completion, which are missing.")
        if self.labels is not None and not given and not self.test:
            problems.append("labels: give prompt and completion, which show them, or data.test with such answers.")
        return problems


def auto_problems(block: KappaTuneBlock, forgetting: Any, args: Any) -> list[str]:
    """What `k: auto` lacks in the recipe's other parts, a line each.

    Args:
        forgetting: the block as it was written.
        args: TRL's SFTConfig; None if it is wrong.
    """
    if block.k != AUTO:
        return []
    window, problems = (block.auto or AutoBudget()).window, []
    for key, example in (("control", "self"), ("every", 50), ("max_delta", 0.05)):
        if isinstance(forgetting, dict | None) and not (forgetting or {}).get(key):
            problems.append(f"kappatune.k: auto needs forgetting.{key}: add `{key}: {example}` to that block.")
    if args is not None and (args.logging_strategy != "steps" or args.logging_steps > window):
        problems.append(
            f"kappatune.auto.window: within {window} steps no training loss is logged (logging_strategy "
            f"{args.logging_strategy.value}, logging_steps {args.logging_steps}): lower logging_steps or raise window."
        )
    if args is not None and args.load_best_model_at_end:
        problems.append("load_best_model_at_end: k: auto keeps the last values within forgetting.max_delta. Delete it.")
    return problems


# of the block `data`, what words text
OF_TEXT = ("prompt", "completion", "labels", "label_column", "max_chars", "replay", "end_token")


def audio_problems(block: KappaTuneBlock | None, data: DataBlock | None, arguments: dict[str, Any]) -> list[str]:
    """What can't go beside the block `audio`, a line each; sets in `arguments` what TRL needs for it."""
    problems = []
    if data is None:
        problems.append("audio: the recordings are missing: add a block data with train.")
    elif words := [key for key in OF_TEXT if key in data.model_fields_set]:
        problems.append(f"data.{', data.'.join(words)}: for rows of text; beside audio delete it.")
    if block is not None and block.rank_by in ON_ROWS:
        problems.append(f"kappatune.rank_by: {block.rank_by} is measured on rows of text: beside audio write kappa.")
    if arguments.get("packing") or arguments.get("padding_free"):
        problems.append("packing, padding_free: recordings can't be packed: delete them.")
    if arguments.get("remove_unused_columns"):
        problems.append("remove_unused_columns: true would remove the recordings: delete it.")
    arguments["remove_unused_columns"] = False
    # a mapping that says otherwise is TRL's to refuse
    arguments["dataset_kwargs"] = {**(arguments.get("dataset_kwargs") or {}), "skip_prepare_dataset": True}
    return problems


def read_blocks(blocks: Mapping[str, Any], problems: list[str]) -> list[Any]:
    """The blocks `kappatune`, `data`, `audio` and `forgetting`; None for one that is missing or wrong.

    Args:
        problems: gets a line for each mistake.
    """
    found: list[Any] = []
    for name, model in RECIPE_BLOCKS.items():
        block, wrong = read(model, blocks[name], f"{name}.") if name in blocks else (None, [])
        found.append(block)
        problems += wrong
    return found


RECIPE_BLOCKS: dict[str, type[Block]] = {
    "kappatune": KappaTuneBlock,
    "data": DataBlock,
    "audio": AudioBlock,
    "forgetting": ForgettingConfig,
}
