"""A cache of measured matrices, keyed by a hash of their values: no matrix is measured twice.

It lies in the user's cache folder, or in the one that the environment variable KAPPATUNE_CACHE names: `matrices/` has a
file for each matrix, `files/` has for each checkpoint read from disk the hashes of its matrices, so that known files
need not be read again, `replay/` has texts that base models wrote, and `measured/` what models lost on texts. The
folder may be deleted at any time.
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
from torch import Tensor, nn

from kappatune_plugin import condition
from kappatune_plugin.checks import is_number
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.selection.file_checks import maps_strings
from kappatune_plugin.selection.report import ABOVE, NUMBERS, ROW_STATUSES, UnitReport
from kappatune_plugin.weights.quantized import quantization_of
from kappatune_plugin.weights.units import WeightUnit

VARIABLE = "KAPPATUNE_CACHE"
MEASURED = (*NUMBERS, "status", "method", "scores")


class Cache:
    """Report rows by the hash of their matrix. With a folder of None nothing is kept.

    Several processes may use one folder, since entries are written atomically. A damaged entry counts as absent, with a
    warning; so does a folder that can't be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._may_write, self._warned = True, False
        # a scan measures in several threads, and each warning is given once
        self._lock = threading.Lock()

    def row(self, content: str, unit: WeightUnit, rtol: float, above: float = math.inf) -> UnitReport | None:
        """The row of `unit`, whose matrix has the hash `content`; None if the cache doesn't have it.

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
        """Keep the measured row of the matrix with the hash `content`."""
        entry = {"name": row.name, "shape": list(row.shape), **{key: getattr(row, key) for key in MEASURED}}
        self._write("matrices", _matrix_key(content, rtol), entry)

    def files(self, identity: str) -> dict[str, Any] | None:
        """{"base_hash", "contents"} as `keep_files` kept them for the files with this `identity`; None if unknown."""
        return self._read("files", identity, _is_files)

    def keep_files(self, identity: str, base_hash: str, contents: dict[str, str]) -> None:
        """Keep the fingerprint of a checkpoint's weights, and the hash of each unit's matrix, by name."""
        self._write("files", identity, {"base_hash": base_hash, "contents": contents})

    def written(self, identity: str) -> list[list[int]] | None:
        """The token ids that `keep_written` kept under this `identity`."""
        entry = self._read("replay", _digest(identity.encode()), _is_written)
        return None if entry is None else entry["rows"]

    def keep_written(self, identity: str, rows: list[list[int]]) -> None:
        """Keep texts, as token ids, that a model wrote; `identity` says which model, and how."""
        self._write("replay", _digest(identity.encode()), {"rows": rows})

    def remembered(self, model: str, what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `measure` gives, or gave before for the same `model` (see `identity_of`) on the same texts, `what`."""
        key = _digest(f"{model} {what}".encode())
        entry = self._read("measured", key, _is_measured)
        if entry is None:
            entry = measure()
            if _is_measured(entry):
                self._write("measured", key, entry)
        return entry

    def _read(self, kind: str, key: str, is_right: Callable[[Any], bool]) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self._path(kind, key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return self._damaged(path, str(error))
        return entry if is_right(entry) else self._damaged(path, "it has other content")

    def _damaged(self, path: Path, reason: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            warnings.warn(f"Damaged entries of the cache are measured again, such as {path}: {reason}.", stacklevel=2)

    def _write(self, kind: str, key: str, entry: dict[str, Any]) -> None:
        if self.folder is None or not self._may_write:
            return
        try:
            write_text(self._path(kind, key), json.dumps(entry, allow_nan=False), durable=False)
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


def identity_of(model: nn.Module, base: str, *more: object) -> str:
    """What a model's measurements depend on: the fingerprint of its base, and how and where it runs."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    parts = (base, quantization_of(model), next(model.parameters()).dtype, model.device.type, attention, *more)
    return json.dumps([*map(str, parts), _engine()])


def content_hash(matrix: Tensor) -> str:
    """A hash of a matrix's dtype, shape and values, whatever its device and memory layout.

    128 bits of XXH3 (xxhash.com), which is faster than memory. The name doesn't count: equal matrices of different
    models have equal condition numbers.
    """
    values = matrix.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    digest = xxhash.xxh3_128(f"{matrix.dtype} {tuple(matrix.shape)}\n".encode())
    digest.update(values)
    return digest.hexdigest()


def _matrix_key(content: str, rtol: float) -> str:
    return _digest(f"{content} {rtol!r} {_engine()}".encode())


@functools.cache
def _engine() -> str:
    """A hash of the code of `condition/`: when it changes, old entries are no longer used."""
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


def _is_measured(entry: Any) -> bool:
    return isinstance(entry, dict) and all(is_number(value) and math.isfinite(value) for value in entry.values())


def _is_written(entry: Any) -> bool:
    rows = entry.get("rows") if isinstance(entry, dict) else None
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) > 1 and all(type(token) is int for token in row) for row in rows
    )
