"""A config becomes a report and a selection: those that it names, or a scan of the model and what `select` takes."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.distributed.lost_ranks import together
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection, select
from kappatune_plugin.tuner.config import LORA, UNIFORM_LORA, KappaTuneConfig
from kappatune_plugin.weights.fingerprint import BaseHashes
from kappatune_plugin.weights.fused_experts import EXPERTS, experts_quantization
from kappatune_plugin.weights.load_model import trained_without_values
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE
from kappatune_plugin.weights.quantized import quantization_of
from kappatune_plugin.weights.units import WeightUnit, embedding_modules

# what PEFT adds to modules_to_save, by the task and not by the model; to its own config, after the tuner copied it
ADDED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
UNQUANTIZED = (
    " The base was quantized in training, and this model isn't: quantize it in the same way, or make a plain "
    "checkpoint with `kappatune merge`."
)
TRAINED_WHOLE = "trained whole, as modules_to_save says"


def given_report(config: KappaTuneConfig, hashes: BaseHashes | None = None) -> KappaReport | None:
    """The report that `config` names; None if it names none.

    Args:
        hashes: fingerprints of the model; None leaves unchecked whether the report is of it.

    Raises:
        KappaTuneError: the report can't be read, or is of another model.
    """
    if config.report is None:
        return None
    report = config.report if isinstance(config.report, KappaReport) else KappaReport.load(config.report)
    if hashes is not None and report.base["hash"] not in hashes:
        raise KappaTuneError(
            f"The kappa report is of '{report.base['name']}' (fingerprint {report.base['hash']}), this model's "
            f"fingerprint is {hashes.today}. Make one with `kappatune scan`, or drop `report`."
        )
    return report


def scan_for(config: KappaTuneConfig, source: ModelSource, **wanted: Any) -> KappaReport:
    """A scan of a model with the config's include, exclude and rtol; `wanted` goes to `scan`: k, order, rank_by, ...

    What `modules_to_save` trains whole is left out: it would be trained twice.
    """
    exclude = DEFAULT_EXCLUDE if config.exclude is None else config.exclude
    whole = trained_whole(config, source)
    report = scan(source, include=config.include or (), exclude=(*exclude, *whole), rtol=config.rtol, **wanted)
    report.left_out.update(dict.fromkeys(whole, TRAINED_WHOLE))
    return report


def full_report(
    config: KappaTuneConfig, model: nn.Module, hashes: BaseHashes | None = None, rank_by: str = "kappa"
) -> KappaReport:
    """A report of every matrix that `config` may train: the given one if it knows them all, else a scan."""
    report, source = given_report(config, hashes), ModelSource(model)
    # one that was made for the lowest kappa doesn't tell which of the others could be trained
    if report is None or report.made_for is not None:
        return scan_for(config, source, rank_by=rank_by)
    return _without(report, trained_whole(config, source))


def report_for_selection(config: KappaTuneConfig, source: ModelSource, hashes: BaseHashes) -> KappaReport:
    """The given report, or a scan that finds out as much as the config's selection needs."""
    wanted = {key: getattr(config, key) for key in ("order", "rank_by", "seed", "scan_from")}
    report = given_report(config, hashes)
    if report is None:
        return scan_for(config, source, k=config.budget, refuse_more=True, **wanted)
    return _without(report, trained_whole(config, source))


def _without(report: KappaReport, whole: Sequence[str]) -> KappaReport:
    if not whole:
        return report
    rows = [row for row in report.units if row.name not in whole]
    return replace(report, units=rows, left_out=report.left_out | dict.fromkeys(whole, TRAINED_WHOLE))


def selection_from(report: KappaReport, config: KappaTuneConfig) -> Selection:
    """What `config` takes of `report`."""
    return select(report, k=config.budget, order=config.order, rank_by=config.rank_by, seed=config.seed)


def given_selection(config: KappaTuneConfig, source: ModelSource) -> Selection | None:
    """The selection that `config` names or carries, that of no matrix with `k: 0`; None if there is none.

    Raises:
        KappaTuneError: it can't be read, or `k` is another one than the selection was made with.
    """
    given = config.selection
    if given is None and config.budget.value == 0:
        base = {"name": source.name, "hash": source.base_hash()}
        return Selection([], config.k, config.order, config.rank_by, config.seed, base)
    if given is None:
        return None
    if not isinstance(given, Selection):
        given = Selection.from_dict(given) if isinstance(given, dict) else Selection.load(given)
    if config.k is not None and config.budget != parse_budget(given.k, least=0):
        raise KappaTuneError(f"k is {config.k!r} but the selection was made with k = {given.k!r}: remove one of them.")
    return given


def settle_modules_to_save(config: KappaTuneConfig, model: nn.Module) -> None:
    """Add to `config.modules_to_save` what PEFT adds to it for the task.

    Raises:
        KappaTuneError: it names what isn't in `model`, which PEFT ignores.
    """
    names = [name for name, _ in model.named_modules()]
    added = ADDED_BY_PEFT.get(config.task_type, ())
    wanted = set(config.modules_to_save or ()) - {each for of_task in ADDED_BY_PEFT.values() for each in of_task}
    missing = sorted(each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in names))
    if missing:
        known = sorted({name.rpartition(".")[2] for name in names} - {""})
        hint = did_you_mean(missing[0], known)
        raise KappaTuneError(f"modules_to_save: the model has no module {', '.join(missing)}.{hint}")
    if added:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *added]))


def how_to_quantize(config: KappaTuneConfig, model: nn.Module) -> str:
    """What to do with a `model` that isn't quantized as `config` notes of the base of an adapter; "" if it is."""
    noted, here = config.base_quantization or {}, experts_quantization(model)
    if noted.keys() - {EXPERTS} and not quantization_of(model):
        return UNQUANTIZED
    if noted.get(EXPERTS) == here or not noted:
        return ""
    call = f"BitsAndBytesConfig(**{noted[EXPERTS]})" if EXPERTS in noted else ""
    what = f"call kappatune_plugin.quantize_experts(model, {call}) before" if call else "load them unquantized"
    return (
        f" The base's fused experts were stored otherwise in training: {what}; in a recipe the key is quantize_experts."
    )


def note_base(config: KappaTuneConfig, model: nn.Module) -> None:
    """Note in `config` what merging can't learn from the base's files: class, quantization, names of its classes."""
    # PEFT notes the class only where there is no `task_type`, which leaves several classes open
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.base_quantization, experts = quantization_of(model), experts_quantization(model)
    if experts:
        config.base_quantization = {**(config.base_quantization or {}), EXPERTS: experts}
    names = getattr(getattr(model, "config", None), "id2label", None)
    if names and "Classification" in type(model).__name__:
        config.labels = [names[number] for number in sorted(names)]


def trained_whole(config: KappaTuneConfig, source: ModelSource) -> list[str]:
    """Names of the units inside the modules that `modules_to_save` names, under any name of a tied weight."""
    endings = tuple(config.modules_to_save or ())
    if not endings:
        return []
    parameters = source.model.named_parameters(remove_duplicate=False)
    inside = {id(value) for name, value in parameters if any(each.endswith(endings) for each in _owners(name))}
    return [unit.name for unit in source.units if id(source.model.get_parameter(unit.parameter)) in inside]


def warn_of_new_weights(config: KappaTuneConfig, source: ModelSource, trained: Collection[WeightUnit]) -> None:
    """Warn of matrices that the checkpoint doesn't hold, unless they are trained: other random numbers at each loading.

    transformers 5 marks the parameters that it found in files. Embeddings and the output head that tokens were added to
    are left out: PEFT saves them.
    """
    loaded = {name for name, value in source.model.named_parameters() if getattr(value, "_is_hf_initialized", False)}
    if not loaded or config.inference_mode:
        return
    grown = [getattr(each, "weight", None) for each in embedding_modules(source.model)]
    loaded |= {name for name, value in source.model.named_parameters() if any(value is each for each in grown)}
    kept = {*trained_whole(config, source), *(unit.name for unit in trained)}
    names = [unit.name for unit in source.units if unit.parameter not in loaded and unit.name not in kept]
    if names:
        warnings.warn(
            f"{len(names)} matrices aren't in the checkpoint, such as {names[0]}: they hold random numbers that the "
            "adapter doesn't save, so it gives other results where it is loaded. Train them: "
            f"modules_to_save: [{names[0].rpartition('.')[0]}].",
            stacklevel=2,
        )


def _owners(parameter: str) -> list[str]:
    """Names of the modules that hold a parameter, from the outermost to its owner."""
    parts = parameter.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@dataclass(frozen=True)
class Settled:
    """What a config trains of a model.

    Attributes:
        report: the kappa report that the selection was made from; None if a selection was given.
        units: those of the selection, in its order.
    """

    selection: Selection
    report: KappaReport | None
    units: list[WeightUnit]


def settle(
    config: KappaTuneConfig, source: ModelSource, hashes: BaseHashes, scanning: AbstractContextManager | None = None
) -> Settled:
    """Decide what `config` trains, from its selection, its report, or a scan; put k or r in the place of its `match`.

    Args:
        hashes: the model's fingerprints.
        scanning: a context to scan in.

    Raises:
        KappaTuneError: as `given_selection`, `report_for_selection` and `selected_units`.
    """
    match_budget(config, source)
    report, selection = None, given_selection(config, source)
    if selection is None:
        # what follows a scan waits for all ranks, forever under NCCL if one died in it
        with together("the scan"), scanning or nullcontext():
            report = report_for_selection(config, source, hashes)
        selection = selection_from(report, config)
    found, hint = {unit.name: unit for unit in source.units}, how_to_quantize(config, source.model)
    units = selected_units(selection, found, hashes, hint, trained_whole(config, source))
    match_rank(config, source, units)
    return Settled(selection, report, units)


def selected_units(
    selection: Selection, units: Mapping[str, WeightUnit], hashes: BaseHashes, hint: str, whole: Collection[str] = ()
) -> list[WeightUnit]:
    """The units that `selection` names, in its order.

    Args:
        units: unit name -> unit, all of the model.
        hashes: the model's fingerprints.
        hint: what the error for another base says at its end.
        whole: names of units that are `trained_whole`.

    Raises:
        KappaTuneError: the selection was made on another base, or names what the model hasn't, or what is in `whole`.
    """
    if selection.base["hash"] not in hashes:
        raise KappaTuneError(
            f"The selection was made on the base model '{selection.base['name']}' "
            f"(fingerprint {selection.base['hash']}), but this model's fingerprint is {hashes.today}. Load that "
            f"base in the dtype it was scanned in, or drop `selection` and let this model be scanned.{hint}"
        )
    wrong = [
        f"{row.name} {tuple(row.shape)}"
        for row in selection.units
        if row.name not in units or tuple(row.shape) != units[row.name].shape
    ]
    if wrong:
        raise KappaTuneError(f"{len(wrong)} selected weights are not in this model, such as {wrong[:3]}.")
    twice = [row.name for row in selection.units if row.name in whole]
    if twice:
        raise KappaTuneError(
            f"{len(twice)} selected weights are in modules that modules_to_save trains whole, such as {twice[:3]}. "
            "Drop those modules from modules_to_save, or make a selection without these weights (exclude)."
        )
    return [units[row.name] for row in selection.units]


def keep_statistics(model: nn.Module) -> None:
    """Put batch norms that aren't trained into evaluation mode.

    In training mode they would take up the new data's means and variances, which an adapter doesn't hold: loaded, it
    would be another model than the one that was trained. Speech encoders have them (Conformer).
    """
    for name, module in model.named_modules():
        trained = ".modules_to_save." in name or any(each.requires_grad for each in module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and not trained:
            module.eval()


def match_budget(config: KappaTuneConfig, source: ModelSource) -> None:
    """With `adapter: full`, put the budget `k` in the place of `match`."""
    if config.match is not None and config.adapter != LORA:
        config.k, config.match = {"params": wanted(config, source)}, None


def match_rank(config: KappaTuneConfig, source: ModelSource, units: Sequence[WeightUnit]) -> None:
    """With `adapter: lora`, put the rank nearest to `match` in its place; set `lora_alpha` where it follows from r."""
    if config.match is not None and units:
        config.r = max(1, round(wanted(config, source) / sum(sum(unit.shape) for unit in units)))
        config.match = None
    if config.adapter == LORA and config.lora_alpha is None:
        config.lora_alpha = float(config.r)


def wanted(config: KappaTuneConfig, source: ModelSource) -> int:
    """The number of values that `match` asks for; LoRA's as PEFT itself attaches it, to a copy without values.

    Raises:
        KappaTuneError: the model can't be built from its config.
    """
    if not isinstance(config.match, str):
        return int(parse_budget(config.match).value)
    rank = int(UNIFORM_LORA.fullmatch(config.match)[1])
    try:
        with torch.device("meta"):
            empty = type(source.model)(source.model.config)
        return trained_without_values(empty, LoraConfig(r=rank, target_modules="all-linear"))[1]
    except (AttributeError, TypeError, ValueError) as error:
        raise KappaTuneError(
            f"match: {config.match}: can't count it for this model ({error}). Give a number."
        ) from error
