"""Finished runs on disk, so that a comparison that was killed continues where it stopped."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import read_json, write_json


class RunStore:
    """A folder with a file for each finished run, named by its title and a digest of all that decides its result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, title: str, identity: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run with this `identity`: from its file if that exists, else made and written.

        Args:
            title: a name for people; the digest of `identity` identifies the file.

        Raises:
            KappaTuneError: the file is damaged, or holds another run.
        """
        path = self.path(title, identity)
        if path.exists():
            content = read_json(path, "a run of a comparison")
            if content.get("identity") != json.loads(json.dumps(identity)):
                raise KappaTuneError(f"{path} holds a different run than its name says: delete it.")
            return content["run"]
        run = make()
        write_json(path, {"identity": identity, "run": run})
        # the same as read from the file, where tuples are lists
        return json.loads(json.dumps(run))

    def path(self, title: str, identity: dict[str, Any]) -> Path:
        """Where the run with this `identity` is, or will be."""
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', title)}-{digest}.json"
