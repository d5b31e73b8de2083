"""`k: auto`: the rule on made-up curves, and runs that grow, go back and resume."""

import json
import math
import shutil
from fractions import Fraction

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.recipes import tiny_recipe, write_recipe
from helpers.training import unit_values
from kappatune_plugin import KappaTuneError, Selection
from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft
from kappatune_plugin.selection.auto_budget import AutoBudget, decide, levels, mean_loss, prefix_count
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.selection import SelectedUnit

SETTINGS = AutoBudget(window=10, min_improvement=0.1, target_loss=0.5)
FALLING = [(step, 3.0 - 0.05 * step) for step in range(1, 41)]
FLAT = [(step, 1.0 + 0.01 * (-1) ** step) for step in range(1, 41)]
LEARNED = [(step, 0.4) for step in range(1, 41)]


@pytest.mark.parametrize(
    ("losses", "since", "rise", "can_grow", "action", "words"),
    [
        (FALLING, 0, 0.0, True, "keep", "still falls: 1.725 to 1.225"),
        (
            FLAT,
            0,
            0.04,
            True,
            "grow",
            "stays at 1.000 (1.000 in the 10 steps before), and the control loss rose by 0.040",
        ),
        (FLAT, 0, 0.05, True, "grow", "rose by 0.050"),
        (FLAT, 0, 0.051, True, "stop", "rose by 0.051 nats, more than max_delta 0.05"),
        (FALLING, 0, 0.051, True, "stop", "more than max_delta"),
        (FLAT, 0, 0.0, False, "keep", "the budget grows no more"),
        (LEARNED, 0, 0.0, True, "keep", "0.400 has reached target_loss 0.5"),
        # a plateau shows after two windows at the same budget
        (FLAT[:19], 0, 0.0, True, "keep", "fewer than 20 steps"),
        (FLAT[:20], 0, 0.0, True, "grow", "stays"),
        (FLAT, 21, 0.0, True, "keep", "fewer than 20 steps"),
        (FLAT, 20, 0.0, True, "grow", "stays"),
        # logged every 10 steps, one loss a window
        (FLAT[9::10], 0, 0.0, True, "grow", "stays"),
        ([], 0, 0.0, True, "keep", "fewer than 20 steps"),
        ([], 0, 1.0, True, "stop", "more than max_delta"),
        (FALLING, 0, math.inf, True, "stop", "rose by inf nats"),
    ],
)
def test_the_rule(losses, since, rise, can_grow, action, words):
    decision = decide(SETTINGS, losses, since, rise, 0.05, can_grow)
    assert decision.action == action and words in decision.reason


def test_shrinks_if_there_is_a_smaller_budget_to_go_back_to():
    assert decide(SETTINGS, FLAT, 0, 0.1, 0.05, True, can_shrink=True).action == "shrink"
    assert decide(SETTINGS, FLAT, 0, 0.01, 0.05, True, can_shrink=True).action == "grow"


def test_a_plateau_is_a_fall_by_less_than_min_improvement():
    for fall, action in ((0.099, "grow"), (0.101, "keep")):
        losses = [(step, 1.0 if step <= 10 else 1.0 - fall) for step in range(1, 21)]
        assert decide(SETTINGS, losses, 0, 0.0, 0.05, True).action == action
    assert mean_loss([(1, 2.0), (2, 4.0), (3, 9.0)], 0, 2) == 3.0 and mean_loss([(1, 2.0)], 1, 5) is None


def test_levels_multiply_up_to_the_most():
    assert levels(3, 20, 2) == [3, 6, 12, 20]
    assert levels(5, 5, 2) == [5]
    assert levels(1, 4, 1.1) == [1, 2, 3, 4]
    with pytest.raises(KappaTuneError, match="start is 6 matrices and most is 5"):
        levels(6, 5, 2)


def test_budgets_count_from_the_front():
    units = [SelectedUnit(f"u{i}", (2, 5), i + 1.0) for i in range(8)]
    for budget, count in ((3, 3), ("25%", 5), ({"params": 25}, 2), ({"kappa": 4}, 4), ({"params": 1}, 1), ("1%", 1)):
        assert prefix_count(units, parse_budget(budget), eligible=20) == count, budget
    assert parse_budget("25%").value == Fraction(1, 4)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"start": 0, "growth": 1}, ["auto.start: 0 would", "auto.growth: 1 is not a number above 1"]),
        ({"most": "lots"}, ["auto.most: 'lots'"]),
        ({"window": 0, "target_loss": -1}, ["window: 0", "target_loss: -1"]),
        ({"min_improvement": 1}, ["min_improvement: 1"]),
        ({"grow": 2}, ["unknown key 'kappatune.auto.grow'. Did you mean 'growth'?", "start, most"]),
        (3, ["expected a mapping of start, most"]),
    ],
)
def test_blocks_that_cannot_be_right(saved_olmoe, tmp_path, block, words):
    recipe = tiny_recipe(tmp_path, saved_olmoe, kappatune={"k": "auto", "auto": block})
    with pytest.raises(KappaTuneError) as error:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    for word in words:
        assert word in str(error.value)


def train(folder, model, *overrides, auto=None, max_delta=9.0, **changes):
    kappatune = {"k": "auto", "auto": {"start": 4, "most": 20, "window": 2, "min_improvement": 0.5, **(auto or {})}}
    recipe = tiny_recipe(folder, model, kappatune=kappatune, **changes)
    recipe["forgetting"] |= {"every": 5, "max_delta": max_delta}
    recipe |= {"max_steps": 14, "lr_scheduler_type": "constant", **changes}
    return run_sft(load_recipe(write_recipe(folder / "recipe.yaml", recipe), overrides))


def base(folder) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_grows_where_the_loss_stays(saved_olmoe, tmp_path, capsys):
    result = train(tmp_path, saved_olmoe)
    budget = json.loads((tmp_path / "out" / "forgetting.json").read_text())["budget"]
    assert (budget["start"], budget["most"], budget["matrices"]) == (4, 20, 16)
    assert [(step["step"], step["action"], step["matrices"]) for step in budget["steps"]] == [
        (5, "grow", 8),
        (10, "grow", 16),
    ]
    out, lowest = tmp_path / "out", sorted(result.trainer.model.base_model.reports["default"].units, key=kappa)[:16]
    selection = Selection.load(out / "selection.json")
    assert [unit.name for unit in selection.units] == [unit.name for unit in lowest] and selection.k == 16
    assert sum(name.endswith(".weight") for name in load_file(out / "adapter_model.safetensors")) == 16
    # the adapter is the run: loaded anew it gives the trained model, and only what was trained differs from the base
    before, after = unit_values(base(saved_olmoe)), unit_values(PeftModel.from_pretrained(base(saved_olmoe), str(out)))
    trained = unit_values(result.trainer.model)
    assert {name.removeprefix("base_model.model.") for name in after} == set(before)
    for name, value in after.items():
        assert torch.equal(value, trained[name])
        short = name.removeprefix("base_model.model.")
        assert torch.equal(value, before[short]) == (short not in {unit.name for unit in selection.units}), name
    shown = capsys.readouterr().out
    for words in ("k: auto starts with 4 of these 20 matrices", "Step 5, grow: the training loss stays", "16 matrices"):
        assert words in shown, words


def kappa(unit):
    return unit.kappa


def test_what_rests_has_no_optimizer_state(saved_olmoe, tmp_path):
    result = train(tmp_path, saved_olmoe, auto={"min_improvement": 0.0, "target_loss": 99.0})
    optimizer = result.trainer.optimizer
    assert json.loads((tmp_path / "out" / "forgetting.json").read_text())["budget"]["steps"] == []
    assert len(result.selection.units) == 4
    parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    assert parameters == 20 and sum(bool(state) for state in optimizer.state.values()) == 4


def test_a_fixed_k_of_the_starts_size_trains_the_same(saved_olmoe, tmp_path):
    (tmp_path / "fixed").mkdir()
    train(tmp_path, saved_olmoe, auto={"target_loss": 99.0})
    fixed = tiny_recipe(tmp_path / "fixed", saved_olmoe, kappatune={"k": 4}, max_steps=14, lr_scheduler_type="constant")
    run_sft(load_recipe(write_recipe(tmp_path / "fixed" / "recipe.yaml", fixed)))
    one, other = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "fixed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_goes_back_to_the_last_values_within_the_limit(saved_olmoe, tmp_path, capsys):
    free = train(tmp_path, saved_olmoe)
    rises = [free.forgetting.delta(step) for step in free.forgetting.steps]
    assert 0 < rises[0] < rises[1]
    # between the measurements at steps 5 and 10
    limit = sum(rises) / 2
    out = tmp_path / "limited"
    result = train(tmp_path, saved_olmoe, "--output_dir", str(out), "--max_steps", "12", max_delta=limit)
    measured = json.loads((out / "forgetting.json").read_text())
    assert [(step["step"], step["action"], step["matrices"]) for step in measured["budget"]["steps"]][:2] == [
        (5, "grow", 8),
        (10, "shrink", 4),
    ]
    optimizer = result.trainer.optimizer
    assert len(result.selection.units) == 4 and sum(bool(state) for state in optimizer.state.values()) == 4
    (control,) = measured["control"].values()
    assert 0 < control["loss_after"] - control["loss_before"] <= limit
    reloaded = unit_values(PeftModel.from_pretrained(base(saved_olmoe), str(out)))
    trained = unit_values(result.trainer.model)
    assert all(torch.equal(value, trained[name]) for name, value in reloaded.items())
    assert "Step 10, shrink: the control loss rose" in capsys.readouterr().out


def test_stops_with_the_values_of_the_last_measurement_within(saved_olmoe, tmp_path):
    fixed = {"target_loss": 99.0}
    free = train(tmp_path, saved_olmoe, auto=fixed)
    rises = [free.forgetting.delta(step) for step in free.forgetting.steps]
    result = train(tmp_path, saved_olmoe, "--output_dir", str(tmp_path / "o"), auto=fixed, max_delta=sum(rises) / 2)
    assert [(step["step"], step["action"]) for step in result.forgetting.budget["steps"]] == [(10, "stop")]
    assert result.trainer.state.global_step == 10
    assert result.forgetting.after["control_loss"] == pytest.approx(free.forgetting.steps[0]["control_loss"], abs=1e-6)


def test_a_limit_passed_at_the_end_or_at_once_is_kept_too(saved_olmoe, tmp_path):
    result = train(tmp_path, saved_olmoe, "--forgetting.every", "13", max_delta=1e-6)
    assert [step["action"] for step in result.forgetting.budget["steps"]] == ["stop"]
    # nothing was measured within the limit but the base itself
    assert result.forgetting.delta(result.forgetting.after) == 0
    more = ["--forgetting.every", "99", "--overwrite_output_dir"]
    again = train(tmp_path, saved_olmoe, *more, max_delta=1e-6)
    assert again.trainer.state.global_step == 14
    assert [(step["step"], step["action"]) for step in again.forgetting.budget["steps"]] == [(14, "stop")]
    assert again.forgetting.delta(again.forgetting.after) == 0


@pytest.mark.parametrize(("save_steps", "max_delta", "matrices"), [(9, 9.0, 16), (11, 0.04, 4)])
def test_resumed_equals_uninterrupted(saved_olmoe, tmp_path, save_steps, max_delta, matrices):
    """After it grew, and after it shrank."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    settings = {"save_strategy": "steps", "save_steps": save_steps, "max_delta": max_delta}
    train(whole, saved_olmoe, **settings)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "out" / "checkpoint-14")
    train(parts, saved_olmoe, "--resume_from_checkpoint", "true", **settings)
    one, other = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    budgets = [json.loads((each / "out" / "forgetting.json").read_text())["budget"] for each in (whole, parts)]
    assert budgets[0] == budgets[1] and budgets[0]["matrices"] == matrices


def test_several_processes_are_refused(saved_olmoe, tmp_path, monkeypatch):
    from trl import SFTConfig

    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))
    with pytest.raises(KappaTuneError, match="k: auto runs in one process"):
        train(tmp_path, saved_olmoe)


def test_tokens_trained_beside_are_refused(saved_olmoe, tmp_path):
    kappatune = {"k": "auto", "auto": {"start": 4, "most": 20}}
    recipe = tiny_recipe(tmp_path, saved_olmoe, kappatune=kappatune)
    recipe["forgetting"] |= {"max_delta": 9.0}
    loaded = load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe))
    # as TRL sets it where a chat template brings new tokens
    loaded.kappatune.trainable_token_indices = [5]
    with pytest.raises(KappaTuneError, match="tokens that TRL adds"):
        run_sft(loaded)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--forgetting.every", "0"], ["needs forgetting.every", "`every: 50`"]),
        (["--forgetting", "{control: self}"], ["needs forgetting.every", "needs forgetting.max_delta"]),
        (["--kappatune.k", "7"], ["kappatune.auto is given, but k is 7"]),
        (["--kappatune.auto.start", "0"], ["kappatune.auto.start: 0 would"]),
        (["--kappatune.modules_to_save", "[lm_head]"], ["modules_to_save", "can't take back"]),
        (["--logging_steps", "5"], ["within 2 steps no training loss is logged", "logging_steps 5"]),
    ],
)
def test_recipes_that_lack_something(saved_olmoe, tmp_path, overrides, words):
    with pytest.raises(KappaTuneError) as error:
        train(tmp_path, saved_olmoe, *overrides)
    for word in words:
        assert word in str(error.value)
