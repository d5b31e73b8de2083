"""The page on the dial says what the committed study on a real model found."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import dial  # noqa: E402
import promise  # noqa: E402
import records  # noqa: E402

RECORDS = records.read(REPOSITORY / "docs" / "results" / "dial.jsonl")


def test_the_page_says_what_was_found():
    page = (REPOSITORY / "docs" / "dial.md").read_text(encoding="utf-8")
    assert page.partition(dial.START)[2].partition(promise.END)[0].strip() == dial.summary(RECORDS)


def test_both_ways_are_compared_within_a_run_and_what_kept_nothing_is_named():
    run = {"task": "irony", "arm": "lora", "replay": 0.0, "seed": 0}
    measured = {"accuracy": 0.5, "loss": 1.0, "rise": 0.01}
    found = [
        {**run, "mode": "base", **measured},
        {**run, "mode": "trained", **measured, "rise": 0.2},
        {**run, "limit": 0.02, "asked": "one", "mode": "one", **measured},
        {**run, "limit": 0.02, "asked": "per_matrix", "mode": "per_matrix", **measured, "loss": 0.75, "rise": 0.03},
        {**run, "limit": 0.05, "asked": "one", "mode": "none"},
        {**run, "limit": 0.05, "asked": "per_matrix", "mode": "per_matrix", **measured},
    ]
    lines = dial.summary(found).splitlines()
    assert lines[0].startswith(
        "Within 0.02 nats, over 1 runs, one scale a matrix has a loss on test rows lower by 0.25"
    )
    assert lines[2] == "1 and 0 runs."
    row = next(line for line in lines if line.startswith("| `lora`"))
    assert row.split(" | ")[2:5] == ["50%; 1.00; +0.200", "50%; 1.00; +0.010", "50%; 0.75; +0.030"]
    assert "(1 of 1: nothing kept)" in row
