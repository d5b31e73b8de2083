"""Results as records, a line of JSON each; a run whose records are there isn't made again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kappatune_plugin.files import write_text


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, in the order they were made."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Records:
    """The records of a results file, which grows by a run at a time.

    Attributes:
        found: all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, read(path) if path.exists() else []

    def has(self, run: Mapping[str, Any]) -> bool:
        """Whether there is a record of `run`: one that has all its items."""
        return any(run.items() <= record.items() for record in self.found)

    def add(self, run: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of a run that has ended, each with the items of `run` before its own."""
        self.found += [{**run, **record} for record in records]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.found))
