"""docs/RESULTS.md on made-up comparisons of real models: what each decision adds, who has learned most."""

import sys
from pathlib import Path

import pytest

from helpers.made_up_comparisons import entry, made_up
from kappatune_plugin.study.summary import over_seeds

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import levers  # noqa: E402
import ranks  # noqa: E402
import real_page  # noqa: E402
import real_plots  # noqa: E402
import real_tables  # noqa: E402
import study_gpu  # noqa: E402
import study_real  # noqa: E402

LIMITS = [0.02, 0.1]


def method(name: str, *losses: list[float], grid: dict | None = None) -> dict:
    """A method with these losses on test rows within .02 and .1, a list over seeds for each; 60% right everywhere."""

    def point(values, scale):
        each = {"task_loss": values, "task_accuracy": [0.6] * len(values), "rise": [0.01] * len(values)}
        return {key: over_seeds(numbers) for key, numbers in {**each, "scale": [scale] * len(values)}.items()}

    within = [
        {
            "limit": limit,
            "one": point(values, 0.5),
            "per_matrix": point([value and value - 0.01 for value in values], 0.4),
        }
        for limit, values in zip(LIMITS, losses, strict=True)
    ]
    frontier = {"points": [point([1.0], 0.0), point(losses[-1], 1.0)], "within": within}
    return {**entry(name, [0.6] * len(losses[0]), [0.2] * len(losses[0])), "frontier": frontier, "grid": grid or {}}


def compared(*methods: dict, seeds: int = 3) -> dict:
    content = made_up(*methods, seeds=seeds)
    content["settings"]["frontier"] = {"limits": LIMITS, "scales": [0.5], "per_matrix": True}
    content["before"] |= {"task_loss": 1.0, "recall": 0.5, "wikitext_loss": 3.0}
    return content


def choice(ours, theirs, ways=("one", "one")):
    return levers.Lever("", ((ours, theirs),), ways)


def test_a_difference_is_paired_by_seed_and_in_many_settings_over_settings():
    first = compared(method("a", [0.3, 0.4, 0.5], [0.1] * 3), method("b", [0.2, 0.2, 0.2], [0.3] * 3))
    second = compared(method("b", [0.1] * 3, [0.3] * 3), method("a", [0.4] * 3, [0.1] * 3))
    lever = choice("a", "b")
    # differences .1, .2, .3: mean .2, s = .1, t(2) = 4.303: ± .248
    assert levers.added([first], lever, 0.02, "task_loss")["half"] == pytest.approx(0.2484, abs=1e-4)
    # .1, .2, .3 and .3 three times: mean .25, s = .0837, t(5) = 2.571: ± .0878
    both = levers.added([first, second], lever, 0.02, "task_loss")
    assert both["over"] == "6 runs in 2 settings"
    assert (both["mean"], both["half"]) == (pytest.approx(0.25), pytest.approx(0.0878, abs=1e-4))
    # of settings .2, .3, .2, .3: mean .25, s = .0577, t(3) = 3.182: ± .0919
    four = levers.added([first, second] * 2, lever, 0.02, "task_loss")
    assert (four["over"], four["half"]) == ("4 settings", pytest.approx(0.0919, abs=1e-4))
    assert levers.added([first, second], lever, 0.1, "task_loss")["mean"] == pytest.approx(-0.2)
    assert levers.added([first], lever, 0.05, "task_loss") is None
    assert levers.added([first], choice("a", "c"), 0.02, "task_loss") is None


def test_every_method_against_itself_by_another_way():
    content = compared(method("a", [0.3, 0.4], [0.1] * 2), method("b", [0.2] * 2, [0.3] * 2), seeds=2)
    lever = choice(levers.EVERY, levers.EVERY, ("per_matrix", "one"))
    assert levers.added([content], lever, 0.02, "task_loss")["values"] == [pytest.approx(-0.01)] * 2


def tried(held_out, loss, *rises):
    changes = {f"{name}_loss_change": rise for name, rise in zip("ab", rises, strict=False)}
    return {"validation_loss": held_out, "final": {"task_loss": loss, "control_loss_change": sum(rises) / 2, **changes}}


def test_by_the_rate_alone_counts_the_best_whose_worst_control_keeps_the_limit():
    grid = {"1e-5": tried(0.9, 0.8, 0.0, 0.01), "1e-4": tried(0.5, 0.6, 0.0, 0.09), "1e-3": tried(0.1, 0.2, 0.3, 0.4)}
    diverged = {"1e-2": {"validation_loss": None, "final": {"task_loss": None, "control_loss_change": None}}}
    ours = method("a", [0.3], [0.1], grid={**grid, **diverged})
    content = compared(ours, method("b", [0.3], [0.1], grid={"1e-3": tried(0.1, 0.2, 0.3, 0.4)}), seeds=1)
    assert levers.kept(content, ours, "rate", 0.02, "task_loss") == [0.8]
    assert levers.kept(content, ours, "rate", 0.1, "task_loss") == [0.6]
    # no rate of b keeps a limit: the base is left
    lever = choice("a", "b", ("rate", "rate"))
    assert levers.added([content], lever, 0.1, "task_loss") == {
        "mean": -0.4,
        "half": None,
        "values": [-0.4],
        "over": "1 seed",
    }
    assert levers.added([content], choice("a", "a", ("one", "rate")), 0.1, "task_loss")["mean"] == pytest.approx(-0.5)


@pytest.fixture
def contents():
    lowest = method("lowest_mlp", [0.30, 0.31, 0.33], [0.20, 0.21, 0.22])
    random = method("random_mlp", [0.25, 0.26, 0.28], [0.20, 0.25, 0.16])
    unscaled = {**entry("osf", [0.5] * 3, [0.1] * 3), "frontier": {"why_not": "It has no scale."}, "grid": {}}
    return {
        "smollm2-irony": compared(lowest, random, unscaled),
        "gemma3-irony": compared(method("lora", [0.5], [0.4]), seeds=1),
    }


def test_the_page_names_who_has_learned_most_and_what_a_choice_adds(contents):
    page = real_page.text(contents, [], "")
    for said in (
        "**Lowest loss, in how many of 2 settings**: within 0.02 `random_mlp` 1, `lora` 1; 0.1 `random_mlp` 1, `lora` 1"
        ". By more than chance against every other method in 1, 0.",
        "| irony of tweets (3 seeds) | 0.02 | `random_mlp` 0.263 ± .038 | none |",
        "| irony of tweets (3 seeds) | 0.1 | `random_mlp` 0.203 ± .112 | `lowest_mlp` |",
        "| irony of tweets (1 seed) | 0.02 | `lora` 0.500 | one seed |",
        "| `lowest_mlp` against `random_mlp` | 3 seeds | **+0.050 ± .000**; +0.0 ± .0 | +0.007 ± .125; +0.0 ± .0 |",
        "`lowest_mlp` against `random_mlp`: the loss is higher within 0.02 (**+0.050 ± .000**).",
        "| `osf` | 0.001 | 1,000 | It has no scale. |",
        "| `lora` | 0.001 | 1,000 | 60.0%; 0.500; ×0.50 | 60.0%; 0.400; ×0.50 | 60.0%; 0.400; ×1.00 | +0.010 | - |",
        "- 7 of the 9 settings above: not measured yet.",
        "- What more than a seed or two would say: Gemma 3 270M (dequantized from 4 bit): irony of tweets.",
        "### Gemma 3 270M (dequantized from 4 bit): irony of tweets (1 seed)",
        "![learned within two limits](results/smollm2-limits.png)",
    ):
        assert said in page, said
    assert "no comparison" not in page.lower()


def test_the_end_token_is_compared_seed_by_seed_and_counts_for_no_setting_more(contents):
    without = compared(method("lowest_mlp", [0.10, 0.11, 0.13], [0.1, 0.2, 0.3]))
    page = real_page.text({**contents, "smollm2-irony_no_end": without}, [], "")
    assert "| `lowest_mlp` | **-0.200 ± .000** | -0.010 ± .224 | +0.000 ± .000 |" in page
    assert "of 2 settings" in page and "of 3 settings" not in page


def test_a_scale_a_matrix_is_compared_in_its_own_setting_and_counts_for_no_setting_more(contents):
    each = compared(method("full", [0.10, 0.11, 0.13], [0.1, 0.2, 0.3]))
    page = real_page.text({**contents, "smollm2-sst2_per_matrix": each}, [], "")
    assert "| `full`, tone of film reviews (SST-2) | **-0.010 ± .000** | **-0.010 ± .000** |" in page
    assert "within 0.02 (**-0.010 ± .000**), 0.1 (**-0.010 ± .000**) (mean of 1 method, 3 seeds)." in page
    assert "of 2 settings" in page and "of 3 settings" not in page
    assert list(real_page.by_model({**contents, "smollm2-sst2_per_matrix": each})["smollm2"]) == ["irony of tweets"]
    assert "against one for all" not in real_page.text(contents, [], "")
    tuned = {"smollm2-sst2": compared(method("full", [0.1], [0.1], grid={"0.001": {}, "0.01": {}}), seeds=1)}
    page = real_page.unknown({**tuned, "smollm2-sst2_per_matrix": tuned["smollm2-sst2"]})
    assert "of 1 best ones 1 are the lowest or the highest" in page


def ranked(*losses: float | None) -> dict:
    """A setting with methods a, b, c of these losses within both limits; all are right as often."""
    return compared(*(method(name, [loss], [loss]) for name, loss in zip("abc", losses, strict=True)), seeds=1)


def test_mean_ranks_are_over_settings_whatever_the_size_of_their_losses():
    contents = [ranked(1, 2, 3), ranked(10, 30, 20), ranked(0.1, 0.2, 0.2), ranked(2, 1, 3)]
    assert ranks.mean_ranks(contents, 0.02, "task_loss") == ({"a": 1.25, "b": 2.125, "c": 2.625}, 4)
    assert ranks.mean_ranks(contents, 0.02, "task_accuracy")[0] == {"a": 2, "b": 2, "c": 2}
    diverged = [ranked(1, 2, 3), ranked(2, 1, None)]
    assert ranks.mean_ranks(diverged, 0.02, "task_loss")[0] == {"a": 1.5, "b": 1.5, "c": 3}
    contents[1]["methods"] = contents[1]["methods"][:2]
    assert ranks.mean_ranks(contents, 0.02, "task_loss") == ({"a": 1.25, "b": 1.75}, 4)
    free = {key: each for key, each in contents[0]["before"].items() if key != "task_accuracy"}
    assert ranks.mean_ranks([{**contents[0], "before": free}, *contents[1:]], 0.02, "task_accuracy")[1] == 3


def test_the_critical_difference_is_that_of_the_source():
    # Demsar 2006, section 3.2.4: four methods on 14 data sets, 2.569 * sqrt(4 * 5 / (6 * 14)) = 1.25
    assert ranks.critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


def test_the_page_ranks_methods_from_four_settings_on():
    contents = {name: ranked(1, 2, 3) for name in ("smollm2-irony", "smollm2-sst2", "smollm2-gsm8k", "mixture-irony")}
    page = real_page.text(contents, [], "")
    assert "| `a` | 1.0; 2.0 | 1.0; 2.0 |\n| `b` | 2.0; 2.0 | 2.0; 2.0 |" in page
    # three methods in four settings: 2.343 * sqrt(3 * 4 / 24) = 1.66
    assert "over 4 settings**: within 0.02 `a` (1.0; by more than chance ahead of `c`)" in page
    assert "less than 1.7 apart" in " ".join(page.split())
    del contents["mixture-irony"]
    assert "rank" not in real_page.in_short(contents, []) and ranks.table(list(contents.values())) == ""


def test_the_page_says_how_good_the_mixture_is():
    quality = {"dense": 3.9, "mixture": 4.25, "tokens": 8192}
    page = real_page.text({}, [], "", quality)
    assert "is 4.250, the dense model's 3.900 (8192 tokens)" in page and "The mixture" not in real_page.text({}, [], "")


def dialed(arm, seed, loss, mode="per_matrix"):
    run = {"task": "irony", "arm": arm, "replay": 0.0, "seed": seed}
    kept = {"loss": loss, "accuracy": 0.5, "mode": mode}
    return [
        {**run, "mode": "base", "loss": 4.0, "accuracy": 0.5},
        {**run, "limit": 0.02, "asked": "one", "loss": 9.0, "accuracy": 0.1, "mode": "one"},
        {**run, "limit": 0.02, "asked": "per_matrix", **({"mode": "none"} if mode == "none" else kept)},
    ]


def test_the_dials_runs_are_compared_one_by_one_and_what_keeps_nothing_is_the_base():
    runs = [
        *dialed("lora", 0, 1.0),
        *dialed("lora", 1, 2.0),
        *dialed("lowest_mlp", 1, 2.5),
        *dialed("lowest_mlp", 0, 1.5),
    ]
    page = real_page.text({}, runs, "")
    assert "| `lowest_mlp` against `lora` | **+0.500 ± .000**; +0.0 ± .0 (2 runs) |" in page and "From 4 runs" in page
    assert "`lowest_mlp` against `lora`: the loss is higher within 0.02 (**+0.500 ± .000**)." in page
    none = real_page.on_dial([*dialed("lora", 0, 1.0), *dialed("full", 0, 0.0, mode="none")])
    assert none["`full` against `lora`"][0.02][0]["values"] == [3.0]


def test_a_page_without_comparisons_says_so():
    page = real_page.text({}, [], "")
    assert "No comparison with tuned rates is in `docs/results` yet" in page and page.count("not measured yet") == 10
    assert "Every method" not in page and "What each decision adds" not in page


def test_the_page_knows_every_setting_of_the_study():
    assert set(study_real.SETTINGS) | set(study_gpu.SETTINGS) <= set(real_page.names())
    assert {name.partition("-")[0] for name in study_gpu.SETTINGS} == set(real_tables.LARGER)
    methods = {name for each in study_real.SETTINGS.values() for name in each.split(",")}
    compared = {name for group in levers.LEVERS.values() for lever in group for pair in lever.pairs for name in pair}
    assert compared - {levers.EVERY} <= methods


def test_the_picture_is_drawn(contents, tmp_path):
    real_plots.plot({"irony": contents["smollm2-irony"]}, tmp_path / "limits.png")
    assert (tmp_path / "limits.png").stat().st_size > 10_000
