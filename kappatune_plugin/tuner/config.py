"""What the block `kappatune:` of a recipe says."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from peft import PeftConfig
from pydantic import AfterValidator, Field, StrictBool

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Number, Whole, not_one_of, read
from kappatune_plugin.selection.auto_budget import AUTO
from kappatune_plugin.selection.budget import DEFAULT_K, Budget, parse_budget
from kappatune_plugin.selection.settings import SelectSettings, check_budget
from kappatune_plugin.tuner.register import register_peft_type
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE

READ_BY = "Install the Python package kappatune_plugin and `import kappatune_plugin` before PEFT loads this folder."
NAMES_EXAMPLE = "[norm, bias, '*.q_proj.weight']"
FULL, LORA = "full", "lora"
ADAPTERS = (FULL, LORA)
LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
DEFAULT_R = 8
UNIFORM_LORA = re.compile(r"lora_r([1-9]\d{0,5})_all_linear")


def _known_adapter(value: Any) -> Any:
    if value not in ADAPTERS:
        raise KappaTuneError(not_one_of(value, ADAPTERS))
    return value


def _reference(value: Any) -> Any:
    named = isinstance(value, str) and UNIFORM_LORA.fullmatch(value)
    if value is not None and not named and not (isinstance(value, dict) and parse_budget(value).kind == "params"):
        raise KappaTuneError(f"{value!r:.60} is no reference. Write lora_r16_all_linear, or {{params: 218M}}.")
    return value


def _budget_of_a_model(k: Any) -> Any:
    if k == AUTO:
        raise KappaTuneError(
            "auto needs the forgetting block of a recipe, to run with `kappatune sft`. Give a number here."
        )
    return k if k is None else check_budget(k, least=0)


class KappaTuneSettings(SelectSettings):
    """What to train, checked: the settings that `KappaTuneConfig`, recipes and the toolkits have in common."""

    k: Annotated[Any, AfterValidator(_budget_of_a_model)] = Field(
        default=None,
        description=f"{SelectSettings.model_fields['k'].description} 0 trains modules_to_save alone. Default: "
        f"{DEFAULT_K}.",
    )
    include: list[str] | None = Field(
        default=None,
        description="Groups or globs of unit names that may be trained. Default: all.",
        examples=[NAMES_EXAMPLE],
    )
    exclude: list[str] | None = Field(
        default=None,
        description=f"Groups or globs never trained. Default: [{', '.join(DEFAULT_EXCLUDE)}].",
        examples=[NAMES_EXAMPLE],
    )
    rtol: Number = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="Relative width of the certified interval of kappa.",
        examples=["a number between 0 and 1, such as 0.001"],
    )
    scan_from: str | None = Field(
        default=None, description="A folder or hub name with this model's unquantized weights, to rank by those."
    )
    report: Any = Field(default=None, description="A kappa report made earlier (path), instead of scanning the model.")
    selection: Any = Field(
        default=None, description="A selection made earlier (path to selection.json), instead of `k`."
    )
    adapter: Annotated[Any, AfterValidator(_known_adapter)] = Field(
        default=FULL,
        description="full trains the selected matrices whole, lora a low-rank pair beside each of them.",
    )
    r: Whole | None = Field(
        default=None, ge=1, description=f"Rank of the pairs of `adapter: lora`. Default: {DEFAULT_R}."
    )
    lora_alpha: Number | None = Field(
        default=None, gt=0, description="The pairs are scaled by lora_alpha / r. Default: r."
    )
    lora_dropout: Number | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout before the pairs, where all that is selected are whole linear layers. Default: 0.",
    )
    use_rslora: StrictBool | None = Field(
        default=None, description="Scale the pairs by lora_alpha / sqrt(r) instead. Default: false."
    )
    match: Annotated[Any, AfterValidator(_reference)] = Field(
        default=None,
        description="Train as many values as this has: lora_r16_all_linear, LoRA of rank 16 on all linear layers, or "
        "{params: 218M}. In the place of `k`; with `adapter: lora` in the place of `r`.",
    )
    modules_to_save: list[str] | None = Field(
        default=None,
        description="Modules trained and saved whole beside the units, e.g. a new classifier head.",
        examples=[NAMES_EXAMPLE],
    )

    def contradictions(self) -> list[str]:
        """Several sources of what to train, and what `SelectSettings` names."""
        problems = super().contradictions() + [
            f"{key} and scan_from are both given: with a {key} nothing is scanned, remove one."
            for key in ("report", "selection")
            if self.scan_from is not None and getattr(self, key) is not None
        ]
        of_lora = [key for key in LORA_KEYS if getattr(self, key) is not None]
        if of_lora and self.adapter != LORA:
            problems.append(
                f"{', '.join(of_lora)}: of low-rank pairs, and adapter is {self.adapter}: write `adapter: lora`, or "
                "delete them."
            )
        matched = "r" if self.adapter == LORA else "selection" if self.selection is not None else "k"
        if self.match is not None and getattr(self, matched) is not None:
            problems.append(f"match and {matched} both say how much is trained: delete one.")
        if self.report is not None and self.selection is not None:
            problems.append("report and selection are both given: a selection needs no report, remove one.")
        nothing = self.k not in (None, AUTO) and parse_budget(self.k, least=0).value == 0
        if nothing and not self.modules_to_save:
            problems.append(
                "k: 0 trains no matrix, and modules_to_save names nothing else: name a module there "
                "(`modules_to_save: [multi_modal_projector]`), or write `k: 75`."
            )
        return problems


# what the block `kappatune:` of a recipe takes; PEFT, TRL and the tuner set the config's other fields
KAPPATUNE_KEYS = tuple(KappaTuneSettings.model_fields)


def _setting(name: str) -> Any:
    """The field `name` of the dataclass that PEFT needs, with the default and description of the checked settings."""
    declared = KappaTuneSettings.model_fields[name]
    return field(default=declared.default, metadata={"help": declared.description})


@dataclass
class KappaTuneConfig(PeftConfig):
    """Configuration of KappaTune (arXiv 2506.16289): train the K weight matrices of lowest condition number.

    Raises:
        KappaTuneError: values that can't be right, all of them in one message.
    """

    # PEFT reads this attribute of every method; units are chosen by `k`, so it is no setting
    target_modules = None

    k: int | str | dict[str, Any] | None = _setting("k")
    order: str = _setting("order")
    rank_by: str = _setting("rank_by")
    seed: int = _setting("seed")
    include: list[str] | None = _setting("include")
    exclude: list[str] | None = _setting("exclude")
    rtol: float = _setting("rtol")
    scan_from: str | None = _setting("scan_from")
    report: Any = _setting("report")
    selection: Any = _setting("selection")
    adapter: str = _setting("adapter")
    r: int | None = _setting("r")
    lora_alpha: float | None = _setting("lora_alpha")
    lora_dropout: float | None = _setting("lora_dropout")
    use_rslora: bool | None = _setting("use_rslora")
    match: str | dict[str, Any] | None = _setting("match")
    modules_to_save: list[str] | None = _setting("modules_to_save")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too; TRL sets it for tokens it adds."}
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base was quantized, noted for `kappatune merge`."}
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "Names of a classifier's classes, noted for `kappatune merge`."}
    )

    read_by: str = field(
        default=READ_BY, metadata={"help": "What loads the adapter, for who gets PEFT's KeyError: 'KAPPATUNE'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register_peft_type()
        settings, problems = read(KappaTuneSettings, {key: getattr(self, key) for key in KAPPATUNE_KEYS})
        if settings is None:
            raise KappaTuneError("\n".join(problems))
        for key in KAPPATUNE_KEYS:
            setattr(self, key, getattr(settings, key))
        if self.adapter == LORA and self.match is None:
            self.r = self.r or DEFAULT_R

    @property
    def budget(self) -> Budget:
        """`k`, read; the default where it is None."""
        return parse_budget(DEFAULT_K if self.k is None else self.k, least=0)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it; paths mean nothing on another machine and are left out."""
        return {**super().to_dict(), "report": None, "scan_from": None}
