"""The key `replay` of a recipe's block `data:`: plain text beside the task's rows, so that less is forgotten."""

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from kappatune_plugin.data.rows import DataSet
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.schema import Block, Number, Whole

SELF = "self"


def _source(spec: Any) -> Any:
    if isinstance(spec, str) and spec != SELF:
        raise KappaTuneError(f"'{spec}' is neither self nor a data set. Write {{path: {spec}}}.")
    return spec if spec == SELF else DataSet.given(spec)


class ReplayConfig(Block):
    """The key `replay` of the block `data:`: what is mixed in, and how much of it.

    Raises:
        KappaTuneError: values that can't be right, a line each.
    """

    model_config = ConfigDict(populate_by_name=True)

    share: Number = Field(
        gt=0,
        lt=1,
        description="Share of the texts in all rows trained on: at 0.25, 100 texts beside 300 rows of the task.",
        examples=["`share: 0.25`, a quarter of all rows"],
    )
    # `from` is a word of Python's
    source: Annotated[Any, AfterValidator(_source)] = Field(
        default=SELF,
        alias="from",
        description="self, text that the base model writes before training, or a data set of texts ({path, name, "
        "split, ..., text_column}).",
    )
    max_length: Whole = Field(
        default=256, ge=2, description="Tokens a text at most; a longer one of a data set is cut to pieces."
    )
    seed: Whole = Field(
        default=0, ge=0, description="Of what the base writes, and of which texts of a data set are taken."
    )
    batch_size: Whole = Field(default=16, ge=1, description="Texts that the base writes at once.")

    def texts(self, rows: int) -> int:
        """How many texts to mix in beside so many rows of the task; 1 at least."""
        return max(1, round(rows * self.share / (1 - self.share)))
