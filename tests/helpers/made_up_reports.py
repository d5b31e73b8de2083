"""Reports without a model behind them."""

import math

from kappatune_plugin.condition.kappa import Kappa
from kappatune_plugin.selection.report import KappaReport, UnitReport


def row(name: str, kappa: float = 2.0, shape: tuple[int, int] = (4, 4), status: str = "ok", groups=()) -> UnitReport:
    """A row as a scan makes it; kappa is ignored unless the status is "ok"."""
    value = kappa if status == "ok" else math.nan if status == "nonfinite" else math.inf
    numbers = Kappa(value, value, value, value, 1.0, -math.inf if status != "ok" else 0.5, 3.0, 1.5, "svd64", status)
    return UnitReport.of(name, shape, numbers, groups)


def report(*rows: UnitReport, left_out: dict[str, str] | None = None) -> KappaReport:
    return KappaReport(list(rows), {"name": "base", "hash": "0123"}, "float32", left_out or {})


def twelve_units() -> KappaReport:
    """Ten eligible units, not in order of kappa: u0 ... u9 with kappa 1 ... 10, even ones 4 x 4 and odd ones 2 x 8."""
    rows = [row(f"u{i}.weight", i + 1.0, (4, 4) if i % 2 == 0 else (2, 8)) for i in (5, 2, 9, 0, 7, 4, 1, 8, 3, 6)]
    bad = [row("zero.weight", status="zero"), row("deficient.weight", status="rank_deficient")]
    return report(*rows[:5], *bad, *rows[5:], left_out={"lm_head.weight": "excluded by 'head'"})
