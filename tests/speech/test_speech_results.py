"""The section on speech of docs/RESULTS-small-models.md says what the committed runs found."""

import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import records  # noqa: E402
import speech_results  # noqa: E402

RECORDS = records.read(REPOSITORY / "docs" / "results" / "speech.jsonl")


def test_the_page_says_what_was_found():
    page = (REPOSITORY / "docs" / "RESULTS-small-models.md").read_text(encoding="utf-8")
    assert speech_results.section(RECORDS) in page


def test_every_order_has_three_seeds_and_errors_that_add_up():
    runs = {(each["order"], each["seed"]) for each in RECORDS}
    assert runs == {(None, 0), *((order, seed) for order in speech_results.ORDERS for seed in range(3))}
    for record in RECORDS:
        for point in record["curve"]:
            errors = point["substitutions"] + point["deletions"] + point["insertions"]
            assert point["wer"] == errors / point["words"]


def test_the_means_are_those_of_the_runs():
    for order in speech_results.ORDERS:
        last = [each["curve"][-1]["wer"] for each in RECORDS if each["order"] == order]
        row = next(line for line in speech_results.section(RECORDS).splitlines() if line.startswith(f"| {order}"))
        assert f"{sum(last) / len(last):.3f} ± {np.std(last, ddof=1):.3f}" in row


def test_the_plot_is_drawn(tmp_path):
    speech_results.plot(RECORDS, tmp_path / "speech.png")
    assert (tmp_path / "speech.png").stat().st_size > 10_000
