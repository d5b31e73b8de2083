"""Which weight matrices to train: a kappa report and a budget in, a Selection with the reasons out."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from kappatune_plugin.checks import shortened
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import FORMAT, read_json, write_json
from kappatune_plugin.schema import Whole, read
from kappatune_plugin.selection.budget import DEFAULT_K, Budget, parse_budget
from kappatune_plugin.selection.file_checks import FILE, Base, Finite, Name, Shape, repeated_names
from kappatune_plugin.selection.ranking import RANDOM, NotMeasured, Unsettled, choose, rank_values
from kappatune_plugin.selection.report import ABOVE, KappaReport, UnitReport
from kappatune_plugin.selection.settings import BudgetOrNone, Order, RankBy, SelectSettings

NAMES_SHOWN = 5


@dataclass(frozen=True)
class SelectedUnit:
    """One weight matrix to train: its name in the checkpoint, (rows, columns), and its condition number."""

    __pydantic_config__ = FILE

    name: Name
    shape: Shape
    kappa: Annotated[Finite, Field(ge=1)]


class _File(SelectSettings):
    """The content of selection.json; none of its keys may be missing."""

    format: Literal[FORMAT]  # type: ignore[valid-type]
    k: BudgetOrNone
    order: Order
    rank_by: RankBy
    seed: Whole
    base: Base
    units: list[SelectedUnit]

    def contradictions(self) -> list[str]:
        """No matrices, or some, against what `k` says."""
        problems = super().contradictions()
        if (parse_budget(self.k, least=0).value == 0) != (not self.units):
            problems.append(f"units: {len(self.units)} matrices, and k is {self.k!r}.")
        return problems


@dataclass(frozen=True, repr=False)
class Selection:
    """The weight matrices to train.

    Attributes:
        units: in the order they were taken.
        k: the budget as given.
        order, rank_by, seed: as given to `select`.
        base: {"name", "hash"} of the report's model.
        reasons: name -> why it was taken or left, for every unit of the report and every one left out of it; empty
            for a selection read from a file. Ignored by ==.
    """

    units: list[SelectedUnit]
    k: int | str | dict[str, Any]
    order: str
    rank_by: str
    seed: int
    base: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        first = f", first {self.units[0].name}" if self.units else ""
        return (
            f"Selection({len(self.units)} matrices of {self.base['name']!r}, {self.order} {self.rank_by}, "
            f"k={self.k!r}{first})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of selection.json."""
        content = {key: value for key, value in asdict(self).items() if key not in ("units", "reasons")}
        units = [{"name": unit.name, "shape": list(unit.shape), "kappa": unit.kappa} for unit in self.units]
        return {"format": FORMAT, **content, "units": units}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Selection":
        """The selection that `to_dict` wrote.

        Raises:
            KappaTuneError: anything missing, unknown or wrong, up to five problems in one message.
        """
        found, problems = read(_File, content)
        if found is not None:
            problems = repeated_names([row.name for row in found.units])
        if problems:
            raise KappaTuneError(f"Not a selection:\n{shortened(problems)}\nMake it again with `kappatune select`.")
        return cls(**{key: getattr(found, key) for key in ("units", "k", "order", "rank_by", "seed", "base")})

    def save(self, path: str | os.PathLike) -> None:
        """Write selection.json to `path`, atomically. Raises KappaTuneError if `path` can't be written."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Selection":
        """Read a selection that `save` wrote. Raises KappaTuneError if it is missing or damaged; says where."""
        content = read_json(path, "a selection")
        try:
            return cls.from_dict(content)
        except KappaTuneError as error:
            raise KappaTuneError(f"{path}: {error}") from error


def select(
    report: KappaReport,
    k: Any = DEFAULT_K,
    order: str = "lowest",
    rank_by: str = "kappa",
    seed: int = 0,
) -> Selection:
    """Choose the weight matrices to train.

    Units whose status is not "ok" are never selected. Ties are broken by name, so neither the result nor a random draw
    depends on the order of the report's rows. A report made for a smaller selection is enough for any within it.

    Args:
        k: the budget (see `parse_budget`). A share is of the report's matrices. params: units are taken in order while
            all their values together fit; kappa: all up to that kappa, or from it on for order "highest"; for "random"
            as many as those.
        order: "lowest" is the method, the others are controls: "highest"; "random", any units; "shape_matched_random",
            random units, as many of each shape as "lowest" takes. Lowest and highest refer to the values of `rank_by`.
        rank_by: "kappa", "kappa_over_null", "log_volume", "stable_rank", "snr", or one of
            `criteria.ON_ROWS`; `criteria` defines them.
        seed: of the random orders.

    Raises:
        KappaTuneError: wrong settings, more units asked for than there are or than the report has measured, or nothing
            selected.
    """
    budget = check_settings(k, order, rank_by, seed)
    if not any(unit.status in ("ok", ABOVE) for unit in report.units):
        raise KappaTuneError(f"Nothing to select from: {_numbers(report)}. {_what_to_do(report)}")
    try:
        taken, ranking = choose(report.units, budget, order, rank_by, seed)
    except Unsettled as error:
        raise KappaTuneError(unsettled(report, str(error))) from error
    except NotMeasured:
        raise
    except KappaTuneError as error:
        raise KappaTuneError(f"{error} ({_numbers(report)}). {_what_to_do(report)}") from error
    if any(unit.status == ABOVE for unit in taken):
        raise KappaTuneError(unsettled(report, f"not all matrices drawn with seed {seed} are measured"))
    units = [SelectedUnit(unit.name, unit.shape, unit.kappa) for unit in taken]
    reasons = _reasons(report, ranking, taken, budget, order, rank_by, seed)
    return Selection(units, budget.written, order, rank_by, seed, dict(report.base), reasons)


def within(report: KappaReport, selection: Selection) -> KappaReport:
    """`report` with all but the matrices of `selection` left out: to rank within what another criterion chose.

    Raises:
        KappaTuneError: a matrix of `selection` is not in the report.
    """
    names = {unit.name for unit in selection.units}
    kept = [row for row in report.units if row.name in names]
    if len(kept) < len(names):
        missing = sorted(names - {row.name for row in kept})
        raise KappaTuneError(
            f"{len(missing)} of the {len(names)} matrices to select within are not in the report, such as "
            f"{missing[0]}: give a report of the same model."
        )
    others = {row.name: "not in the selection to choose within" for row in report.units if row.name not in names}
    return replace(report, units=kept, left_out={**report.left_out, **others})


def check_settings(k: Any, order: str, rank_by: str, seed: int) -> Budget:
    """`k` as a Budget. Raises KappaTuneError with everything that is wrong in these settings of `select`."""
    return parse_budget(SelectSettings(k=k, order=order, rank_by=rank_by, seed=seed).k)


def unsettled(report: KappaReport, reason: str) -> str:
    """The error for a report that lacks condition numbers which a selection needs."""
    return (
        f"The report was made to select {report.made_for} and isn't enough for this: {reason}. Scan again for what you "
        "want, or for the whole table: `kappatune scan MODEL --full`."
    )


def differences(a: Selection, b: Selection) -> str:
    """The differences between two selections for an error message, a line each; "" if they train the same units.

    At most five units are named on each side; the order of the units doesn't matter.
    """
    shapes_a, shapes_b = ({unit.name: tuple(unit.shape) for unit in each.units} for each in (a, b))
    lines = []
    if a.base["hash"] != b.base["hash"]:
        lines.append(f"base model: {a.base['name']} ({a.base['hash']}) and {b.base['name']} ({b.base['hash']})")
    for label, names in (
        ("only in the first", [name for name in shapes_a if name not in shapes_b]),
        ("only in the second", [name for name in shapes_b if name not in shapes_a]),
        ("of other shape", [name for name in shapes_a if shapes_b.get(name, shapes_a[name]) != shapes_a[name]]),
    ):
        if names:
            more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            lines.append(f"{len(names)} {label}: {', '.join(names[:NAMES_SHOWN])}{more}")
    return "\n".join(lines)


def _reasons(
    report: KappaReport,
    ranking: Sequence[UnitReport],
    taken: Sequence[UnitReport],
    budget: Budget,
    order: str,
    rank_by: str,
    seed: int,
) -> dict[str, str]:
    values = rank_values(report.units, rank_by)
    ranks = {unit.name: rank for rank, unit in enumerate(ranking, start=1)}
    chosen = {unit.name for unit in taken}
    eligible = sum(unit.status in ("ok", ABOVE) for unit in report.units)
    end = " from the highest" if order == "highest" else ""
    drawn, not_drawn = (f", drawn with seed {seed}", f", not drawn with seed {seed}") if order in RANDOM else ("", "")
    limit = f"K = {len(taken)}" + ("" if budget.kind == "count" else f" ({budget})")
    reasons = {}
    for unit in report.units:
        rank = f"rank {ranks[unit.name]} of {eligible}{end}" if unit.name in ranks else f"one of {eligible}"
        if unit.name in chosen:
            reasons[unit.name] = f"taken: {rank_by} {values[unit.name]:.4g} is {rank}{drawn}, {limit}"
        elif unit.status not in ("ok", ABOVE):
            reasons[unit.name] = f"left: {unit.status}"
        elif order not in RANDOM and unit.name not in ranks:
            reasons[unit.name] = f"left: above the lowest, {limit}"
        else:
            reasons[unit.name] = f"left: {rank}{not_drawn}, {limit}"
    return {**reasons, **{name: f"left: {reason}" for name, reason in report.left_out.items()}}


def _numbers(report: KappaReport) -> str:
    """How many units can be chosen, and why the others can't, for errors."""
    statuses = Counter(unit.status for unit in report.units)
    eligible = statuses.pop("ok", 0) + statuses.pop(ABOVE, 0)
    detail = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    not_ok = f"{statuses.total()} not ok ({detail})" if statuses else "0 not ok"
    return f"{eligible} weight matrices eligible, {not_ok}, {len(report.left_out)} left out by include and exclude"


def _what_to_do(report: KappaReport) -> str:
    some = any(unit.status in ("ok", ABOVE) for unit in report.units)
    less = "Choose a smaller k" if some else "Check the base weights"
    return f"{less}, or scan with a wider `include` or a shorter `exclude`."
