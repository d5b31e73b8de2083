"""A selection said to stock toolkits: what their own rules choose is exactly what was planned."""

import re

import pytest
import yaml
from torch import nn
from trl import ModelConfig, get_peft_config

from helpers.command import kappatune
from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneError, Selection, scan, select
from kappatune_plugin.toolkits.plan import Plan, lora_places, plan, stock_plan
from kappatune_plugin.weights.units import find_units

KINDS = ("llama", "gpt2", "olmoe", "mixtral", "gpt_oss", "deepseek_v2")


def made(kind: str, toolkit: str, widen: bool = False) -> tuple[Plan, Selection, nn.Module]:
    model = tiny_model(kind)
    selection = select(scan(model, progress=False), k="40%", order="random", seed=3)
    return stock_plan(selection, lambda: tiny_model(kind), toolkit, widen), selection, model


def wanted(selection: Selection, model: nn.Module, widen: bool = False) -> set[str]:
    units = {unit.name: unit for unit in find_units(model)}
    chosen = [units[row.name] for row in selection.units]
    return {unit.parameter for unit in chosen if widen or not unit.index}


def axolotl_chooses(patterns: list[str], model: nn.Module) -> set[str]:
    """As Axolotl documents it: matched from the beginning, periods literal, a range behind that is no part of it."""
    names = [re.sub(r"\[\d+\]$", "", pattern).replace(".", r"\.") for pattern in patterns]
    return {name for name, _ in model.named_parameters() if any(re.match(each, name) for each in names)}


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_axolotl_patterns_match_the_planned_parameters(kind, widen):
    plan, selection, model = made(kind, "axolotl", widen)
    patterns = yaml.safe_load("\n".join(plan.lines))["unfrozen_parameters"]
    assert axolotl_chooses(patterns, model) == wanted(selection, model, widen) == set(plan.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_ms_swifts_expression_is_found_in_the_planned_parameters(kind):
    plan, selection, model = made(kind, "ms-swift")
    expression = re.search(r"--trainable_parameters_regex '(.*)'", "\n".join(plan.lines))[1]
    found = {name for name, _ in model.named_parameters() if re.search(expression, name)}
    assert found == wanted(selection, model) == set(plan.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_llamafactorys_targets_are_the_planned_modules(kind):
    plan, selection, model = made(kind, "llamafactory")
    targets = yaml.safe_load("\n".join(plan.lines))["lora_target"].split(",")
    assert lora_places(tiny_model(kind), targets, []) == set(plan.parameters)
    left = {unit.parameter for unit in find_units(model) if unit.name in plan.missing and not unit.index}
    assert set(plan.parameters) | left == wanted(selection, model)
    # what is left out of mixtures of experts depends on how PEFT rewrites names for transformers 5
    assert not left or kind not in ("llama", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_trls_targets_are_the_planned_modules_and_whole_parameters(kind):
    plan, selection, model = made(kind, "trl", widen=True)
    says = yaml.safe_load("\n".join(plan.lines))
    config = get_peft_config(ModelConfig(**says))
    named = says.get("lora_target_parameters") or []
    # TRL 0.24 has the key and ignores it
    assert config.target_parameters is None or sorted(config.target_parameters) == sorted(named)
    assert lora_places(tiny_model(kind), config.target_modules, named) == set(plan.parameters)
    left = {unit.parameter for unit in find_units(model) if unit.name in plan.missing}
    assert set(plan.parameters) | left == wanted(selection, model, widen=True)
    assert bool(named) == (config.lora_dropout == 0.0) == any("ignores it" in note for note in plan.notes)


def test_one_module_stays_a_path_in_trl():
    model = tiny_model("olmoe")
    report = scan(model, include=["model.layers.1.self_attn.q_proj.weight"], progress=False)
    says = yaml.safe_load("\n".join(stock_plan(select(report, k=1), lambda: tiny_model("olmoe"), "trl").lines))
    config = get_peft_config(ModelConfig(**says))
    assert lora_places(model, config.target_modules, []) == {"model.layers.1.self_attn.q_proj.weight"}


def test_slices_that_stock_tools_cannot_say_are_named():
    plan, selection, model = made("gpt_oss", "trl")
    units = {unit.name: unit for unit in find_units(model)}
    slices = [row.name for row in selection.units if units[row.name].index]
    assert slices and plan.missing == slices
    assert f"{len(slices)} of {len(selection.units)} selected matrices are left out" in plan.notes[-1]
    assert f"{len(slices)} are single experts'" in plan.notes[-1]
    assert "--widen" in plan.notes[-1]


def test_axolotls_ranges_name_the_experts():
    plan, selection, model = made("gpt_oss", "axolotl", widen=True)
    units = {unit.name: unit for unit in find_units(model)}
    expected = {
        (units[row.name].parameter, units[row.name].index[0]) for row in selection.units if units[row.name].index
    }
    ranges = [re.fullmatch(r"  - '\^(.+)\$\[(\d+)\]'", line) for line in plan.lines]
    assert {(each[1], int(each[2])) for each in ranges if each} == expected
    assert any("weight_decay: 0.0" in note for note in plan.notes)


def test_widening_in_vain_is_said():
    plan, _, _ = made("llama", "llamafactory", widen=True)
    assert any("--widen changes nothing for llamafactory" in note for note in plan.notes)
    assert not any("--widen" in note for note in made("llama", "trl", widen=True)[0].notes)


def test_nothing_that_can_be_said_is_an_error():
    model = tiny_model("gpt_oss")
    report = scan(model, include=["*.experts.*"], progress=False)
    for toolkit in ("trl", "llamafactory"):
        with pytest.raises(KappaTuneError, match="can choose none of the 5"):
            stock_plan(select(report, k=5), lambda: tiny_model("gpt_oss"), toolkit)


@pytest.mark.parametrize(("toolkit", "words"), [("torchtune", "none of axolotl"), ("nemo", "none of")])
def test_toolkits_that_cannot_be_planned_for(toolkit, words):
    with pytest.raises(KappaTuneError, match=words):
        plan("nowhere", toolkit)


def test_the_command(saved_olmoe, tmp_path):
    options = ["--include", "*self_attn*", "--output", tmp_path / "report.json"]
    kappatune("scan", saved_olmoe, *options)
    code, out, _ = kappatune("plan", saved_olmoe, "--k", 3, "--for", "axolotl", "--report", tmp_path / "report.json")
    says = yaml.safe_load(out)
    names = [pattern[1:-1] for pattern in says["unfrozen_parameters"]]
    assert code == 0 and len(names) == 3 and all("self_attn" in name for name in names)
    code, _, errors = kappatune("plan", saved_olmoe, "--for", "torchtune")
    assert code == 2 and "torchtune" in errors


def test_a_report_of_another_model_is_refused():
    report = scan(tiny_model("llama"), progress=False)
    with pytest.raises(KappaTuneError, match="is of another model"):
        stock_plan(select(report, k=3), lambda: tiny_model("llama", hidden_size=64), "axolotl")


def test_a_report_of_another_base_with_the_same_names_is_refused(saved_olmoe, tmp_path):
    report = scan(tiny_model("olmoe", vocab_size=300, seed=5), progress=False)
    with pytest.raises(KappaTuneError, match="and the fingerprint of"):
        plan(str(saved_olmoe), "axolotl", 3, report)
