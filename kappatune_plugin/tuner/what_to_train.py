"""A config becomes a report and a selection: those that it names, or a scan of the model and what `select` takes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kappatune_plugin.checks import did_you_mean
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection, select
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE
from kappatune_plugin.weights.units import WeightUnit

# to modules_to_save, by the task and not by the model
ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}


def given_report(config: KappaTuneConfig, base_hash: str | None = None) -> KappaReport | None:
    """The report that `config` names; None if it names none.

    Args:
        base_hash: fingerprint of the model; None leaves unchecked whether the report is of it.

    Raises:
        KappaTuneError: the report can't be read, or is of another model.
    """
    if config.report is None:
        return None
    report = config.report if isinstance(config.report, KappaReport) else KappaReport.load(config.report)
    if base_hash not in (None, report.base["hash"]):
        raise KappaTuneError(
            f"The kappa report is of '{report.base['name']}' (fingerprint {report.base['hash']}), this model's "
            f"fingerprint is {base_hash}. Make one with `kappatune scan`, or drop `report`."
        )
    return report


def scan_for(config: KappaTuneConfig, model: nn.Module, **wanted: Any) -> KappaReport:
    """A scan of `model` with the config's include, exclude and rtol; `wanted` goes to `scan`: k, order, rank_by, ..."""
    exclude = DEFAULT_EXCLUDE if config.exclude is None else config.exclude
    return scan(model, include=config.include or (), exclude=exclude, rtol=config.rtol, **wanted)


def full_report(
    config: KappaTuneConfig, model: nn.Module, base_hash: str | None = None, rank_by: str = "kappa"
) -> KappaReport:
    """A report of every matrix that `config` may train: the given one if it knows them all, else a scan."""
    report = given_report(config, base_hash)
    # one that was made for the lowest kappa doesn't tell which of the others could be trained
    if report is None or report.made_for is not None:
        report = scan_for(config, model, rank_by=rank_by)
    return report


def report_for_selection(config: KappaTuneConfig, model: nn.Module, base_hash: str) -> KappaReport:
    """The given report, or a scan that finds out as much as the config's selection needs."""
    wanted = {key: getattr(config, key) for key in ("order", "rank_by", "seed", "scan_from")}
    return given_report(config, base_hash) or scan_for(config, model, k=config.budget, refuse_more=True, **wanted)


def selection_from(report: KappaReport, config: KappaTuneConfig) -> Selection:
    """What `config` takes of `report`."""
    return select(report, k=config.budget, order=config.order, rank_by=config.rank_by, seed=config.seed)


def given_selection(config: KappaTuneConfig) -> Selection | None:
    """The selection that `config` names or carries; None if there is none.

    Raises:
        KappaTuneError: it can't be read, or `k` is another one than the selection was made with.
    """
    given = config.selection
    if given is None:
        return None
    if not isinstance(given, Selection):
        given = Selection.from_dict(given) if isinstance(given, dict) else Selection.load(given)
    if config.k is not None and config.budget != parse_budget(given.k):
        raise KappaTuneError(f"k is {config.k!r} but the selection was made with k = {given.k!r}: remove one of them.")
    return given


def check_modules_to_save(config: KappaTuneConfig, model: nn.Module) -> None:
    """Raise KappaTuneError if `modules_to_save` names what isn't in `model`: PEFT ignores it."""
    names = [name for name, _ in model.named_modules()]
    wanted = set(config.modules_to_save or ()) - ADDED_BY_PEFT
    missing = sorted(each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in names))
    if missing:
        known = sorted({name.rpartition(".")[2] for name in names} - {""})
        hint = did_you_mean(missing[0], known)
        raise KappaTuneError(f"modules_to_save: the model has no module {', '.join(missing)}.{hint}")


def selected_units(
    selection: Selection, units: Mapping[str, WeightUnit], base_hash: str, hint: str
) -> list[WeightUnit]:
    """The units that `selection` names, in its order.

    Args:
        units: unit name -> unit, all of the model.
        base_hash: the model's fingerprint.
        hint: what the error for another base says at its end.

    Raises:
        KappaTuneError: the selection was made on another base, or names what the model doesn't have.
    """
    if selection.base["hash"] != base_hash:
        raise KappaTuneError(
            f"The selection was made on the base model '{selection.base['name']}' "
            f"(fingerprint {selection.base['hash']}), but this model's fingerprint is {base_hash}. Load that "
            f"base in the dtype it was scanned in, or drop `selection` and let this model be scanned.{hint}"
        )
    wrong = [
        f"{row.name} {tuple(row.shape)}"
        for row in selection.units
        if row.name not in units or tuple(row.shape) != units[row.name].shape
    ]
    if wrong:
        raise KappaTuneError(f"{len(wrong)} selected weights are not in this model, such as {wrong[:3]}.")
    return [units[row.name] for row in selection.units]
