"""Budgets: how much to train, in the ways that people write it."""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kappatune_plugin.checks import is_number
from kappatune_plugin.errors import KappaTuneError

# the paper's, on OLMoE-1B-7B
DEFAULT_K = 75
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
EXAMPLES = "75 (weight matrices), '10%' (of those not excluded), {params: 160M} or {kappa: 30} (all up to that kappa)"
NUMBER = r"\d{1,99}(?:\.\d{1,99})?(?:[eE]\+?\d{1,2})?"


@dataclass(frozen=True)
class Budget:
    """How much to train.

    Attributes:
        kind: "count" of weight matrices, "share" of those scanned (0 to 1), "params" (values of the matrices
            together) or "kappa" (a threshold).
        written: `k` as it was written, for files and messages.
    """

    kind: str
    value: Fraction
    written: Any = field(compare=False)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{float(self.value * 100):g}%"
        if self.kind == "params":
            return f"{int(self.value):,} parameters"
        return f"kappa {float(self.value):g}" if self.kind == "kappa" else str(self.value)


def parse_budget(k: Any, least: int = 1) -> Budget:
    """Read a budget as people write it: 75, "75", "10%", {"params": "160M"}, {"params": 160e6} or {"kappa": 30}.

    A Budget is returned as it is.

    Args:
        least: number of matrices; 0 where something else is trained beside them.

    Raises:
        KappaTuneError: anything else, with what can be written instead.
    """
    if isinstance(k, Budget):
        return k
    if isinstance(k, dict):
        return _parse_named_budget(k)
    if isinstance(k, str) and (match := re.fullmatch(rf"\s*({NUMBER})\s*%\s*", k)):
        share = Fraction(match[1]) / 100
        if not 0 < share <= 1:
            raise KappaTuneError(f"k: {k!r} is not a share above 0% and up to 100%. Write {EXAMPLES}.")
        return Budget("share", share, k)
    digits = isinstance(k, str) and re.fullmatch(r"\s*\d{1,99}\s*", k)
    if not digits and (isinstance(k, bool) or not isinstance(k, int)):
        raise KappaTuneError(f"k: {k!r:.60} is no budget. Write {EXAMPLES}.")
    if int(k) < least:
        raise KappaTuneError(f"k: {k!r} would train nothing; it is at least 1. Write {EXAMPLES}.")
    return Budget("count", Fraction(int(k)), k)


def _parse_named_budget(k: dict[str, Any]) -> Budget:
    if len(k) != 1 or next(iter(k)) not in ("params", "kappa"):
        raise KappaTuneError(f"k: {k!r} is no budget: one of params and kappa is expected. Write {EXAMPLES}.")
    kind, value = next(iter(k.items()))
    suffixes = SUFFIXES if kind == "params" else {"": 1}
    amount = _parse_amount(value, suffixes)
    if amount is None:
        written = "160M, 1.5B or 160e6" if kind == "params" else "30"
        raise KappaTuneError(f"k: {kind}: {value!r} is not a number such as {written}. Write {EXAMPLES}.")
    if amount < 1:
        least = (
            "at least 1 parameter" if kind == "params" else "at least 1, the kappa of a perfectly conditioned matrix"
        )
        raise KappaTuneError(f"k: {kind}: {value!r} would train nothing; it is {least}. Write {EXAMPLES}.")
    return Budget(kind, amount, k)


def _parse_amount(value: Any, suffixes: dict[str, int]) -> Fraction | None:
    """A number, or a string of one: YAML reads 160e6 as a string."""
    if is_number(value):
        return Fraction(value)
    match = re.fullmatch(rf"\s*({NUMBER})\s*([a-zA-Z]?)\s*", value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in suffixes:
        return None
    return Fraction(match[1]) * suffixes[match[2].lower()]


def budget(k: str) -> Any:
    """`k` of a command line, read as YAML like in a recipe."""
    import yaml

    try:
        return yaml.safe_load(k)
    except (yaml.YAMLError, ValueError):
        return k
