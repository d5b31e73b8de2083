"""KappaReport: the result of a scan, a row for each weight matrix; saved as JSON."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator

from kappatune_plugin.checks import shortened
from kappatune_plugin.condition.kappa import STATUSES, Kappa
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import read_json, write_json
from kappatune_plugin.schema import not_one_of, read_as
from kappatune_plugin.selection.criteria import EXPERTS
from kappatune_plugin.selection.file_checks import FILE, Base, Finite, Name, Shape, repeated_names
from kappatune_plugin.version import __version__

# the status of a matrix measured only until it was certain that its kappa isn't among the lowest asked for
ABOVE = "above"
ROW_STATUSES = (*STATUSES, ABOVE)


@dataclass(frozen=True)
class UnitReport:
    """One weight matrix of a model. Numbers that aren't finite are None, here as in the file.

    Attributes:
        name: the unit's name in the checkpoint.
        shape: (rows, columns).
        kappa, lo, hi: condition number, and the interval that holds the exact one.
        status: "ok", "zero", "rank_deficient", "nonfinite", or "above" if only kappa >= `lo` is known; only "ok" units
            can be selected.
        null: median kappa of a Gaussian matrix of this shape.
        log_volume, stable_rank, sigma_max, sigma_min, frobenius, method: as in `condition.kappa.Kappa`.
        groups: the groups "embedding", "head", "router" that the unit belongs to, sorted.
        scores: other ranking values by name: "snr" if the scan was asked for it, those of `criteria.ON_ROWS` if a run
            measured them.
    """

    __pydantic_config__ = FILE

    name: Name
    shape: Shape
    kappa: Finite | None
    lo: Finite | None
    hi: Finite | None
    status: str
    null: Finite
    log_volume: Finite | None
    stable_rank: Finite | None
    sigma_max: Finite | None
    sigma_min: Finite | None
    frobenius: Finite | None
    method: str
    groups: tuple[str, ...] = ()
    scores: dict[str, Finite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    @classmethod
    def of(cls, name: str, shape: tuple[int, int], kappa: Kappa, groups: Iterable[str] = ()) -> "UnitReport":
        """The row of the unit `name` whose matrix was measured as `kappa`."""
        numbers = asdict(kappa)
        value, null = numbers.pop("value"), null_condition(*shape)
        if kappa.status == "ok" and math.isinf(kappa.hi):
            value, numbers["status"] = math.inf, ABOVE
        return cls(name=name, shape=shape, kappa=value, null=null, groups=tuple(sorted(groups)), **numbers)


RANKED_BY = ("log_volume", "stable_rank", "frobenius")
SIZES = ("frobenius", "stable_rank", "sigma_max", "sigma_min")
NUMBERS = ("kappa", "lo", "hi", "log_volume", "stable_rank", "sigma_max", "sigma_min", "frobenius")


def _selectable(row: UnitReport) -> UnitReport:
    """A row as it is, if it holds what `ranking` needs of its status; for files."""
    problems = []
    if row.status not in ROW_STATUSES:
        problems.append(f"status: {not_one_of(row.status, ROW_STATUSES)}")
    elif row.status == "ok":
        if row.kappa is None or row.kappa < 1:
            problems.append(f"status is ok, but kappa is {row.kappa!r}; it is at least 1.")
        elif not 1 <= (1 if row.lo is None else row.lo) <= row.kappa <= (math.inf if row.hi is None else row.hi):
            problems.append(f"kappa {row.kappa:g} is not between lo and hi ({row.lo}, {row.hi}), or lo is below 1.")
        problems += [f"status is ok, but {key} is null." for key in RANKED_BY if getattr(row, key) is None]
        sizes = {key: getattr(row, key) for key in SIZES}
        wrong = {key: size for key, size in sizes.items() if size is not None and size <= 0}
        problems += [f"{key} is {size:g}, expected a number above 0." for key, size in wrong.items()]
    elif row.status == ABOVE and row.lo is None:
        problems.append("status is above, but lo, above which kappa is, is null.")
    if row.null <= 0:
        problems.append(f"null: expected a number above 0, found {row.null!r}.")
    if problems:
        raise KappaTuneError("\n".join(problems))
    return row


def current_versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {"torch": str(torch.__version__), "kappatune_plugin": __version__}


@dataclass(repr=False)
class KappaReport:
    """The condition numbers of a model's weight matrices.

    Attributes:
        units: a row for each unit scanned, in the model's order.
        base: {"name": the model's name, "hash": fingerprint of its weights (`fingerprint.base_hash`)}.
        dtype: of the weights scanned: "bfloat16", or several joined by ", ".
        left_out: name -> reason, for the units that `include` and `exclude` left out.
        made_for: {"k", "order", "rank_by", "seed"} of the selection that the scan was made for, so that other units may
            be only "above"; None if every unit was measured.
        versions: of torch and this package when the scan was made.
    """

    __pydantic_config__ = FILE

    units: list[Annotated[UnitReport, AfterValidator(_selectable)]]
    base: Base
    dtype: str
    left_out: dict[str, str] = field(default_factory=dict)
    made_for: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)

    def __repr__(self) -> str:
        found = [row.kappa for row in self.units if row.status == "ok"]
        kappas = f"kappa {min(found):.3g} to {max(found):.3g}" if found else "no kappa"
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"KappaReport({len(self.units)} matrices of {self.base['name']!r}, {kappas}{left})"

    def save(self, path: str | os.PathLike) -> None:
        """Write the report to `path` as JSON, atomically. Raises KappaTuneError if `path` can't be written."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KappaReport":
        """Read a report that `save` wrote.

        Raises:
            KappaTuneError: missing, not a kappa report, or damaged; says where.
        """
        content = read_json(path, "a kappa report")
        report, problems = read_as(cls, {key: value for key, value in content.items() if key != "format"})
        if report is not None:
            problems = repeated_names([*(row.name for row in report.units), *report.left_out])
        if problems:
            advice = "Make it again with `kappatune scan`."
            raise KappaTuneError(f"{path} is not a kappa report:\n{shortened(problems)}\n{advice}")
        return report


def only_ranked(report: KappaReport, rank_by: str) -> KappaReport:
    """`report`, with the matrices that `rank_by` doesn't rank left out: by the use of experts all but the experts'."""
    beside = {row.name: f"{rank_by} ranks experts only" for row in report.units if rank_by not in row.scores}
    if rank_by not in EXPERTS or len(beside) == len(report.units):
        return report
    kept = [row for row in report.units if row.name not in beside]
    return replace(report, units=kept, left_out={**report.left_out, **beside})
