"""The key `replay` of a recipe's block `data:`: plain text beside the task's rows, so that less is forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kappatune_plugin.checks import did_you_mean, is_number
from kappatune_plugin.data.rows import spec_problems
from kappatune_plugin.errors import KappaTuneError

SELF = "self"
# `from` is a word of Python's
KEYS = {"share": "share", "from": "source", "max_length": "max_length", "seed": "seed", "batch_size": "batch_size"}
LEAST = {"max_length": 2, "seed": 0, "batch_size": 1}


@dataclass(frozen=True)
class ReplayConfig:
    """What is mixed in, and how much of it.

    Attributes:
        share: of all rows trained on, above 0 and below 1: at 0.25, 100 texts beside 300 rows of the task.
        source: "self", text that the base model writes before training, or a data set of texts ({path, name, split,
            ..., text_column}). The recipe's key is `from`.
        max_length: tokens a text at most; a longer one of a data set is cut to pieces of that length.
        seed: of what the base writes, and of which texts of a data set are taken.
        batch_size: texts that the base writes at once.

    Raises:
        KappaTuneError: values that can't be right, a line each.
    """

    share: float
    source: str | dict[str, Any] = SELF
    max_length: int = 256
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        problems = []
        if not (is_number(self.share) and 0 < self.share < 1):
            problems.append(f"share: {self.share!r} is not a share of the rows above 0 and below 1, such as 0.25.")
        if isinstance(self.source, str) and self.source != SELF:
            problems.append(f"from: '{self.source}' is neither self nor a data set. Write {{path: {self.source}}}.")
        elif self.source != SELF:
            problems += spec_problems(self.source, "from")
        for key, least in LEAST.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{key}: {value!r} is not a whole number from {least} on.")
        if problems:
            raise KappaTuneError("\n".join(problems))

    @classmethod
    def read(cls, block: Any) -> "ReplayConfig":
        """From the recipe's mapping {share, from, ...}.

        Raises:
            KappaTuneError: no mapping, no share, unknown keys, or what the values themselves raise.
        """
        if not isinstance(block, Mapping):
            raise KappaTuneError(f"expected a mapping such as {{share: 0.25, from: self}}, found {block!r}.")
        unknown = [
            f"unknown key '{key}'.{did_you_mean(str(key), KEYS)} It takes {', '.join(KEYS)}."
            for key in block
            if key not in KEYS
        ]
        if "share" not in block:
            unknown.append("share is missing: add `share: 0.25`, a quarter of all rows.")
        if unknown:
            raise KappaTuneError("\n".join(unknown))
        return cls(**{KEYS[key]: value for key, value in block.items()})

    def texts(self, rows: int) -> int:
        """How many texts to mix in beside so many rows of the task; 1 at least."""
        return max(1, round(rows * self.share / (1 - self.share)))
