"""A recipe as it may be published: no secret, and for cards no path of this machine."""

import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

# names of what may hold a secret; eos_token and max_new_tokens hold none
SECRET = re.compile(
    r"(?i)(?<!eos)(?<!pad)(?<!bos)(?<!unk)_token$|^token$|auth|(^|_)key(_id)?$|secret|passw|passphrase|credential"
    r"|storage_options|headers"
)
LOGIN = re.compile(r"://[^/\s@]+@")
# a path of some machine inside a text: from the root or the home folder, through one folder at least
MACHINE_PATH = re.compile(r"""(?<![\w:/.<\\])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'",:;|<>]+)+""")


def public_yaml(resolved: Mapping[str, Any]) -> str:
    """The recipe as YAML, without what may hold a secret: output folders get published.

    Left out are the block `env`, at any depth what is named like a secret, and what logs in to a storage; of addresses
    with a name and a password in them these two are replaced.
    """
    kept = _public({key: value for key, value in resolved.items() if key != "env"})
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    return LOGIN.sub("://...@", value) if isinstance(value, str) else value


def without_paths(value: Any) -> Any:
    """`value` with the last part alone of every path of this machine, in texts at any depth.

    Paths relative to a recipe stay: they say what a reader sees too.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (os.path.isabs(value) or value.startswith("~")):
        # with spaces in it too
        return PurePosixPath(value).name
    return MACHINE_PATH.sub(lambda found: PureWindowsPath(found[0]).name if _is_path(found[0]) else found[0], value)


def _is_path(text: str) -> bool:
    """Whether it leads through a folder: " /no_think" doesn't."""
    return text[0] in "~" or text[1:2] == ":" or len(re.findall(r"[/\\]", text)) > 1
