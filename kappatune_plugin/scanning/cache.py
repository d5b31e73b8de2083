"""What was measured before, by the weights themselves: no matrix is measured twice.

In the user's cache folder, or the one that the environment variable KAPPATUNE_CACHE names, lie `matrices/`, a file for
each matrix by a hash of its values, and `files/`, for each checkpoint read from disk the hashes of its matrices, so
that known files need not be read again. The folder may be deleted at any time.
"""

import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kappatune_plugin import condition
from kappatune_plugin.checks import is_number
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.selection.file_checks import maps_strings
from kappatune_plugin.selection.report import ABOVE, NUMBERS, ROW_STATUSES, UnitReport
from kappatune_plugin.weights.units import WeightUnit

VARIABLE = "KAPPATUNE_CACHE"
MEASURED = (*NUMBERS, "status", "method", "scores")


class Cache:
    """Rows by the hash of their matrix. A folder of None keeps nothing.

    Several processes may use one folder: an entry is a whole file, put in its place in one step. A damaged one gives
    a warning and counts as absent; where the folder can't be written, a warning is all that is lost.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._may_write, self._warned = True, False
        # a scan measures in several threads
        self._lock = threading.Lock()

    def row(self, content: str, unit: WeightUnit, rtol: float, above: float = math.inf) -> UnitReport | None:
        """The row of `unit`, whose matrix has the hash `content`; None if that isn't known.

        Args:
            rtol, above: as they would be given to `condition_number`.
        """
        entry = self._read("matrices", _matrix_key(content, rtol), _is_row)
        if entry is None or (entry["status"] == ABOVE and not entry["lo"] > above):
            return None
        numbers = {key: entry[key] for key in MEASURED}
        groups = tuple(sorted(unit.groups))
        return UnitReport(unit.name, unit.shape, null=null_condition(*unit.shape), groups=groups, **numbers)

    def keep_row(self, content: str, row: UnitReport, rtol: float) -> None:
        """Keep what was found out about the matrix with the hash `content`."""
        entry = {"name": row.name, "shape": list(row.shape), **{key: getattr(row, key) for key in MEASURED}}
        self._write("matrices", _matrix_key(content, rtol), entry)

    def files(self, identity: str) -> dict[str, Any] | None:
        """What `keep_files` kept of the files with this `identity`."""
        return self._read("files", identity, _is_files)

    def keep_files(self, identity: str, base_hash: str, contents: dict[str, str]) -> None:
        """Keep the fingerprint of a checkpoint's weights, and the hash of each unit's matrix, by name."""
        self._write("files", identity, {"base_hash": base_hash, "contents": contents})

    def _read(self, kind: str, key: str, is_right: Callable[[Any], bool]) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self._path(kind, key)
        try:
            checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return self._damaged(path, str(error))
        if checksum != _digest(f"{key}\n{text}".encode()):
            return self._damaged(path, "its checksum is wrong")
        entry = json.loads(text)
        return entry if is_right(entry) else self._damaged(path, "it has other content")

    def _damaged(self, path: Path, reason: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            warnings.warn(f"Damaged entries of the cache are made anew, such as {path}: {reason}.", stacklevel=2)

    def _write(self, kind: str, key: str, entry: dict[str, Any]) -> None:
        if self.folder is None or not self._may_write:
            return
        text = json.dumps(entry, allow_nan=False)
        # with the key in it, an entry put in the place of another is damaged too
        checksum = _digest(f"{key}\n{text}".encode())
        try:
            write_text(self._path(kind, key), f"{checksum}\n{text}", durable=False)
        except KappaTuneError as error:
            with self._lock:
                first, self._may_write = self._may_write, False
            if first:
                warnings.warn(f"The cache is not written any more: {error}", stacklevel=2)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.json"


def cache_folder() -> Path:
    """Where the cache is: $KAPPATUNE_CACHE, else `kappatune` in $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kappatune"


def content_hash(matrix: Tensor) -> str:
    """A hash of a matrix: its dtype, its shape and its values, wherever it is and however it lies in memory.

    128 bits of XXH3 (xxhash.com), which reads faster than memory gives. Its name plays no part: equal matrices of
    different models have equal condition numbers.
    """
    values = matrix.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    digest = xxhash.xxh3_128(f"{matrix.dtype} {tuple(matrix.shape)}\n".encode())
    digest.update(values)
    return digest.hexdigest()


def _matrix_key(content: str, rtol: float) -> str:
    return _digest(f"{content} {rtol!r} {_engine()}".encode())


@functools.cache
def _engine() -> str:
    """A hash of the room that measures: when its code changes, no entry counts any more."""
    sources = sorted(Path(condition.__file__).parent.glob("*.py"))
    return _digest(b"".join(source.read_bytes() for source in sources))


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _is_row(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(MEASURED) <= set(entry)
        and entry["status"] in ROW_STATUSES
        and isinstance(entry["scores"], dict)
        and all(entry[key] is None or is_number(entry[key]) for key in NUMBERS)
    )


def _is_files(entry: Any) -> bool:
    return isinstance(entry, dict) and maps_strings(entry.get("contents")) and isinstance(entry.get("base_hash"), str)
