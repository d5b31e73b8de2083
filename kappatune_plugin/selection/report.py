"""KappaReport: the result of a scan, a row for each weight matrix; saved as JSON."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from kappatune_plugin.checks import is_number, shortened
from kappatune_plugin.condition.kappa import STATUSES, Kappa
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import read_json, write_json
from kappatune_plugin.selection.file_checks import (
    base_problems,
    identity_problems,
    key_problems,
    maps_strings,
    repeated_names,
    row_name,
)
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
        scores: other ranking values by name: "snr" if the scan was asked for it, "gain_over_forgetting" if a run
            measured it.
    """

    name: str
    shape: tuple[int, int]
    kappa: float | None
    lo: float | None
    hi: float | None
    status: str
    null: float
    log_volume: float | None
    stable_rank: float | None
    sigma_max: float | None
    sigma_min: float | None
    frobenius: float | None
    method: str
    groups: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)

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


RANKED_BY = ("log_volume", "stable_rank")
NUMBERS = ("kappa", "lo", "hi", "log_volume", "stable_rank", "sigma_max", "sigma_min", "frobenius")


def current_versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers."""
    return {"torch": str(torch.__version__), "kappatune_plugin": __version__}


@dataclass
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

    units: list[UnitReport]
    base: dict[str, str]
    dtype: str
    left_out: dict[str, str] = field(default_factory=dict)
    made_for: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)

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
        problems = _report_problems(content)
        if problems:
            advice = "Make it again with `kappatune scan`."
            raise KappaTuneError(f"{path} is not a kappa report:\n{shortened(problems)}\n{advice}")
        rows = [{**row, "shape": tuple(row["shape"]), "groups": tuple(row["groups"])} for row in content["units"]]
        content = {key: value for key, value in content.items() if key != "format"}
        return cls(**{**content, "units": [UnitReport(**row) for row in rows]})


def _report_problems(content: Mapping[str, Any]) -> list[str]:
    """What keeps `content` from being a kappa report, a line each."""
    problems = key_problems("the file", content, ("format", *(item.name for item in fields(KappaReport))))
    if problems:
        return problems
    problems = base_problems(content["base"])
    for key in ("left_out", "versions"):
        if not maps_strings(content[key]):
            problems.append(f"{key}: expected an object of strings, found {content[key]!r:.60}.")
    if content["made_for"] is not None and not isinstance(content["made_for"], dict):
        problems.append(f"made_for: expected an object or null, found {content['made_for']!r:.60}.")
    if not isinstance(content["dtype"], str):
        problems.append(f"dtype: expected a string, found {content['dtype']!r:.60}.")
    if not isinstance(content["units"], list):
        return [*problems, f"units: expected a list of rows, found {content['units']!r:.60}."]
    for position, row in enumerate(content["units"]):
        problems += _row_problems(position, row)
    if not problems:
        problems = repeated_names([*(row["name"] for row in content["units"]), *content["left_out"]])
    return problems


def _row_problems(position: int, row: Any) -> list[str]:
    where = row_name(position, row)
    problems = key_problems(where, row, [item.name for item in fields(UnitReport)])
    if problems:
        return problems
    problems = identity_problems(where, row)
    for key in NUMBERS:
        if row[key] is not None and not is_number(row[key]):
            problems.append(f"{where}: {key}: expected a number or null, found {row[key]!r:.60}.")
    if row["status"] not in ROW_STATUSES:
        problems.append(f"{where}: status: {row['status']!r:.60} is none of {', '.join(ROW_STATUSES)}.")
    elif row["status"] == "ok":
        if not (is_number(row["kappa"]) and row["kappa"] >= 1):
            problems.append(f"{where}: status is ok, but kappa is {row['kappa']!r:.60}; it is at least 1.")
        # what `ranking` needs
        problems += [f"{where}: status is ok, but {key} is null." for key in RANKED_BY if row[key] is None]
    elif row["status"] == ABOVE and not is_number(row["lo"]):
        problems.append(f"{where}: status is above, but lo, above which kappa is, is {row['lo']!r:.60}.")
    if not is_number(row["null"]):
        problems.append(f"{where}: null: expected a number, found {row['null']!r:.60}.")
    if not isinstance(row["method"], str):
        problems.append(f"{where}: method: expected a string, found {row['method']!r:.60}.")
    if not isinstance(row["scores"], dict) or not all(is_number(score) for score in row["scores"].values()):
        problems.append(f"{where}: scores: expected an object of numbers, found {row['scores']!r:.60}.")
    if not isinstance(row["groups"], list) or not all(isinstance(group, str) for group in row["groups"]):
        problems.append(f"{where}: groups: expected a list of strings, found {row['groups']!r:.60}.")
    return problems
