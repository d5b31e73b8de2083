"""Files that are either whole or not there, and that replace only what this package wrote.

The rule for everything that a command writes: `check_replaceable` before the work, the same again when it is written.
A file of ours is known by how it begins; devices, links and other people's files stay as they are.
"""

import ctypes
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kappatune_plugin.errors import KappaTuneError

FORMAT = 1
LOCK = ".lock"
# of Linux's renameat2(2): paths are relative to the current folder; the two names change places
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def opening(first_key: str) -> str:
    """How a JSON file of ours begins, as a pattern; its first key after "format" tells its kind."""
    return rf'\{{\s*"format": \d+,\s*"{re.escape(first_key)}":'


def check_replaceable(path: str | os.PathLike, begins: str) -> None:
    """Refuse to write to `path` unless nothing is there, or a file that this package wrote.

    Args:
        begins: pattern that the text of such a file begins with, see `opening`. An empty file may be replaced as well.

    Raises:
        KappaTuneError: a folder, a device, a link, or a file of somebody else is there.
    """
    path = Path(path)
    try:
        mode = path.lstat().st_mode
        kind = _kind(mode)
        if kind is None:
            with path.open("rb") as file:
                text = file.read(4096).decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise KappaTuneError(f"Can't write '{_shown(path)}': {_reason(error)}. Choose another place.") from error
    if kind is not None:
        raise KappaTuneError(f"Can't write '{path}': it is a {kind}. Give the name of a file.")
    if text and not re.match(begins, text):
        raise KappaTuneError(
            f"'{path}' is there already and is no such file as would be written in its place. Give another name, or "
            "move it away."
        )


def _kind(mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return "link, which would be replaced"
    if stat.S_ISDIR(mode):
        return "folder"
    return None if stat.S_ISREG(mode) else "device or pipe"


def check_output(path: str | os.PathLike, begins: str) -> None:
    """Raise KappaTuneError, before the work, if `path` can't be written; arguments as `check_replaceable`."""
    check_replaceable(path, begins)
    check_writable(Path(path).parent)


def write_text(path: str | os.PathLike, text: str, durable: bool = True, begins: str | None = None) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one, never a part of one.

    Args:
        durable: wait until it is on the disk, so that it outlives a power failure.
        begins: replace only a file whose text begins so, see `check_replaceable`; None replaces any.

    Raises:
        KappaTuneError: the folder can't be made or written, the disk is full, or something else is in the place.
    """
    path = Path(path)
    if begins is not None:
        check_replaceable(path, begins)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # opened rather than made by tempfile, whose files are private: this one is as the umask says
            with temporary.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise KappaTuneError(
            f"Can't write '{_shown(path)}': {_reason(error)}. Choose a folder that you may write to."
        ) from error


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write `content` with `"format": 1` first, atomically, over a file of the same kind or none.

    NaN and infinity are not JSON and are refused.
    """
    content = {key: value for key, value in content.items() if key != "format"}
    text = json.dumps({"format": FORMAT, **content}, indent=1, allow_nan=False) + "\n"
    write_text(path, text, begins=opening(next(iter(content))))


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a file that `write_json` wrote. `what` names its kind in errors ("a kappa report").

    Raises:
        KappaTuneError: missing, unreadable, not JSON, not an object, or of another format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KappaTuneError(f"Can't read {what} at {_shown(path)}: {_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise KappaTuneError(f"{_shown(path)} is not {what}: it isn't JSON ({error}). Make it again.") from error
    # True is 1
    if not isinstance(content, dict) or content.get("format") != FORMAT or isinstance(content["format"], bool):
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise KappaTuneError(f'{path} is not {what} of this version: expected "format": {FORMAT}, found {found!r:.60}.')
    return content


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, so that the error doesn't come after minutes of work.

    Raises:
        KappaTuneError: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}"
        # a full disk takes an empty file, and no byte
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise KappaTuneError(
            f"Can't write in '{_shown(folder)}': {_reason(error)}. Choose a folder that you may write to."
        ) from error


def as_umask_says(folder: Path) -> None:
    """Give the files in `folder` the permissions of new files: safetensors makes its own private."""
    # there is no other way to ask for it
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def exchange(one: Path, other: Path) -> bool:
    """Have two folders on one disk change places in one step; False where the system can't, and nothing was done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from working in `folder` while the block runs; the lock of a killed process is free.

    Args:
        what: works there, in the error: "run".

    Raises:
        KappaTuneError: another process is at it.
    """
    from filelock import FileLock, Timeout

    lock = folder / LOCK
    try:
        with FileLock(lock, blocking=False):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise KappaTuneError(
            f"Another {what} is at work in '{folder}'. Wait until it has ended, or give another output_dir."
        ) from error


def _reason(error: Exception) -> str:
    """What the system says: OSError's words; a name that no file can have is a ValueError."""
    return getattr(error, "strerror", None) or str(error)


def _shown(path: str | os.PathLike) -> str:
    """A path for an error; one of thousands of characters hides what the error says."""
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:100]}...{text[-40:]}"
