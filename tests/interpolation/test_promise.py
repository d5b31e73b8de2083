"""The page on the dial says what the committed test of the promise found, and the promise was kept."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import promise  # noqa: E402
import records  # noqa: E402

RECORDS = records.read(REPOSITORY / "docs" / "results" / "promise.jsonl")


def test_the_page_says_what_was_found():
    page = (REPOSITORY / "docs" / "dial.md").read_text(encoding="utf-8")
    assert page.partition(promise.START)[2].partition(promise.END)[0].strip() == promise.summary(RECORDS)


def test_the_promise_was_kept_in_95_of_100_runs():
    runs = [each for each in RECORDS if each["control"] == "stories" and "true" in each]
    assert len(runs) >= 60
    assert sum(each["true"] <= each["limit"] for each in runs) >= 0.95 * len(runs)
