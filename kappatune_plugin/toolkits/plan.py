"""Config lines that train a selection with an unmodified toolkit, where this package can't be installed.

Unmodified toolkits choose whole parameters (full fine-tuning) or whole modules (LoRA). Where transformers 5 fuses a
layer's experts into one parameter, none of them can train one expert's matrix alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.budget import DEFAULT_K
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection, select
from kappatune_plugin.weights.load_model import empty_model, trained_without_values
from kappatune_plugin.weights.open_source import open_source
from kappatune_plugin.weights.units import WeightUnit, find_units

STOCK = ("axolotl", "llamafactory", "trl", "ms-swift")
LORA = ("trl", "llamafactory")
# LLaMA-Factory puts LoRA on modules only, and a parameter that holds all experts isn't one
CAN_WIDEN = ("axolotl", "ms-swift", "trl")


@dataclass(frozen=True)
class Plan:
    """The configuration that trains a selection with an unmodified toolkit.

    Attributes:
        toolkit: one of STOCK.
        lines: the configuration's lines.
        parameters: names of the parameters in memory that it chooses, each once.
        missing: names of the selected matrices that the toolkit can't choose.
        notes: what the toolkit does differently, a line each.
    """

    toolkit: str
    lines: list[str]
    parameters: list[str]
    missing: list[str]
    notes: list[str]


def plan(
    model: str,
    toolkit: str,
    k: Any = DEFAULT_K,
    report: KappaReport | None = None,
    widen: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Select `k` of the model's matrices and write the configuration of `toolkit` that trains them.

    Args:
        model: a folder or hub name.
        report: an earlier one of this model; default: scan it.
        widen: where a matrix is part of a parameter, choose the smallest thing around it that the toolkit can train.

    Raises:
        KappaTuneError: an unknown toolkit, or one that can choose none of the matrices.
    """
    if toolkit not in STOCK:
        raise KappaTuneError(f"--for {toolkit} is none of {', '.join(STOCK)}.")
    if report is None:
        report = scan(model, trust_remote_code=trust_remote_code)
    else:
        _check_base(report, model, trust_remote_code)
    return stock_plan(select(report, k=k), lambda: empty_model(model, trust_remote_code), toolkit, widen)


def _check_base(report: KappaReport, model: str, trust_remote_code: bool) -> None:
    """Refuse a report of other weights. A name on the hub isn't downloaded for it: there the toolkit will."""
    if not list(Path(model).glob("*.safetensors")):
        return
    found = open_source(model, trust_remote_code).base_hashes()
    if report.base["hash"] not in found:
        raise KappaTuneError(
            f"The kappa report is of '{report.base['name']}' (fingerprint {report.base['hash']}), and the fingerprint "
            f"of '{model}' is {found.today}. Make one with `kappatune scan`, or leave --report out."
        )


def stock_plan(selection: Selection, build: Callable[[], nn.Module], toolkit: str, widen: bool = False) -> Plan:
    """The plan for a selection; each call of `build` makes a new model, with or without values. See `plan`."""
    units = {unit.name: unit for unit in find_units(build())}
    unknown = [row.name for row in selection.units if row.name not in units]
    if unknown:
        raise KappaTuneError(f"{len(unknown)} selected weights are not in this model, such as {unknown[0]}.")
    other = [row for row in selection.units if tuple(row.shape) != units[row.name].shape]
    if other:
        raise KappaTuneError(
            f"The report is of another model: its {other[0].name} has the shape {list(other[0].shape)}, this model's "
            f"{list(units[other[0].name].shape)}. Make one with `kappatune scan`."
        )
    chosen = [units[row.name] for row in selection.units]
    in_vain = widen and toolkit not in CAN_WIDEN
    widen = widen and not in_vain
    able = [unit for unit in chosen if widen or not unit.index]
    modules: list[str] = []
    if toolkit in LORA:
        able, modules = _lora_able(able, build, parameters=toolkit == "trl")
    missing = [unit.name for unit in chosen if unit not in able]
    if not able:
        raise KappaTuneError(f"{toolkit} can choose none of the {len(chosen)} matrices. {_why(toolkit, chosen, widen)}")
    parameters = list(dict.fromkeys(unit.parameter for unit in able))
    named = [name for name in parameters if name.rpartition(".")[0] not in modules]
    lines = {
        "axolotl": lambda: _axolotl(able),
        "ms-swift": lambda: _ms_swift(parameters),
        "trl": lambda: _trl(modules, named),
        "llamafactory": lambda: ["finetuning_type: lora", f"lora_target: {','.join(modules)}"],
    }[toolkit]()
    notes = _notes(toolkit, able, units, named)
    if in_vain:
        notes.append(f"--widen changes nothing for {toolkit}, which chooses modules only.")
    if missing:
        left = [unit for unit in chosen if unit not in able]
        notes.append(f"{len(missing)} of {len(chosen)} selected matrices are left out. {_why(toolkit, left, widen)}")
    return Plan(toolkit, lines, parameters, missing, notes)


def lora_places(model: nn.Module, modules: Sequence[str], parameters: Sequence[str]) -> set[str]:
    """Names of the parameters that PEFT puts LoRA on if asked for these modules and parameters; changes `model`.

    For mixtures of experts PEFT rewrites the request: a module called gate, or gate_proj, becomes the fused parameter
    of every layer.

    Raises:
        ValueError: PEFT can't put LoRA there.
    """
    config = LoraConfig(target_modules=list(modules) or None, target_parameters=list(parameters) or None)
    places = set()
    for name, module in trained_without_values(model, config)[0].base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            attribute = getattr(module, "parameter_name", None) or "weight"
            places.add(f"{name.replace('.base_layer', '')}.{attribute}")
    return places


def _lora_able(
    units: Iterable[WeightUnit], build: Callable[[], nn.Module], parameters: bool
) -> tuple[list[WeightUnit], list[str]]:
    """The `units` that PEFT can put LoRA on without touching others, and the modules to name for that.

    Weights of one kind behave alike, so PEFT is tried once for each kind.

    Args:
        parameters: whether a weight can also be named as a parameter.
    """
    kinds: dict[tuple[str, ...], list[WeightUnit]] = {}
    for unit in units:
        kinds.setdefault(tuple(unit.parameter.split(".")[-2:]), []).append(unit)
    able: list[WeightUnit] = []
    modules: list[str] = []
    for alike in kinds.values():
        names = list(dict.fromkeys(unit.parameter for unit in alike))
        owners = [name.rpartition(".")[0] for name in names]
        if not alike[0].index and _puts_lora(build, owners, [], names):
            modules += owners
        elif not (parameters and _puts_lora(build, [], names, names)):
            continue
        able += alike
    return able, modules


def _puts_lora(
    build: Callable[[], nn.Module], modules: Sequence[str], parameters: Sequence[str], wanted: Sequence[str]
) -> bool:
    try:
        return lora_places(build(), modules, parameters) == set(wanted)
    except ValueError:
        return False


def _axolotl(units: Sequence[WeightUnit]) -> list[str]:
    """Axolotl's `unfrozen_parameters`: patterns that match from the beginning, with periods taken literally."""
    patterns = dict.fromkeys(f"^{unit.parameter}$" + (f"[{unit.index[0]}]" if unit.index else "") for unit in units)
    return ["unfrozen_parameters:", *(f"  - '{pattern}'" for pattern in patterns)]


def _ms_swift(parameters: Sequence[str]) -> list[str]:
    """Arguments of `swift sft`; the expression is searched for in each parameter's name."""
    names = "|".join(name.replace(".", r"\.") for name in parameters)
    return ["--tuner_type full \\", "--freeze_parameters_ratio 1 \\", f"--trainable_parameters_regex '^({names})$'"]


def _trl(modules: Sequence[str], parameters: Sequence[str]) -> list[str]:
    """LoRA on the modules by their full paths, and on parameters that PEFT doesn't see as a module's weight."""
    lines = ["use_peft: true"]
    if parameters:
        # PEFT refuses dropout there
        lines += ["lora_dropout: 0.0", "lora_target_parameters:", *(f"  - {name}" for name in parameters)]
    if len(modules) == 1:
        # TRL turns a list of one into a string, which PEFT reads as a regular expression
        modules = [*modules, *modules]
    return lines + (["lora_target_modules:", *(f"  - {name}" for name in modules)] if modules else [])


def _notes(toolkit: str, able: Sequence[WeightUnit], units: dict[str, WeightUnit], named: Sequence[str]) -> list[str]:
    notes = []
    if toolkit in LORA:
        notes.append("The matrices get a LoRA each; they are not trained themselves.")
    fused = {unit.parameter for unit in able if unit.index}
    if fused:
        whole = sum(math.prod(unit.shape) for unit in units.values() if unit.parameter in fused)
        wanted = sum(math.prod(unit.shape) for unit in able if unit.index)
        notes.append(f"{len(fused)} fused parameters of {whole:,} values are chosen for {wanted:,} selected ones.")
    if toolkit == "trl" and named:
        notes.append("lora_target_parameters needs a newer TRL than 0.24, which has the key and ignores it.")
    if fused and toolkit == "axolotl":
        notes.append(
            "Axolotl sets the gradients of the other experts to zero: their optimizer state stays, so write "
            "`weight_decay: 0.0`, and don't use ZeRO-3 or FSDP."
        )
    return notes


def _why(toolkit: str, left: Sequence[WeightUnit], widened: bool) -> str:
    """Why a stock toolkit can't choose the matrices in `left`, and what to do."""
    slices = sum(bool(unit.index) for unit in left)
    reasons = []
    if slices and not widened:
        widen = ", or choose the whole parameters with --widen" if toolkit in CAN_WIDEN else ""
        reasons.append(
            f"{slices} are single experts', inside parameters that hold all experts of a layer: plan with transformers "
            f"4 if you train with it (there most models keep each expert in modules of its own){widen}."
        )
    others = len(left) - (0 if widened else slices)
    if others:
        reasons.append(f"On {others} PEFT can't put LoRA without putting it on others.")
    return " ".join([*reasons, "Trained with kappatune they all are."])
