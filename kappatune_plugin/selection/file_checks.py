"""Types that the files of reports and selections are checked by, with pydantic."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, Strict
from typing_extensions import TypedDict

# for the dataclasses that are in a file: no unknown keys; numbers are numbers, and finite
FILE = ConfigDict(extra="forbid", allow_inf_nan=False)
Finite = Annotated[float, Strict()]
Name = Annotated[str, Field(min_length=1)]
Side = Annotated[int, Strict(), Field(gt=0)]
Shape = tuple[Side, Side]


class Base(TypedDict):
    """The base model: its name and the fingerprint of its weights."""

    __pydantic_config__ = FILE  # type: ignore[misc]

    name: str
    hash: str


def repeated_names(names: Sequence[str]) -> list[str]:
    """A problem if a name is there twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return [f"units: {len(repeated)} names are there twice, such as {repeated[0]}."] if repeated else []


def maps_strings(value: Any) -> bool:
    """An object whose values are all strings."""
    return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
