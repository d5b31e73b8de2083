"""Writes docs/RESULTS.md, docs/RESULTS-small-models.md and their pictures from the files committed in docs/results.

    python benchmarks/results.py

The files come from benchmarks/study_real.py and study_gpu.py (real models), study.py (small ones), dial.py,
one_matrix.py, speech.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import compact
import one_matrix_page
import real_page
import real_plots
import records
import small_page
import speech_results

from kappatune_plugin.files import read_json, write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results"


def main() -> None:
    for name, content in committed(small_page.SETTINGS).items():
        for kind in small_page.pictures(content):
            small_page.PICTURES[kind](content, RESULTS / f"{name}-{kind}.png")
    speech_results.plot(records.read(RESULTS / "speech.jsonl"), RESULTS / "speech.png")
    real = committed(real_page.names())
    for model, found in list(real_page.by_model(real).items())[: real_page.PICTURES]:
        real_plots.plot(found, RESULTS / f"{model}-limits.png")
    if one_matrix_page.useful(matrices()):
        one_matrix_page.plot(matrices(), RESULTS / one_matrix_page.PICTURE)
    for name, text in pages().items():
        write_text(DOCS / name, text)


def pages() -> dict[str, str]:
    """File in docs -> its text."""
    small, real = committed(small_page.SETTINGS), committed(real_page.names())
    heard, dialed = (records.read(RESULTS / f"{name}.jsonl") for name in ("speech", "dial"))
    quality = RESULTS / "mixture-quality.json"
    mixture = read_json(quality, "what benchmarks/mixture.py wrote") if quality.exists() else None
    earlier = (RESULTS / "earlier.md").read_text(encoding="utf-8")
    return {
        "RESULTS.md": real_page.text(real, dialed, one_matrix_page.section(matrices()), mixture),
        "RESULTS-small-models.md": small_page.text(small, heard, earlier),
    }


def matrices() -> list[dict[str, Any]]:
    """The records of benchmarks/one_matrix.py, none before it ran."""
    path = RESULTS / "one-matrix.jsonl"
    return records.read(path) if path.exists() else []


def committed(names: Iterable[str]) -> dict[str, Any]:
    """Setting -> its committed comparison, where there is one."""
    found = {name: RESULTS / f"{name}.json" for name in names}
    return {name: compact.read(path) for name, path in found.items() if path.exists()}


if __name__ == "__main__":
    main()
