"""Files that are written whole or not at all, and our JSON format."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from kappatune_plugin.errors import KappaTuneError

FORMAT = 1


def write_text(path: str | os.PathLike, text: str, durable: bool = True) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one, never a part of one.

    Args:
        durable: wait until it is on the disk, so that it survives a power failure.

    Raises:
        KappaTuneError: the folder can't be made or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            # mkstemp makes files private
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise KappaTuneError(f"Can't write {path}: {error.strerror}. Choose a folder that you may write to.") from error


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write `content` as JSON with `"format": 1` first, atomically. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps({"format": FORMAT, **content}, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Read a file that `write_json` wrote. `what` names its kind in errors ("a kappa report").

    Raises:
        KappaTuneError: missing, unreadable, not JSON, not an object, or of another format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KappaTuneError(f"Can't read {what} at {path}: {error.strerror}.") from error
    except ValueError as error:
        raise KappaTuneError(f"{path} is not {what}: it isn't JSON ({error}). Make it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise KappaTuneError(f'{path} is not {what} of this version: expected "format": {FORMAT}, found {found!r}.')
    return content


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, so that the error doesn't come after minutes of work.

    Raises:
        KappaTuneError: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KappaTuneError(
            f"Can't write in '{folder}': {error.strerror}. Choose a folder that you may write to."
        ) from error
