"""The page on the dial says what the committed benchmarks found, and the promise was kept."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import dial  # noqa: E402
import promise  # noqa: E402
import records  # noqa: E402

RECORDS, STUDY = (records.read(REPOSITORY / "docs" / "results" / f"{name}.jsonl") for name in ("promise", "dial"))


@pytest.mark.parametrize(
    ("start", "summary"), [(promise.START, promise.summary(RECORDS)), (dial.START, dial.summary(STUDY))]
)
def test_the_page_says_what_was_found(start, summary):
    page = (REPOSITORY / "docs" / "dial.md").read_text(encoding="utf-8")
    assert page.partition(start)[2].partition(promise.END)[0].strip() == summary


def test_the_promise_was_kept_in_95_of_100_runs():
    runs = [each for each in RECORDS if each["control"] == "stories" and "true" in each]
    assert len(runs) >= 60
    assert sum(each["true"] <= each["limit"] for each in runs) >= 0.95 * len(runs)


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
