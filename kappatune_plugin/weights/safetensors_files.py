"""Tensors in safetensors files, read one at a time."""

import json
import operator
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kappatune_plugin.errors import KappaTuneError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# bytes read from a file before it is opened again, which frees the pages read so far
BYTES_A_MAPPING = 4 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: path, shape, dtype in safetensors' spelling ("BF16"), and size in bytes."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    size: int


class TensorFiles:
    """The tensors of a checkpoint's files, by name.

    Attributes:
        paths: the files, in order.
        tensors: name -> StoredTensor.

    Raises:
        KappaTuneError: files that are missing, damaged or unreadable, all of them in one message.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = sorted(set(paths))
        self.tensors: dict[str, StoredTensor] = {}
        self._open = threading.local()
        problems = []
        for path in self.paths:
            try:
                self.tensors.update(_header(path))
            except (OSError, SafetensorError) as error:
                problems.append(f"{path}: {_reason(error)}")
        if problems:
            raise KappaTuneError(
                "Can't load a model: these files are missing or damaged. Download or save them again.\n"
                + "\n".join(problems)
            )

    def read(self, name: str, first: int | None = None) -> Tensor:
        """A tensor, or `tensor[first]` without reading the rest. Don't write to it: it may be a memory-mapped file.

        Raises:
            KappaTuneError: the file can't be read any more.
        """
        stored = self.tensors[name]
        try:
            file = self._opened(stored.path, stored.size if first is None else stored.size // stored.shape[0])
            return file.get_tensor(name) if first is None else file.get_slice(name)[first]
        except (OSError, SafetensorError) as error:
            raise KappaTuneError(f"Can't read {name} in {stored.path}: {_reason(error)}") from error

    def identity(self, salt: str = "") -> str:
        """A hash of `salt` and of each file's path, size, times (ctime can't be set back), inode and header."""
        digest = xxhash.xxh3_128(salt.encode())
        for path in self.paths:
            try:
                state = path.stat()
                digest.update(header_bytes(path))
            except (OSError, struct.error) as error:
                raise KappaTuneError(f"Can't read {path}: {_reason(error)}") from error
            times = f"{state.st_mtime_ns} {state.st_ctime_ns}"
            digest.update(f"{path.resolve()} {state.st_size} {times} {state.st_ino}".encode())
        return digest.hexdigest()

    def _opened(self, path: Path, size: int) -> Any:
        """This thread's handle of a file, opened again after BYTES_A_MAPPING, since pages once read stay in memory."""
        held = self._open.__dict__
        if held.get("path") != path or held["left"] < size:
            held.clear()
            held.update(path=path, left=BYTES_A_MAPPING, file=safe_open(path, framework="pt"))
        held["left"] -= size
        return held["file"]


def checkpoint_files(folder_or_name: str) -> list[Path]:
    """The safetensors files of a model, in its folder or the hub's cache; an empty list if it has none.

    Raises:
        KappaTuneError: the index is damaged or names missing files, or the hub can't be reached.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
        try:
            found = cached_file(folder_or_name, name, **quietly)
        except OSError as error:
            raise KappaTuneError(f"Can't look for {name} of the model '{folder_or_name}': {error}") from error
        return None if found is None else Path(found)

    single = find(SINGLE)
    if single is not None:
        return [single]
    index = find(INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"its weight_map names {names[0]!r} as a file")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise KappaTuneError(
            f"Can't load a model: {index} is not an index of safetensors files ({type(error).__name__}: {error}). "
            "Download or save it again."
        ) from error
    found = {name: find(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise KappaTuneError(
            f"Can't load a model from '{folder_or_name}': {len(missing)} of its {len(names)} files are missing: "
            f"{', '.join(missing)}. Download or save them again."
        )
    return list(found.values())


def _header(path: Path) -> dict[str, StoredTensor]:
    """The file's tensors by name."""
    # this checks that the file is whole; reading all shapes through its API would be slow
    with safe_open(path, framework="pt"):
        pass
    content = json.loads(header_bytes(path))
    content.pop("__metadata__", None)
    return {
        name: StoredTensor(path, tuple(entry["shape"]), entry["dtype"], -operator.sub(*entry["data_offsets"]))
        for name, entry in content.items()
    }


def header_bytes(path: str | os.PathLike) -> bytes:
    """The JSON header of a safetensors file: 8 bytes of its length, little-endian, then the header."""
    with open(path, "rb") as file:
        return file.read(struct.unpack("<Q", file.read(8))[0])


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else f"damaged or cut off ({error})"
