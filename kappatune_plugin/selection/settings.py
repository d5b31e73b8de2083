"""What decides a selection, checked: the keys that a recipe, a file and `select` have in common."""

from collections.abc import Collection
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Block, Whole, not_one_of
from kappatune_plugin.selection.budget import DEFAULT_K, parse_budget
from kappatune_plugin.selection.criteria import RANKS, rank_help
from kappatune_plugin.selection.ranking import ORDERS


def _one_of(choices: Collection[str]) -> AfterValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise KappaTuneError(not_one_of(value, choices))
        return value

    return AfterValidator(check)


def check_budget(k: Any, least: int = 1) -> Any:
    """`k` as it is. Raises KappaTuneError, without the key's name in front, if it is no budget (see `parse_budget`)."""
    try:
        parse_budget(k, least)
    except KappaTuneError as error:
        raise KappaTuneError(str(error).removeprefix("k: ")) from error
    return k


BudgetText = Annotated[Any, AfterValidator(check_budget)]
BudgetOrNone = Annotated[Any, AfterValidator(partial(check_budget, least=0))]
Order = Annotated[Any, _one_of(ORDERS)]
RankBy = Annotated[Any, _one_of(RANKS)]


class SelectSettings(Block):
    """The settings of `select`."""

    k: BudgetText = Field(
        default=DEFAULT_K,
        description="How much to train: 75 (weight matrices), '10%' (of those not excluded), {params: 160M} or "
        "{kappa: 30} (all up to that condition number).",
    )
    order: Order = Field(
        default="lowest",
        description=f"Which of the ranking to train: {', '.join(ORDERS)}. All but lowest are controls.",
    )
    rank_by: RankBy = Field(default="kappa", description=rank_help())
    seed: Whole = Field(default=0, ge=0, description="Seed of the random orders.")

    def contradictions(self) -> list[str]:
        """A threshold of kappa, ranked by something else."""
        budget = None if self.k in (None, "auto") else parse_budget(self.k, least=0)
        if budget is None or budget.kind != "kappa" or self.rank_by == "kappa":
            return []
        return [f"k: {budget} goes with rank_by kappa, not {self.rank_by}. Give a number of matrices."]
