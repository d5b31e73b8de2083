"""Records that a toolkit's script ran to its end: `python results.py NAME [JUNIT_XML]`, in its environment.

Writes results/NAME.json beside this file: the versions that ran, what ran (the comment that the script begins with),
and how many tests passed.
"""

import itertools
import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "axolotl",
    "llamafactory",
)


def versions() -> dict[str, str]:
    """Package -> its version, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tests(junit: Path) -> dict[str, int]:
    """How many tests passed and how many were skipped; one that failed would have ended the script."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    total = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
    for suite in suites:
        total = {key: value + int(suite.get(key, 0)) for key, value in total.items()}
    assert not total["failures"] + total["errors"], total
    return {"passed": total["tests"] - total["skipped"], "skipped": total["skipped"]}


def header(script: str) -> str:
    """The comment that a script begins with, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), script.splitlines())
    return " ".join(line.removeprefix("# ") for line in lines)


def main(name: str, junit: Path | None) -> None:
    script = HERE / f"{name.partition('-')[0]}.sh"
    result = {
        "format": 1,
        "name": name,
        "ran": header(script.read_text(encoding="utf-8")),
        "python": platform.python_version(),
        "versions": versions(),
        "tests": tests(junit) if junit and junit.is_file() else None,
    }
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"recorded in {path}; README's table: python {HERE / 'matrix.py'}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
