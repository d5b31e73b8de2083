"""The rooms of the package: what CI's `lint-imports` can't say of them."""

import re
from pathlib import Path

import kappatune_plugin

PACKAGE = Path(kappatune_plugin.__file__).parent


def test_at_most_twelve_modules_a_room():
    rooms = {}
    for path in PACKAGE.glob("*/*.py"):
        if path.name != "__init__.py":
            rooms.setdefault(path.parent.name, []).append(path.name)
    assert len(rooms) >= 13
    assert {room: len(names) for room, names in rooms.items() if len(names) > 12} == {}


def test_only_one_room_knows_dtensor():
    """import-linter takes no part of another package, so this is read from the source."""
    importing = re.compile(r"^\s*(?:from|import) torch\.distributed\.(?:tensor|fsdp|_tensor)\b", re.MULTILINE)
    rooms = {path.parent.name for path in PACKAGE.rglob("*.py") if importing.search(path.read_text(encoding="utf-8"))}
    assert rooms == {"distributed"}


def test_every_module_says_what_it_is_for():
    assert [path.name for path in PACKAGE.rglob("*.py") if not path.read_text(encoding="utf-8").startswith('"""')] == []
