"""Methods with text mixed in beside methods without: the same task's loss, batches of their own."""

import pytest
import torch
from tqdm import tqdm

import kappatune_plugin.study.compare as compare_module
from helpers.recipes import tiny_recipe, write_recipe
from kappatune_plugin import KappaTuneError
from kappatune_plugin.data.replay import ReplayConfig
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.compare import compare
from kappatune_plugin.study.methods import parse_methods
from kappatune_plugin.study.settings import Settings
from kappatune_plugin.study.store import RunStore
from kappatune_plugin.study.training import train_run

METHODS = parse_methods("lowest,lowest:replay=0.25,lora:r=2:replay=0.25,full:replay=0.5")
SETTINGS = Settings(seeds=(0,), learning_rates=(1e-2,), every=3, smooth=2)


def load(folder, model, replay=None, **changes) -> Bench:
    recipe = tiny_recipe(folder, model, **{"max_steps": 6, **changes})
    if replay:
        recipe["data"]["replay"] = replay
    return Bench.load(write_recipe(folder / "recipe.yaml", recipe), validation=0.25)


@pytest.fixture(scope="module")
def bench(saved_olmoe, tmp_path_factory) -> Bench:
    return load(tmp_path_factory.mktemp("bench"), saved_olmoe)


def test_names_with_replay():
    assert [method.replay for method in METHODS] == [None, 0.25, 0.25, 0.5]
    assert METHODS[2].settings == {"r": 2} and METHODS[3].settings == {}
    for name in ("full:replay=1", "lowest:replay=-0.1", "lora:replay=much"):
        with pytest.raises(KappaTuneError, match="takes a share of the rows, from 0 to below 1"):
            parse_methods(name)


def test_whose_rows_hold_text(bench, saved_olmoe, tmp_path):
    plain, quarter, _, half = (bench.replay(method) for method in METHODS)
    assert plain is None and quarter == ReplayConfig(share=0.25) and half == ReplayConfig(share=0.5)
    of_recipe = load(tmp_path, saved_olmoe, replay={"share": 0.4, "max_length": 9, "seed": 2})
    methods = parse_methods("lowest,lowest:replay=0,lora:replay=0.1")
    assert [of_recipe.replay(each) for each in methods] == [
        ReplayConfig(share=0.4, max_length=9, seed=2),
        None,
        ReplayConfig(share=0.1, max_length=9, seed=2),
    ]
    rows, texts = of_recipe.replayed(of_recipe.replay(methods[0]))
    assert (len(rows), len(texts), len(of_recipe.train)) == (20, 8, 12)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_the_tasks_alone(saved_olmoe, tmp_path, accumulation):
    """At a learning rate of nothing each step's loss is the base's on that batch: all rows are in each."""
    size = {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    bench = load(tmp_path, saved_olmoe, max_steps=2, router_aux_loss_coef=0.0, **size)
    nats, tokens = 0.0, 0
    model = bench.base.eval()
    for row in bench.train:
        with torch.no_grad():
            found = -model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                nats, tokens = nats + found[place - 1, label].item(), tokens + 1
    for method in METHODS:
        run = train_run(bench, method, 1e-30, 0, every=2)
        assert run["losses"] == pytest.approx([nats / tokens] * 2, rel=1e-5), method.name


def test_what_the_loss_has_beside_stays(saved_olmoe, tmp_path):
    """The balancing of experts is in both, or two methods would not be compared at the same loss."""
    bench = load(tmp_path, saved_olmoe, max_steps=1, per_device_train_batch_size=32, router_aux_loss_coef=0.1)
    plain, mixed = (train_run(bench, method, 1e-30, 0, every=1)["losses"][0] for method in METHODS[:2])
    # the balance of other batches is another, and near 2 of 2 experts a token
    assert mixed == pytest.approx(plain, abs=0.02)


@pytest.mark.slow
def test_batches_are_compared_among_those_with_the_same_text(bench, tmp_path, monkeypatch):
    content = compare(bench, METHODS, SETTINGS, tmp_path / "compared")
    assert [method["name"] for method in content["methods"]] == [method.name for method in METHODS]
    orders = [train_run(bench, method, 1e-2, 0, every=6)["order"] for method in METHODS]
    assert orders[1] == orders[2] and len({tuple(order) for order in orders}) == 3
    runs = iter(range(100))

    def elsewhere(*args, **kwargs):
        return {**train_run(*args, **kwargs), "order": [f"{next(runs)}"]}

    monkeypatch.setattr(compare_module, "train_run", elsewhere)
    with pytest.raises(KappaTuneError, match="same batches"):
        compare(bench, METHODS[1:3], SETTINGS, tmp_path / "others")


def test_the_held_out_rows_are_the_tasks_alone(bench):
    assert len(bench.validation) == 4
    plain, mixed = (train_run(bench, method, 1e-30, 0, every=6)["validation_loss"] for method in METHODS[:2])
    assert plain == pytest.approx(mixed, rel=1e-5)


def test_runs_of_earlier_versions_are_still_taken(bench, tmp_path, monkeypatch):
    """Their identity names no replay."""
    asked = []
    monkeypatch.setattr(RunStore, "get", lambda self, title, identity, make: asked.append(identity))
    runner = compare_module._Runner(bench, SETTINGS, RunStore(tmp_path), tqdm(disable=True))
    for method in METHODS[:2]:
        runner._run(method, 1e-2, 0)
    assert "replay" not in asked[0]["method"] and asked[1]["method"]["replay"] == 0.25
