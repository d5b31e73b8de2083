"""The pure parts of a comparison: arithmetic, names of methods, what each trains, tables and recommendations."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.made_up_comparisons import entry, made_up, text
from helpers.made_up_reports import report, row, twelve_units
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneError, scan
from kappatune_plugin.study import plots
from kappatune_plugin.study.method_configs import Pool, arm_config, choose, nearest_count
from kappatune_plugin.study.methods import DEFAULT_METHODS, Method, parse_methods
from kappatune_plugin.study.plots import budget_plot, frontier_plot, matched_plot
from kappatune_plugin.study.session import recommend
from kappatune_plugin.study.settings import Settings, Tried
from kappatune_plugin.study.store import RunStore
from kappatune_plugin.study.summary import changes, first_crossing, interval, over_seeds, smoothed, summarize
from kappatune_plugin.study.tables import shown
from kappatune_plugin.weights.units import find_units

# two-sided 95% points of Student's t, from any printed table: degrees of freedom -> t
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize("freedom", STUDENT_T)
def test_interval_is_students(freedom):
    values = torch.randn(freedom + 1, dtype=torch.float64).tolist()
    mean, half = interval(values)
    deviation = torch.tensor(values, dtype=torch.float64).std().item()
    assert mean == pytest.approx(sum(values) / len(values))
    assert half == pytest.approx(STUDENT_T[freedom] * deviation / math.sqrt(freedom + 1), rel=3e-4)


def test_interval_by_hand():
    # mean 2, s = 1, t(2) = 4.303, sqrt(3) = 1.732
    assert interval([1.0, 2.0, 3.0])[1] == pytest.approx(2.484, abs=1e-3)


def test_interval_is_scipys():
    from scipy.stats import ttest_1samp

    values = [0.31, 0.28, 0.45, 0.3, 0.33]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)


def test_one_value_has_no_interval_and_none_is_an_error():
    assert interval([3.0]) == (3.0, None) and over_seeds([None, None]) is None
    assert over_seeds([None, 3.0]) == {"mean": 3.0, "half": None, "values": [None, 3.0]}
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_smoothing_is_the_mean_of_the_last_steps():
    assert smoothed([4.0, 2.0, 3.0, 1.0], 2) == [math.inf, 3.0, 2.5, 2.0]
    assert smoothed([1.0, 2.0], 3) == [math.inf, math.inf]
    # a loss that wasn't finite is in the window for two steps
    assert smoothed([1.0, None, 1.0, 3.0], 2) == [math.inf, math.inf, math.inf, 2.0]


@pytest.mark.parametrize("window", [1, 4, 7])
def test_the_crossing_is_the_first_step_at_or_below_the_target(window):
    losses = [3 * math.exp(-step / 20) + 0.4 * math.sin(step) for step in range(1, 120)]
    for target in (2.0, 0.7, 0.1):
        means = {end: sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)}
        slow = next((end for end, mean in means.items() if mean <= target + 1e-12), None)
        assert first_crossing(smoothed(losses, window), target) == slow
    # a straight line: the mean of the last w of 100, 99, ... after step s is 100 - s + (w + 1) / 2
    line = smoothed([100.0 - step for step in range(1, 100)], window)
    assert first_crossing(line, 50.0) == 50 + (window - 1) // 2 + (window - 1) % 2
    assert first_crossing(line, 0.0) is None


def test_a_plateau_exactly_at_the_target_counts():
    assert first_crossing([3.0, 2.0, 2.0, 1.0], 2.0) == 2


def test_methods_by_name():
    parsed = {method.name: method for method in parse_methods(DEFAULT_METHODS)}
    assert list(parsed) == DEFAULT_METHODS.split(",") and len(parsed) == 11
    assert parsed["lowest_mlp"] == Method("lowest_mlp", "kappatune", "lowest", "mlp")
    assert parsed["attention_only"] == Method("attention_only", "kappatune", "lowest", "attention")
    assert parsed["lora_mlp"] == Method("lora_mlp", "peft", "lora", "mlp") and parsed["full"].kind == "full"
    settings = parse_methods("lora:r=4,lowest:k={params: 1M}:exclude=[norm, router],random_per_type")
    assert [method.settings for method in settings] == [
        {"r": 4},
        {"k": {"params": "1M"}, "exclude": ["norm", "router"]},
        {},
    ]
    assert settings[2].part == "per_type"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lowset", ["'lowset' is no method", "Did you mean 'lowest'?"]),
        ("lora_mpl", ["Did you mean 'lora_mlp'?"]),
        ("lowset,fulll", ["lowest", "'full'"]),
        ("lora:q=3", ["no setting 'q'"]),
        ("lowest:order=highest", ["no setting 'order'", "rank_by"]),
        ("lowest:rank_by=kapa", ["rank_by", "kapa"]),
        ("lowest:k=0", ["lowest:k=0", "nothing"]),
        ("full:r=2", ["no setting 'r'", "takes replay"]),
        ("lora:r", ["sets nothing"]),
        ("lora_per_type", ["'lora_per_type' is no method"]),
        ("lowest,lowest", ["twice"]),
        (" , ", ["there are none"]),
    ],
)
def test_methods_that_are_no_methods(text, words):
    with pytest.raises(KappaTuneError) as error:
        parse_methods(text)
    for word in words:
        assert word in str(error.value)


def test_nearest_count():
    assert nearest_count([10, 10, 10], 20) == 2
    assert nearest_count([10, 10, 10], 14) == 1 and nearest_count([10, 10, 10], 16) == 2
    assert nearest_count([10, 10], 15) == 1, "of two equally near, the fewer"
    assert nearest_count([10, 10], 3) == 1 and nearest_count([10, 10], 99) == 2


def values(selection) -> int:
    return sum(rows * columns for rows, columns in (unit.shape for unit in selection.units))


def test_kappatune_methods_match_the_reference_s_parameters():
    pool = Pool.of(twelve_units(), 4)
    assert pool.values == 64
    for name in ("lowest", "highest", "random", "shape_matched_random"):
        found = choose(parse_methods(name)[0], pool, [], seed=3)
        assert values(found) == 64 and found.order == name
    assert [unit.kappa for unit in choose(parse_methods("highest")[0], pool, [], 0).units] == [10, 9, 8, 7]
    assert len(choose(parse_methods("lowest:k=2")[0], pool, [], 0).units) == 2


def test_another_criterion_may_say_within_what_is_chosen_and_a_seed_makes_other_draws():
    units = [row(f"model.layers.0.mlp.experts.{i}.up_proj.weight", 10.0 - i) for i in range(8)]
    used = [replace(unit, scores={"expert_share": float(-place)}) for place, unit in enumerate(units)]
    pool = Pool.of(report(*used), 2)
    (method,) = parse_methods("lowest:within=expert_share")
    # of the four that are used most the two of lowest kappa; over all they would be the last two
    assert [unit.name.split(".")[5] for unit in choose(method, pool, [], 0).units] == ["3", "2"]
    draws = {
        tuple(unit.name for unit in choose(parse_methods(f"random{setting}")[0], pool, [], seed).units)
        for setting in ("", ":seed=100")
        for seed in range(3)
    }
    assert len(draws) > 3
    with pytest.raises(KappaTuneError, match="within: 'kappa' is none of"):
        parse_methods("lowest:within=kappa")


def test_parts_are_kept_to():
    units = [
        row(f"model.layers.{i}.{kind}.weight", i + 1 + place / 10)
        for i in range(4)
        for place, kind in enumerate(("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
    ]
    units.append(row("model.layers.0.mlp.gate.weight", 1.0, groups=("router",)))
    pool = Pool.of(report(*units), 6)
    taken = {
        name: [unit.name for unit in choose(parse_methods(name)[0], pool, [], 0).units]
        for name in ("lowest_mlp", "attention_only", "random_mlp", "lowest_per_type")
    }
    assert all(".mlp." in name and ".gate." not in name for name in taken["lowest_mlp"] + taken["random_mlp"])
    assert all("self_attn" in name for name in taken["attention_only"]) and len(taken["attention_only"]) == 4
    assert len(taken["lowest_mlp"]) == len(taken["random_mlp"]) == 6
    # 6 of 13 of each type: of 4 matrices 2, of the one router 1
    assert [sum(kind in name for name in taken["lowest_per_type"]) for kind in ("q_proj", "up_proj", "down_proj")] == [
        2
    ] * 3
    only_attention = report(*(unit for unit in units if "self_attn" in unit.name))
    with pytest.raises(KappaTuneError, match="lowest_mlp: none of the 4"):
        choose(parse_methods("lowest_mlp")[0], Pool.of(only_attention, 2), [], 0)


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_pefts_methods_match_the_reference_s_parameters(kind):
    from peft import get_peft_model

    base = tiny_model(kind)
    pool = Pool.of(scan(base, progress=False), "60%")
    counts = {}
    for name in ("lora", "lora_mlp", "osf", "lora:r=3"):
        config = arm_config(parse_methods(name)[0], pool, base, seed=0)
        model = get_peft_model(tiny_model(kind), config)
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        adapted = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
        assert name != "lora_mlp" or all(".mlp." in parameter for parameter in adapted)
    # within half a rank, of which there are few in a tiny model
    one_rank = counts["lora:r=3"] / 3
    assert abs(counts["lora"] - pool.values) <= one_rank / 2 or counts["lora"] == one_rank
    assert kind == "olmoe" or counts["osf"] == pytest.approx(pool.values, rel=0.25)
    assert arm_config(parse_methods("full")[0], pool, base, seed=0) is None


def test_a_method_that_adapts_no_linear_layer_here_says_so():
    base = tiny_model("olmoe")
    pool = Pool.of(scan(base, progress=False), 3)
    with pytest.raises(KappaTuneError, match="osf_mlp: .*linear layers"):
        arm_config(parse_methods("osf_mlp")[0], pool, base, seed=0)


def test_pairs_are_as_many_parameters_as_the_whole_matrices_and_a_recipe_with_pairs_has_them_everywhere():
    base = tiny_model("olmoe")
    report = scan(base, include=["*.experts.*"], progress=False)
    (method,) = parse_methods("lowest:adapter=lora")
    config = arm_config(method, Pool.of(report, 4), base, seed=0)
    shapes = [unit["shape"] for unit in config.selection["units"]]
    assert len(shapes) == 4 and config.adapter == "lora" and config.lora_alpha == 2 * config.r
    one_more = sum(sum(shape) for shape in shapes)
    assert abs(config.r * one_more - Pool.of(report, 4).values) <= one_more / 2
    pool = Pool.of(report, 4, adapter={"adapter": "lora", "r": 3, "lora_alpha": 5.0})
    assert pool.values == 3 * one_more
    for name in ("lowest", "random"):
        config = arm_config(parse_methods(name)[0], pool, base, seed=0)
        assert (config.adapter, config.r, config.lora_alpha) == ("lora", 3, 5.0)
        assert 3 * sum(sum(unit["shape"]) for unit in config.selection["units"]) == pool.values
    whole = arm_config(parse_methods("lowest:adapter=full")[0], pool, base, seed=0)
    assert whole.adapter == "full" and whole.r is None


def test_linear_layers_have_pefts_own_pairs():
    base = tiny_model("llama")
    config = arm_config(
        parse_methods("lowest:adapter=lora:r=2")[0], Pool.of(scan(base, progress=False), 4), base, seed=0
    )
    assert config.peft_type.value == "LORA" and len(config.target_modules) > 0


def test_the_groups_attention_and_mlp_are_patterns():
    whole, attention, mlp = (
        {unit.name for unit in scan(tiny_model("olmoe"), progress=False, **patterns).units}
        for patterns in ({"exclude": ["embedding", "head", "router"]}, {"include": ["attention"]}, {"include": ["mlp"]})
    )
    assert attention | mlp == whole and not attention & mlp
    assert {name.split(".")[3] for name in attention} == {"self_attn"} and all(".experts." in name for name in mlp)
    assert len(whole) == len(find_units(tiny_model("olmoe"))) - 4


def test_the_store_gives_back_what_it_wrote_and_tells_runs_apart(tmp_path):
    store, made = RunStore(tmp_path), []

    def make():
        made.append(1)
        return {"losses": [1.5, None], "points": ({"step": 1},)}

    first = store.get("lowest:k=10%", {"seed": 0}, make)
    assert store.get("lowest:k=10%", {"seed": 0}, make) == first and len(made) == 1
    store.get("lowest:k=10%", {"seed": 1}, make)
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2
    path = store.path("lowest:k=10%", {"seed": 0})
    path.write_text(path.read_text()[:20])
    with pytest.raises(KappaTuneError, match="isn't JSON"):
        store.get("lowest:k=10%", {"seed": 0}, make)


def test_changes_average_the_controls():
    before = {"a_loss": 1.0, "a_ppl": 2.0, "b_loss": 2.0, "b_ppl": 4.0, "task_accuracy": 0.5}
    point = {
        "step": 3,
        "a_loss": 1.5,
        "a_ppl": 3.0,
        "a_kl": 0.1,
        "b_loss": 2.1,
        "b_ppl": 4.5,
        "b_kl": 0.3,
        "task_accuracy": 0.7,
    }
    found = changes(point, before)
    assert found["control_loss_change"] == pytest.approx(0.3) and found["control_ppl_change"] == pytest.approx(0.75)
    assert found["control_kl"] == pytest.approx(0.2) and found["a_loss_change"] == 0.5 and found["task_accuracy"] == 0.7
    assert changes({**point, "b_loss": None}, before)["control_loss_change"] is None


def test_a_measurement_at_another_target_is_not_shown():
    """A finished run may have been made for another one."""
    run = {
        "losses": [3.0, 2.0, 1.0, 0.5],
        "at_target": {"step": 3, "a_loss": 1.5, "a_ppl": 3.0, "a_kl": 0.1},
        "points": [{"step": 4, "a_loss": 1.5, "a_ppl": 3.0, "a_kl": 0.1}],
        "validation_loss": 0.5,
        "trainable": 1,
        "seconds": 1.0,
        "training_bytes": 2,
        "peak_bytes": None,
    }
    tried = Tried(parse_methods("lowest")[0], 1e-3, [run], {1e-3: run}, [None])
    before = {"a_loss": 1.0, "a_ppl": 2.0}
    for target, step in ((1.5, 3), (1.0, 3), (2.0, None), (0.5, None), (None, None)):
        settings = Settings(seeds=(0,), learning_rates=(1e-3,), every=4, smooth=1, target_loss=target)
        found = summarize(tried, before, settings)["grid"]["0.001"]["at_target"]
        assert (found and found["step"]) == step, target


def test_the_table_says_what_did_not_reach_the_target():
    content = made_up(
        entry("lowest", [0.8, 0.9, 0.85], [0.1, 0.2, 0.3]), entry("highest", [0.6] * 3, [0.1] * 3, reached=False)
    )
    found = text(content)
    assert "not reached" in found and "Not all runs of highest reach the target" in found
    # mean .2, s = .1, t(2) = 4.303
    for shown_there in ("+0.200", "± .248", "85.0%", "± 12.4"):
        assert shown_there in found


def test_the_table_says_when_seeds_are_too_few():
    found = text(made_up(entry("lowest", [0.8], [0.1]), seeds=1))
    assert "no interval" in found and "±" not in found and "--seeds 3" in found


def test_an_edge_of_the_grid_is_marked():
    found = text(made_up({**entry("lowest", [0.8] * 3, [0.1] * 3), "at_edge_of_grid": True}))
    assert "0.001 *" in found and "edge of the grid" in found


def test_numbers_as_shown():
    assert shown(None, "{:.3f}") == "-"
    assert shown({"mean": 0.0534, "half": 0.0121}, "{:+.3f}") == "+0.053 ± .012"
    assert shown({"mean": 0.97, "half": 0.012}, "{:.1%}") == "97.0% ± 1.2"
    assert shown({"mean": 2.0, "half": 1.25}, "{:.2f}") == "2.00 ± 1.25"
    assert shown({"mean": -0.0004, "half": 0.0001}, "{:+.3f}") == "+0.000 ± .000"
    assert shown({"mean": -0.0006, "half": None}, "{:+.3f}") == "-0.001"


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        # the best is 90% ± 2.5: 88% can't be told from it, 86% can
        ([[0.86] * 3, [0.88] * 3, [0.89, 0.9, 0.91]], "lowest:k=25%"),
        ([[0.5] * 3, [0.6] * 3, [0.89, 0.9, 0.91]], "lowest:k=50%"),
        ([[0.9] * 3, [0.6] * 3, [0.5] * 3], "lowest:k=10%"),
        ([[0.895], [0.6], [0.9]], "lowest:k=10%"),
    ],
)
def test_the_smallest_budget_that_cannot_be_told_from_the_best(accuracies, chosen):
    entries = [
        entry(f"lowest:k={k}", each, [0.1] * len(each))
        for k, each in zip(("10%", "25%", "50%"), accuracies, strict=True)
    ]
    name, why = recommend(made_up(*entries))
    assert name == chosen and f"k: {chosen[9:]}" in why
    assert ("largest that was tried" in why) == (chosen == "lowest:k=50%")


def test_nothing_larger_than_everything_is_suggested():
    entries = [entry("lowest:k=10%", [0.5] * 3, [0.1] * 3), entry("lowest:k=100%", [0.89, 0.9, 0.91], [0.1] * 3)]
    name, why = recommend(made_up(*entries))
    assert name == "lowest:k=100%" and "largest that was tried" not in why


def test_no_recommendation_without_a_task():
    content = made_up(entry("lowest:k=10%", [0.5], [0.1]))
    content["before"] = {"a_ppl": 2.0}
    assert recommend(content)[0] is None and "data.test" in recommend(content)[1]


def test_a_budget_that_diverged_is_left_out_of_the_picture(tmp_path):
    diverged = entry("lowest:k=100%", [0.5], [0.1])
    diverged["final"] = {**diverged["final"], "task_accuracy": None, "control_loss_change": None}
    content = made_up(entry("lowest:k=10%", [0.8], [0.1]), entry("lowest:k=50%", [0.9], [0.2]), diverged, seeds=1)
    budget_plot(content, tmp_path / "with.png", "lowest:k=10%")
    drawn = (tmp_path / "with.png").read_bytes()
    diverged["final"] = entry("", [0.5], [0.1])["final"]
    budget_plot(content, tmp_path / "all.png", "lowest:k=10%")
    assert drawn.startswith(b"\x89PNG") and drawn != (tmp_path / "all.png").read_bytes()


@pytest.mark.parametrize(("worst", "scale"), [(0.9, "linear"), (1.1, "symlog")])
def test_methods_are_told_apart_beside_one_that_forgets_far_more(tmp_path, monkeypatch, worst, scale):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    content = made_up(entry("lowest", [0.8] * 3, [0.02] * 3), entry("full", [0.9] * 3, [worst] * 3))
    frontier_plot(content, tmp_path / "a.png")
    matched_plot(content, tmp_path / "b.png")
    assert [axes.get_xscale() for axes in drawn] == [scale] * 2
    assert all(("logarithmic" in axes.get_xlabel()) == (scale == "symlog") for axes in drawn)


def test_long_names_and_what_was_not_reached_are_on_lines_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    long = entry("lowest:rank_by=kappa_over_null", [0.8, 0.9, 0.85], [0.1, 0.2, 0.3], reached=False)
    matched_plot(made_up(entry("lora", [0.8] * 3, [0.1] * 3), long), tmp_path / "a.png")
    labels = [label.get_text() for label in drawn[0].get_yticklabels()]
    assert labels == ["lora", "lowest\n:rank_by=kappa_over_null\n(reached by 0 of 3)"]
