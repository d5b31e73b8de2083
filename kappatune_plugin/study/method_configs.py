"""From a method to its PEFT config, with as many trainable parameters as the other methods where that is possible."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from traceback import walk_tb
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.selection.report import KappaReport, UnitReport, only_ranked
from kappatune_plugin.selection.selection import SelectedUnit, Selection, select
from kappatune_plugin.study.methods import PER_TYPE, Method, peft_methods
from kappatune_plugin.tuner.config import LORA, LORA_KEYS, KappaTuneConfig
from kappatune_plugin.tuner.plain_lora import peft_config_for
from kappatune_plugin.weights.load_model import trained_without_values
from kappatune_plugin.weights.patterns import filter_units, module_type
from kappatune_plugin.weights.units import WeightUnit, find_units, is_linear


@dataclass(frozen=True)
class Pool:
    """What the methods of a comparison may train.

    Attributes:
        report: the base model's, of the units that the recipe's include and exclude leave.
        k: the recipe's budget.
        rank_by: the recipe's criterion.
        values: trainable parameters of the κ-lowest selection with that budget, which the other methods match.
        adapter: the recipe's `adapter` and the keys of its pairs.
    """

    report: KappaReport
    k: Any
    rank_by: str
    values: int
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, report: KappaReport, k: Any, rank_by: str = "kappa", adapter: Mapping[str, Any] | None = None
    ) -> "Pool":
        """The pool whose reference is the selection of `k` lowest by `rank_by` in `report`."""
        chosen = select(only_ranked(report, rank_by), k=k, rank_by=rank_by).units
        size = _size(adapter or {})
        return cls(report, k, rank_by, sum(size(unit.shape) for unit in chosen), adapter or {})


def arm_config(method: Method, pool: Pool, base: nn.Module, seed: int) -> PeftConfig | None:
    """SFTTrainer's `peft_config` for `method`; None for full fine-tuning.

    Raises:
        KappaTuneError: nothing is left to train, or PEFT refuses the settings.
    """
    if method.kind == "full":
        return None
    if method.kind == "kappatune":
        selection = choose(method, pool, find_units(base, quantized=True), seed)
        adapter = _adapter(method, pool)
        if adapter.get("adapter") == LORA and "r" not in adapter:
            adapter["r"] = _rank(selection, pool.values)
            # as for PEFT's LoRA
            adapter.setdefault("lora_alpha", 2 * adapter["r"])
        return peft_config_for(base, KappaTuneConfig(task_type="CAUSAL_LM", selection=selection.to_dict(), **adapter))
    return _peft_config(method, pool, base)


def choose(method: Method, pool: Pool, units: Sequence[WeightUnit], seed: int) -> Selection:
    """The weight matrices that a KappaTune method trains: as many as have nearly the reference's number of parameters.

    A method's own `k` takes precedence; shape_matched_random has the reference's shapes, and so its parameters.

    Args:
        units: of the base model, for patterns that the method sets.
        seed: of the random orders.
    """
    rank_by, seed = method.settings.get("rank_by", pool.rank_by), seed + method.settings.get("seed", 0)
    allowed = _allowed(method, pool.report, units)
    if within := method.settings.get("within"):
        allowed = _highest(only_ranked(allowed, within), within, 2 * pool.values)
    report = only_ranked(allowed, rank_by)
    by_shape = method.base == "shape_matched_random"
    if method.part == PER_TYPE:
        return _per_type(method, report, method.settings.get("k", pool.k), rank_by, seed)
    adapter = _adapter(method, pool)
    matched_by_rank = adapter.get("adapter") == LORA and "r" not in adapter
    if "k" in method.settings or matched_by_rank or (by_shape and method.part is None):
        return select(report, method.settings.get("k", pool.k), method.base, rank_by, seed)
    order = "lowest" if by_shape else method.base
    everything = sum(unit.status == "ok" for unit in report.units)
    ranking = select(report, max(1, everything), order, rank_by, seed).units
    count = nearest_count([_size(adapter)(unit.shape) for unit in ranking], pool.values)
    return select(report, count, method.base, rank_by, seed)


def _highest(report: KappaReport, rank_by: str, values: int) -> KappaReport:
    """`report` with only the highest by `rank_by`, that have nearly `values` values together."""
    ranking = select(report, sum(unit.status == "ok" for unit in report.units), "highest", rank_by).units
    count = nearest_count([math.prod(unit.shape) for unit in ranking], values)
    names = {unit.name for unit in ranking[:count]}
    return replace(report, units=[unit for unit in report.units if unit.name in names])


def _adapter(method: Method, pool: Pool) -> dict[str, Any]:
    """`adapter` and the keys of its pairs: the method's, or the recipe's where the method trains in the same way."""
    own = {key: method.settings[key] for key in ("adapter", *LORA_KEYS) if key in method.settings}
    same = own.get("adapter", pool.adapter.get("adapter")) == pool.adapter.get("adapter")
    return {**(pool.adapter if same else {}), **own}


def _size(adapter: Mapping[str, Any]) -> Callable[[Sequence[int]], int]:
    """The number of values that are trained of a matrix of a shape."""
    return lambda shape: adapter["r"] * sum(shape) if adapter.get("r") else math.prod(shape)


def _rank(selection: Selection, values: int) -> int:
    """The rank at which pairs beside the selection have nearly `values` values."""
    least = min(min(unit.shape) for unit in selection.units)
    return min(least, max(1, round(values / sum(sum(unit.shape) for unit in selection.units))))


def nearest_count(sizes: Sequence[int], wanted: int) -> int:
    """How many of the first `sizes` have the sum nearest to `wanted`; at least 1, and the smaller number in a tie."""
    distances = [abs(total - wanted) for total in accumulate(sizes)]
    return distances.index(min(distances)) + 1


def _allowed(method: Method, report: KappaReport, units: Sequence[WeightUnit]) -> KappaReport:
    """`report` with only the units that the method's part and patterns allow."""
    names = {unit.name for unit in report.units if _in_part(unit, method.part)}
    patterns = {key: method.settings[key] for key in ("include", "exclude") if key in method.settings}
    if patterns:
        names &= {unit.name for unit in filter_units(units, **patterns)[0]}
    kept = [unit for unit in report.units if unit.name in names]
    if not any(unit.status == "ok" for unit in kept):
        raise KappaTuneError(f"{method.name}: none of the {len(report.units)} weights that may be trained is left.")
    return replace(report, units=kept)


def _in_part(unit: UnitReport, part: str | None) -> bool:
    return part in (None, PER_TYPE) or module_type(unit.name, unit.groups) == part


def _per_type(method: Method, report: KappaReport, k: Any, rank_by: str, seed: int) -> Selection:
    """`k` as a share of all matrices, taken of each type of matrix (q_proj, experts.*.up_proj, ...) separately."""
    share = len(select(report, k=k, rank_by=rank_by).units) / sum(unit.status == "ok" for unit in report.units)
    types: dict[str, list[UnitReport]] = {}
    for unit in report.units:
        if unit.status == "ok":
            types.setdefault(layer_and_type(unit.name)[1], []).append(unit)
    taken: list[SelectedUnit] = []
    for members in types.values():
        count = max(1, round(share * len(members)))
        taken += select(replace(report, units=members), count, method.base, rank_by, seed).units
    return Selection(taken, len(taken), method.base, rank_by, seed, dict(report.base))


def _peft_config(method: Method, pool: Pool, base: nn.Module) -> PeftConfig:
    """The method's config on every linear weight of the pool, and on fused experts where the method can."""
    names = {unit.name for unit in pool.report.units if _in_part(unit, method.part)}
    parameters = list(dict.fromkeys(unit.parameter for unit in find_units(base, quantized=True) if unit.name in names))
    linear = [name.removesuffix(".weight") for name in parameters if is_linear(base, name)]
    others = [name for name in parameters if not is_linear(base, name)]
    known = peft_methods()[method.base]
    fields = known.__dataclass_fields__
    settings = {"task_type": "CAUSAL_LM", **method.settings}
    if "target_modules" in fields:
        settings.setdefault("target_modules", linear)
    if "target_parameters" in fields and others:
        settings.setdefault("target_parameters", others)
    if not (settings.get("target_modules", True) or settings.get("target_parameters")):
        raise KappaTuneError(f"{method.name}: PEFT's {method.base} adapts linear layers, and none is left here.")
    if "r" in fields and "r" not in settings:
        of_rank_1 = _trainable(method.name, base, _built(method, known, {**settings, "r": 1}))
        settings["r"] = max(1, round(pool.values / of_rank_1))
        if "lora_alpha" in fields:
            # the scale of PEFT's updates is lora_alpha / r: the same at every rank
            settings.setdefault("lora_alpha", 2 * settings["r"])
    elif "effective_rank" in fields and "effective_rank" not in settings:
        settings["effective_rank"] = _preserved_share([base.get_submodule(name).weight for name in linear], pool.values)
    return _built(method, known, settings)


def _built(method: Method, known: type, settings: dict[str, Any]) -> PeftConfig:
    try:
        return known(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise KappaTuneError(f"{method.name}: PEFT refuses its settings: {error}") from error


@contextmanager
def peft_refusals(name: str) -> Iterator[None]:
    """Re-raise PEFT's errors in this block as a KappaTuneError with the method's name."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
        ours = isinstance(error, KappaTuneError | torch.cuda.OutOfMemoryError)
        if ours or not any(module.partition(".")[0] == "peft" for module in frames):
            raise
        raise KappaTuneError(f"{name}: PEFT can't apply it to this model: {error}") from error


def _trainable(name: str, base: nn.Module, config: PeftConfig) -> int:
    """How many parameters `config` would train on `base`, counted on a copy without values."""
    with peft_refusals(name):
        with torch.device("meta"):
            empty = type(base)(base.config)
        return trained_without_values(empty, config)[1]


def _preserved_share(weights: Sequence[torch.Tensor], values: int) -> float:
    """OSF's share of preserved singular directions that leaves `values` to train, at m + n + 1 for each direction."""
    everything = sum(min(weight.shape) * (sum(weight.shape) + 1) for weight in weights)
    # OSF has to preserve at least one direction of the smallest matrix
    least = (1 + 1e-6) / min(min(weight.shape) for weight in weights)
    return max(least, 1 - values / everything)
