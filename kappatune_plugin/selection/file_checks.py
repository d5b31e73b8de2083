"""Checks of a report or a selection read from a file; problems name the place."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def row_name(position: int, row: Any) -> str:
    """How errors call a row: by its number, counted from 1, and its name."""
    name = row.get("name") if isinstance(row, dict) else None
    return f"unit {position + 1} ({name})" if isinstance(name, str) else f"unit {position + 1}"


def key_problems(where: str, found: Any, expected: Sequence[str]) -> list[str]:
    """Problems if `found` isn't an object with exactly the keys `expected`."""
    if not isinstance(found, Mapping):
        return [f"{where}: expected an object, found {found!r:.60}."]
    missing = [key for key in expected if key not in found]
    unknown = [str(key) for key in found if key not in expected]
    problems = [f"{where}: {', '.join(missing)} missing."] if missing else []
    return problems + ([f"{where}: unknown key {', '.join(unknown)}."] if unknown else [])


def identity_problems(where: str, row: Mapping[str, Any]) -> list[str]:
    """Problems with a row's name and shape."""
    problems = []
    if not isinstance(row["name"], str) or not row["name"]:
        problems.append(f"{where}: name: expected a weight's name, found {row['name']!r:.60}.")
    shape = row["shape"]
    sides = shape if isinstance(shape, list | tuple) and len(shape) == 2 else [None]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        problems.append(f"{where}: shape: expected [rows, columns], found {shape!r:.60}.")
    return problems


def base_problems(base: Any) -> list[str]:
    """Problems with {"name", "hash"} of a base model."""
    problems = key_problems("base", base, ("name", "hash"))
    if not problems and not maps_strings(base):
        problems = [f"base: expected strings for name and hash, found {base!r:.80}."]
    return problems


def repeated_names(names: Sequence[str]) -> list[str]:
    """A problem if a name is there twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return [f"units: {len(repeated)} names are there twice, such as {repeated[0]}."] if repeated else []


def maps_strings(value: Any) -> bool:
    """An object whose values are all strings."""
    return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
