"""Finished runs scaled back: against weights put together by hand, and what tables say of it."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from helpers.command import kappatune
from helpers.made_up_comparisons import entry, made_up, text
from helpers.recipes import tiny_recipe, write_recipe, write_rows
from kappatune_plugin import KappaTuneError
from kappatune_plugin.data.examples import ChoiceExample
from kappatune_plugin.study import training
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.compare import compare
from kappatune_plugin.study.frontier import labelled_texts, measure_frontier
from kappatune_plugin.study.methods import parse_methods
from kappatune_plugin.study.plots import limits_plot
from kappatune_plugin.study.settings import Frontier, Settings
from kappatune_plugin.study.summary import leaders, over_seeds, task_at_limits
from kappatune_plugin.study.training import train_run

CONTROL = [
    {"text": f"the {word} sat on the {other}. " * 2} for word in ("cat", "mat", "rug") for other in ("mat", "yes")
]
FRONTIER = Frontier(scales=(0.5,), limits=(0.002, 0.05))


@pytest.fixture(scope="module")
def recipe(saved_olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    found = tiny_recipe(folder, saved_olmoe, max_steps=4)
    write_rows(folder / "control.jsonl", CONTROL)
    return write_recipe(folder / "recipe.yaml", found)


@pytest.fixture(scope="module")
def bench(recipe) -> Bench:
    return Bench.load(recipe, validation=0.25)


def trained(bench, method, monkeypatch, frontier=FRONTIER, rate=3e-2):
    """A run's frontier, and its weights as a whole model's."""
    weights = {}

    def keep(bench, model, name, settings):
        whole = copy.deepcopy(model)
        whole = whole.merge_and_unload() if hasattr(whole, "peft_config") else whole
        weights.update({name: value.clone() for name, value in whole.state_dict().items()})
        return measure_frontier(bench, model, name, settings)

    monkeypatch.setattr(training, "measure_frontier", keep)
    run = train_run(bench, parse_methods(method)[0], rate, 0, every=4, frontier=frontier)
    return run["frontier"], weights


def put_together(bench, weights, scale):
    model = copy.deepcopy(bench.base).eval()
    base = bench.base.state_dict()
    model.load_state_dict({name: base[name] + scale * (value - base[name]) for name, value in weights.items()})
    return model


@torch.no_grad()
def mean_loss(model, rows) -> float:
    """Over (ids, labels), one row and one token at a time."""
    nats, tokens = 0.0, 0
    for ids, labels in rows:
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                nats, tokens = nats - found[place - 1, ids[place]].item(), tokens + 1
    return nats / tokens


def halves(bench):
    pieces = bench.probe.controls["control"]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(pieces[place], pieces[place]) for place in order]
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def held_out(bench):
    return list(zip(bench.validation["input_ids"], bench.validation["labels"], strict=True))


@pytest.mark.parametrize("method", ["lowest", "lora:r=2", "osf", "full"])
def test_every_method_along_its_scale(bench, monkeypatch, method):
    """Adapters are scaled themselves, what OSF changed once it is merged, whole models in place."""
    found, weights = trained(bench, method, monkeypatch)
    assert [point["scale"] for point in found["points"]] == [0.5, 1.0]
    chosen, unseen = halves(bench)
    points = {point["scale"]: point for point in [*found["points"], *(each["one"] for each in found["within"])]}
    for scale, point in points.items():
        model = put_together(bench, weights, scale)
        assert point["validation_loss"] == pytest.approx(mean_loss(model, held_out(bench)), abs=1e-4)
        for key, rows in (("chosen_rise", chosen), ("rise", unseen)):
            assert point[key] == pytest.approx(mean_loss(model, rows) - mean_loss(bench.base, rows), abs=1e-4)
        measured = replace(bench.probe, controls={}).measure(model)
        assert {key: point[key] for key in measured} == pytest.approx(measured, abs=1e-4)


@pytest.mark.parametrize("method", ["lowest", "lora:r=2", "osf", "full"])
def test_in_mixed_precision_what_is_scaled_is_what_is_measured(recipe, method):
    bench = Bench.load(recipe, ["--bf16", "true", "--use_cpu", "true"], validation=0.25, kl=False)
    run = train_run(bench, parse_methods(method)[0], 3e-2, 0, every=4, frontier=Frontier(scales=(0.5,), limits=(9.0,)))
    half, whole = run["frontier"]["points"]
    # before it was scaled, by the Trainer's own model
    assert whole["task_loss"] == pytest.approx(run["points"][-1]["task_loss"], rel=5e-3)
    assert abs(half["validation_loss"] - whole["validation_loss"]) > 0.01


def test_the_scale_within_a_limit(bench, monkeypatch):
    """No measured scale within the limit learns more, and a scale that was searched for can't go 1/64 further."""
    found, weights = trained(bench, "full", monkeypatch, Frontier(scales=(0.5,), limits=(0.0005, 0.002, 0.05)))
    chosen, _ = halves(bench)
    before, searched = mean_loss(bench.base, chosen), 0

    def tried(scale):
        model = put_together(bench, weights, scale)
        return mean_loss(model, chosen) - before, mean_loss(model, held_out(bench))

    for each in found["within"]:
        limit, one = each["limit"], each["one"]
        assert one["chosen_rise"] <= limit and each["per_matrix"] is None
        within = [loss for rise, loss in map(tried, (0.0, 0.5, 1.0)) if rise <= limit]
        assert one["validation_loss"] <= min(within) + 1e-4
        if one["scale"] not in (0.0, 0.5, 1.0):
            searched += 1
            assert tried(one["scale"] + 1 / 64)[0] > limit
    assert searched


def test_one_scale_a_matrix_is_never_worse_on_rows_it_wasnt_fitted_to(bench, monkeypatch):
    found, _ = trained(bench, "lowest", monkeypatch, FRONTIER.model_copy(update={"per_matrix": True}))
    for each in found["within"]:
        assert each["per_matrix"]["chosen_rise"] <= each["limit"]
        assert each["per_matrix"] == each["one"] or each["per_matrix"]["scale"] > 0


def test_test_rows_choose_nothing(bench, monkeypatch):
    found, _ = trained(bench, "lora:r=2", monkeypatch)
    wrong = [ChoiceExample(each.prompt, each.choices, 1 - each.answer) for each in bench.probe.task]
    other, _ = trained(replace(bench, probe=replace(bench.probe, task=wrong)), "lora:r=2", monkeypatch)
    for one, two in zip(found["within"], other["within"], strict=True):
        assert one["one"]["scale"] == two["one"]["scale"]
        assert one["one"]["task_accuracy"] == pytest.approx(1 - two["one"]["task_accuracy"])


def test_rows_without_labels_count_whole(bench):
    rows = bench.validation.remove_columns("labels")
    model = copy.deepcopy(bench.base).eval()
    found = labelled_texts(model, rows, batch_size=3)
    assert sum(found.tokens) == sum(len(ids) - 1 for ids in rows["input_ids"])
    assert found.loss().item() == pytest.approx(mean_loss(model, [(ids, ids) for ids in rows["input_ids"]]), abs=1e-5)


def test_what_cant_be_scaled_says_why(bench, monkeypatch):
    found, _ = trained(bench, "lowest", monkeypatch, rate=math.inf)
    assert "NaN or infinity" in found["why_not"]
    short = replace(bench.probe, controls={"control": bench.probe.controls["control"][:1]})
    found, _ = trained(replace(bench, probe=short), "lowest", monkeypatch)
    assert "one piece of text" in found["why_not"]


def test_a_killed_comparison_goes_on_and_measures_no_frontier_twice(bench, tmp_path, monkeypatch):
    frontier = Frontier(scales=(), limits=(0.05,))
    settings = Settings(seeds=(0,), learning_rates=(1e-2,), every=4, smooth=2, frontier=frontier)
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_frontier(*args)

    monkeypatch.setattr(training, "measure_frontier", killed)
    methods = parse_methods("lowest,full")
    with pytest.raises(KeyboardInterrupt):
        compare(bench, methods, settings, tmp_path)
    resumed = compare(bench, methods, settings, tmp_path)
    assert len(calls) == 3 and [len(each["frontier"]["within"]) for each in resumed["methods"]] == [1, 1]
    assert compare(bench, methods, settings, tmp_path) == resumed and len(calls) == 3
    # without scales the same runs are others: nothing was measured along them
    off = compare(bench, methods[:1], settings.model_copy(update={"frontier": None}), tmp_path)
    assert off["methods"][0]["frontier"] is None and len(calls) == 3


@pytest.mark.parametrize("rates, times", [((1e-7, 1e-5), 1), ((1e-5, 1e-2), 2)])
def test_a_run_at_a_worse_rate_than_another_is_not_scaled_back(bench, tmp_path, monkeypatch, rates, times):
    """The highest rate goes first."""
    calls = []
    monkeypatch.setattr(training, "measure_frontier", lambda *args: calls.append(1) or measure_frontier(*args))
    frontier = Frontier(scales=(), limits=(0.05,))
    settings = Settings(seeds=(0,), learning_rates=rates, every=4, smooth=2, frontier=frontier)
    (found,) = compare(bench, parse_methods("lowest"), settings, tmp_path)["methods"]
    assert (found["learning_rate"], len(calls)) == (1e-5, times)
    alone = train_run(bench, parse_methods("lowest")[0], 1e-5, 0, every=4, frontier=frontier)["frontier"]
    assert found["frontier"]["within"][0]["one"]["scale"]["values"] == [alone["within"][0]["one"]["scale"]]


def scaled(name: str, *accuracies: list[float], whole: list[float], over: float = 0.0) -> dict:
    """A method with what it has learned within the limits .01 and .1, a list over seeds for each."""

    def point(values, rise, scale):
        each = {"task_accuracy": values, "rise": [rise] * len(values), "scale": [scale] * len(values)}
        return {key: over_seeds(numbers) for key, numbers in each.items()}

    within = [
        {"limit": limit, "one": point(values, limit + over, 0.5), "per_matrix": None}
        for limit, values in zip((0.01, 0.1), accuracies, strict=True)
    ]
    points = [point([0.5], 0.0, 0.0), point(whole, 0.3, 1.0)]
    return {**entry(name, whole, [0.3] * len(whole)), "frontier": {"points": points, "within": within}}


def compared(*methods: dict, seeds: int = 3) -> dict:
    content = made_up(*methods, seeds=seeds)
    content["settings"]["frontier"] = {"limits": [0.01, 0.1], "scales": [0.5], "per_matrix": False}
    return content


def test_who_learns_most_by_the_difference_seed_by_seed():
    """Differences .01, .02, .03: mean .02, s .01, half the interval 4.303 * .01 / sqrt(3) = .0248, which holds 0."""
    a = scaled("a", [0.81, 0.72, 0.93], [0.9, 0.8, 0.7], whole=[0.9] * 3)
    b = scaled("b", [0.80, 0.70, 0.90], [0.5, 0.4, 0.3], whole=[0.8] * 3)
    content = compared(b, a)
    assert task_at_limits(content) == "task_accuracy"
    assert leaders(content, 0, "task_accuracy") == ("a", ["b"])
    # .4 each time, though both vary by more between seeds
    assert leaders(content, 1, "task_accuracy") == ("a", [])
    assert leaders(compared(entry("c", [0.5], [0.1])), 0, "task_accuracy") is None
    for method in content["methods"]:
        for each in method["frontier"]["within"]:
            each["one"]["task_loss"] = each["one"].pop("task_accuracy")
    assert leaders(content, 1, "task_loss")[0] == "b"


def test_the_table_of_limits():
    a = scaled("a", [0.81, 0.72, 0.93], [0.9, 0.8, 0.7], whole=[0.9] * 3, over=0.002)
    b = scaled("b", [0.80, 0.70, 0.90], [0.5, 0.4, 0.3], whole=[0.8] * 3)
    found = text(compared(a, b, {**entry("c", [0.5] * 3, [0.1] * 3), "frontier": {"why_not": "It has no scale."}}))
    expected = [
        "Task accuracy within a limit of forgetting",
        "a 82.0% 80.0% 90.0%",
        "×0.50 ×0.50 ×1.00",
        "Within 0.01 nats, one scale for all: a learned most; by the 95% interval of the difference it may be chance "
        "against b.",
        "Within 0.1 nats, one scale for all: a learned most, by more than chance",
        "On the other half a is furthest above its limit: 0.012 at 0.01.",
        "c was not scaled back: It has no scale.",
    ]
    assert [words for words in expected if words not in " ".join(found.split())] == []
    one = text(compared(*(scaled(name, [0.8], [0.9], whole=[0.9]) for name in "ab"), seeds=1))
    assert "one seed: no interval" in one
    assert "within a limit" not in text(made_up(entry("c", [0.5] * 3, [0.1] * 3)))


def test_the_picture_of_limits(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("kappatune_plugin.study.plots._save", lambda figure, path: drawn.append(figure.axes))
    a = scaled("a", [0.81, 0.72, 0.93], [0.9, 0.8, 0.7], whole=[0.9] * 3)
    limits_plot(compared(a, {**entry("c", [0.5] * 3, [0.1] * 3), "frontier": {"why_not": "no"}}), tmp_path / "a.png")
    (curves, points) = drawn[0]
    drawn_points = [[0.0, 50.0], [0.01, 82.0], [0.1, 80.0], [0.3, 90.0]]
    assert curves.lines[0].get_xydata().tolist() == [pytest.approx(point) for point in drawn_points]
    assert points.containers[0][0].get_ydata().tolist() == pytest.approx([82.0, 80.0])


def test_limits_as_typed(recipe, tmp_path):
    words = ["compare", "--config", recipe, "--methods", "lowest", "--seeds", 1, "--learning_rates", "1e-2"]
    words += ["--smooth", 2, "--every", 4, "--validation", 0.25]
    code, out, _ = kappatune(*words, "--output_dir", tmp_path / "a", "--scales", 0.5, "--forgetting.max_delta", 0.05)
    content = json.loads((tmp_path / "a" / "compare.json").read_text())
    assert code == 0 and "within a limit of forgetting" in " ".join(out.split()) and "a scale a matrix" in out
    assert content["settings"]["frontier"] == {"scales": [0.5], "limits": [0.05], "per_matrix": True}
    assert (tmp_path / "a" / "limits.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = kappatune(*words, "--output_dir", tmp_path / "b", "--scales", "off")
    assert code == 0 and "within a limit" not in out and not (tmp_path / "b" / "limits.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scales", "half"], "scales: 'half' are not numbers. Write 0.25,0.5,0.75 or off."),
        (["--scales", "0.5,1.5"], "scales[1]: 1.5 is not a number below 1"),
        (["--limits", "-0.1"], "limits: '-0.1' are not all above 0"),
    ],
)
def test_mistakes(recipe, tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr(Bench, "load", None)
    code, _, errors = kappatune("compare", "--config", recipe, "--output_dir", tmp_path, *words)
    assert code == 2 and expected in " ".join(errors.split()), errors


def test_what_merging_refuses_is_named(bench):
    class Refuses:
        peft_config = {}
        active_adapters = ["a", "b"]

        def merge_and_unload(self):
            raise KappaTuneError("not this one")

    assert "not this one" in measure_frontier(bench, Refuses(), "made_up", FRONTIER)["why_not"]
