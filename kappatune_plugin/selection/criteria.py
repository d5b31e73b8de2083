"""The criteria to rank weight matrices by. To add one, write a function here and a test."""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # a report takes torch, which the command line's help can't wait for
    from kappatune_plugin.selection.report import UnitReport

Criterion = Callable[["UnitReport"], float]
RANKS: dict[str, Criterion] = {}


def criterion(value: Criterion) -> Criterion:
    """Rank by the function's name from now on: command line, recipes and docs take it from RANKS.

    The function gets a row of the report and returns the value to rank by; a KeyError says that the report doesn't
    have it. The first sentence of its docstring is its documentation.
    """
    RANKS[value.__name__] = value
    return value


def rank_help() -> str:
    """The criteria, each with the first sentence of its docstring."""
    said = {name: " ".join(inspect.getdoc(value).split()).split(". ")[0] for name, value in RANKS.items()}
    return "What to rank by: " + "; ".join(f"{name} ({words.rstrip('.')})" for name, words in said.items()) + "."


@criterion
def kappa(row: "UnitReport") -> float:
    """The condition number sigma_max / sigma_min. The paper trains the lowest."""
    return row.kappa


@criterion
def kappa_over_null(row: "UnitReport") -> float:
    """kappa relative to the median of Gaussian matrices of the same shape (`null_condition`), which takes out the
    effect of the shape. The lowest are the matrices that are better conditioned than random ones."""
    return row.kappa / row.null


@criterion
def log_volume(row: "UnitReport") -> float:
    """Mean log sigma_i - log(||W||_F / sqrt(n)) over the n singular values. The log-volume of the image of the unit
    ball, per dimension, at fixed Frobenius norm (arXiv 2506.16289, Theorem 1: the entropy that a layer can pass on).
    Scale-free; 0 if all singular values are equal, else negative. The counterpart of the lowest kappa is `highest`.
    """
    n = min(row.shape)
    return row.log_volume / n - math.log(row.frobenius / math.sqrt(n))


@criterion
def stable_rank(row: "UnitReport") -> float:
    """||W||_F^2 / sigma_max^2, between 1 and min(m, n). From Rudelson and Vershynin, J. ACM 54, 2007. The counterpart
    of the lowest kappa is `highest`: many directions nearly as strong as the strongest."""
    return row.stable_rank


@criterion
def snr(row: "UnitReport") -> float:
    """Spectrum's signal-to-noise ratio; slow. Spectrum (arXiv 2406.06623, see `signal_to_noise`) trains the `highest`.
    It takes all singular values, so only a scan with rank_by "snr" measures it."""
    return row.scores["snr"]


@criterion
def gain_over_forgetting(row: "UnitReport") -> float:
    """Squared task gradient over Fisher information, in a report that a run left (see `gain`). The `highest` gain most
    for what is forgotten. A scan can't measure it: that takes the task's rows, in a run of a recipe or a comparison."""
    return row.scores["gain_over_forgetting"]


@criterion
def expert_share(row: "UnitReport") -> float:
    """Share of the task's tokens that are routed to the matrix's expert, in a report that a run left. ESFT (arXiv
    2407.01906, its token selection ratio) trains the `highest`. Only the experts of a mixture are ranked."""
    return row.scores["expert_share"]


@criterion
def expert_gate(row: "UnitReport") -> float:
    """Mean gate score of the matrix's expert over the task's tokens, in a report that a run left. ESFT (arXiv
    2407.01906, its average gate score) trains the `highest`. Only the experts of a mixture are ranked."""
    return row.scores["expert_gate"]


EXPERTS = (expert_share.__name__, expert_gate.__name__)
# what no scan can measure: it takes the task's rows
ON_ROWS = (gain_over_forgetting.__name__, *EXPERTS)
