"""What all runs of a comparison share, on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError, scan
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.scanning.gain import GAIN
from kappatune_plugin.study import bench as bench_module
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.method_configs import choose
from kappatune_plugin.study.methods import parse_methods
from kappatune_plugin.study.training import train_run
from kappatune_plugin.tuner.what_to_train import full_report
from kappatune_plugin.weights.units import find_units


@pytest.fixture(scope="module")
def recipe(saved_olmoe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", tiny_recipe(folder, saved_olmoe, max_steps=6))


@pytest.fixture(scope="module")
def bench(recipe) -> Bench:
    return Bench.load(recipe, validation=0.25)


class Placed:
    """A model that says where it has been."""

    def __init__(self) -> None:
        self.device, self.seen = "cpu", []

    def to(self, device: str) -> None:
        self.device = device
        self.seen.append(device)


def test_a_base_is_on_the_device_of_the_runs_while_it_is_measured_and_then_back():
    model = Placed()
    with pytest.raises(ZeroDivisionError), bench_module.placed(model, "cuda:0"):
        assert model.device == "cuda:0"
        raise ZeroDivisionError
    assert model.seen == ["cuda:0", "cpu"]
    model.config = type("Config", (), {"quantization_config": {"load_in_4bit": True}})
    with bench_module.placed(model, "cuda:0"):
        assert model.device == "cpu"


@pytest.mark.parametrize("measured", ["before", "load", "replayed"])
def test_what_measures_the_base_places_it(bench, recipe, monkeypatch, measured):
    places, really = [], bench_module.placed
    monkeypatch.setattr(bench_module, "placed", lambda *where: places.append(where[1]) or really(*where))
    calls = {
        "before": bench.before,
        "load": lambda: Bench.load(recipe, validation=0.25),
        "replayed": lambda: bench.replayed(ReplayConfig(share=0.5)),
    }
    calls[measured]()
    assert places == [bench.recipe.training_args.device]


def test_the_base_is_measured_in_the_precision_of_the_runs(recipe):
    """A run that changes nothing has forgotten nothing, in mixed precision too."""
    bench = Bench.load(recipe, ["--bf16", "true", "--use_cpu", "true"], validation=0.25, kl=False)
    before = bench.before()
    run = train_run(bench, parse_methods("lowest")[0], 1e-30, 0, every=6)
    after = {key: value for key, value in run["points"][-1].items() if key != "step"}
    assert after == before and not any(key.endswith("_kl") for key in before)
    with_all_digits = replace(bench, overrides=[], recipe=load_recipe(recipe)).measure(bench.base)
    assert with_all_digits["control_loss"] != before["control_loss"]


def test_rows_are_held_out_and_none_is_lost(bench):
    assert len(bench.validation) == 4 and len(bench.train) == 12
    assert {"input_ids", "labels"} <= set(bench.train.column_names)
    assert bench.steps == 6


def test_a_method_may_rank_by_what_is_measured_on_the_rows(recipe):
    settings = ["--kappatune.gain", "{examples: 4, samples: 2, max_length: 16}"]
    bench = Bench.load(recipe, settings, validation=0.25, ranks=["gain_over_forgetting"])
    scores = {unit.name: unit.scores[GAIN] for unit in bench.pool.report.units}
    (method,) = parse_methods(f"highest:rank_by={GAIN}:k=3")
    chosen = choose(method, bench.pool, find_units(bench.base), seed=0).units
    assert [unit.name for unit in chosen] == sorted(scores, key=lambda name: -scores[name])[:3]
    assert not any(parameter.grad is not None for parameter in bench.base.parameters())


def test_a_recipe_that_measures_nothing(saved_olmoe, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe, forgetting=None))
    with pytest.raises(KappaTuneError, match="forgetting is missing"):
        Bench.load(path)


@pytest.mark.parametrize("key", ["modules_to_save", "scan_from", "selection"])
def test_a_recipe_with_what_a_comparison_would_ignore(saved_olmoe, tmp_path, key):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe)))
    setattr(recipe.kappatune, key, "something")
    with pytest.raises(KappaTuneError, match=f"kappatune.{key} is given"):
        bench_module.check_comparable(recipe)


def test_a_report_of_the_lowest_is_replaced_by_what_the_methods_rank_by(saved_olmoe, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype="float32")
    partial = replace(scan(base, progress=False), made_for={"k": 7, "order": "lowest", "rank_by": "kappa", "seed": 0})
    partial.save(tmp_path / "report.json")
    kappatune_block = {"k": 7, "report": str(tmp_path / "report.json")}
    recipe = load_recipe(
        write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, saved_olmoe, kappatune=kappatune_block))
    )
    found = full_report(recipe.kappatune, base, rank_by="snr")
    assert found.made_for is None and all("snr" in unit.scores for unit in found.units)
