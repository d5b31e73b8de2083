"""What the block `kappatune:` of a recipe says."""

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.budget import DEFAULT_K, Budget, parse_budget
from kappatune_plugin.selection.ranking import ORDERS, RANKS
from kappatune_plugin.selection.selection import setting_problems
from kappatune_plugin.tuner.register import register_peft_type
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE


@dataclass
class KappaTuneConfig(PeftConfig):
    """Configuration of KappaTune (arXiv 2506.16289): train the K weight matrices of lowest condition number.

    Raises:
        KappaTuneError: values that can't be right, all of them in one message.
    """

    # PEFT reads this attribute of every method; units are chosen by `k`, so it is no setting
    target_modules = None

    k: int | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "How much to train: 75 (weight matrices), '10%' (of those not excluded), {params: 160M} or "
            "{kappa: 30} (all up to that condition number). Default: 75."
        },
    )
    order: str = field(
        default="lowest",
        metadata={"help": f"Which of the ranking to train: {', '.join(ORDERS)}. All but 'lowest' are controls."},
    )
    rank_by: str = field(default="kappa", metadata={"help": f"What to rank by: {', '.join(RANKS)}."})
    seed: int = field(default=0, metadata={"help": "Seed of the random orders."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Groups or globs of unit names that may be trained. Default: all."}
    )
    exclude: list[str] | None = field(
        default=None,
        metadata={"help": f"Groups or globs never trained. Default: [{', '.join(DEFAULT_EXCLUDE)}]."},
    )
    rtol: float = field(default=1e-3, metadata={"help": "Relative width of the certified interval of kappa."})
    scan_from: str | None = field(
        default=None,
        metadata={"help": "A folder or hub name with this model's unquantized weights, to rank by those."},
    )
    report: Any = field(
        default=None, metadata={"help": "A kappa report made earlier (path), instead of scanning the model."}
    )
    selection: Any = field(
        default=None, metadata={"help": "A selection made earlier (path to selection.json), instead of `k`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the units, e.g. a new classifier head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too; TRL sets it for tokens it adds."}
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base was quantized, noted for `kappatune merge`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register_peft_type()
        problems = config_problems(vars(self))
        if problems:
            raise KappaTuneError("\n".join(problems))

    @property
    def budget(self) -> Budget:
        """`k`, read; the default where it is None."""
        return parse_budget(DEFAULT_K if self.k is None else self.k)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it; paths mean nothing on another machine and are left out."""
        return {**super().to_dict(), "report": None, "scan_from": None}


# TRL and the tuner set these
NOT_ASKED_FOR = ("trainable_token_indices", "base_quantization")
# what the block `kappatune:` of a recipe takes; PEFT sets the other fields
KAPPATUNE_KEYS = tuple(
    each.name
    for each in fields(KappaTuneConfig)
    if each.name not in PeftConfig.__dataclass_fields__ and each.name not in NOT_ASKED_FOR
)


def config_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with the settings in `values`, a line each; settings it doesn't name are at their default."""
    problems, k = [], values.get("k")
    if k == "auto":
        problems.append(
            "k: auto needs the forgetting block of a recipe, to run with `kappatune sft`. Give a number here."
        )
    known = 1 if k in (None, "auto") else k
    problems += setting_problems(
        known, values.get("order", "lowest"), values.get("rank_by", "kappa"), values.get("seed", 0)
    )
    for key in ("include", "exclude", "modules_to_save"):
        if values.get(key) is not None and not _strings(values[key]):
            problems.append(f"{key}: {values[key]!r} is not a list of names: write [norm, bias, '*.q_proj.weight'].")
    rtol = values.get("rtol", 1e-3)
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
        problems.append(f"rtol: {rtol!r} is not a number between 0 and 1, such as 0.001.")
    if values.get("scan_from") is not None and not isinstance(values["scan_from"], str):
        problems.append(f"scan_from: {values['scan_from']!r} is not a folder or a model's name.")
    for key in ("report", "selection"):
        if values.get("scan_from") is not None and values.get(key) is not None:
            problems.append(f"{key} and scan_from are both given: with a {key} nothing is scanned, remove one.")
    if values.get("report") is not None and values.get("selection") is not None:
        problems.append("report and selection are both given: a selection needs no report, remove one.")
    return problems


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(item, str) for item in value)
