"""Scans: every weight matrix once, with the numbers of its stored values, from memory and from a folder."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from helpers.tiny import CONFIGS, tiny_model
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning import measure as measure_module
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import select
from kappatune_plugin.weights.fingerprint import base_hash
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.units import find_units, unit_matrix


def quiet(model: nn.Module | str | Path, **settings) -> KappaReport:
    return scan(model, progress=False, **settings)


def kappa_of(matrix: torch.Tensor) -> float:
    """As a scan finds it, which gives each matrix one thread: with several, last digits may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return condition_number(matrix).value
    finally:
        torch.set_num_threads(threads)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 6, bias=False), nn.Conv1d(6, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_the_units_with_their_kappas(kind, dtype):
    model = tiny_model(kind, dtype)
    report = quiet(model, exclude=())
    units = find_units(model)
    assert [row.name for row in report.units] == [unit.name for unit in units]
    for row, unit in zip(report.units, units, strict=True):
        matrix = unit_matrix(model, unit)
        sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert row.shape == tuple(matrix.shape) and set(row.groups) == unit.groups
        assert row.lo <= sigma[0] / sigma[-1] <= row.hi
        assert row.kappa == kappa_of(matrix)
    # in transformers 5 the routers of DeepSeek stay in float32
    dtypes = {model.get_parameter(unit.parameter).dtype for unit in units}
    assert report.dtype == ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    assert report.base == {"name": type(model).__name__, "hash": base_hash(model)} and report.left_out == {}


def test_any_module_can_be_scanned():
    model = two_layers()
    report = quiet(model)
    assert [(row.name, row.shape) for row in report.units] == [
        ("0.weight", (20, 12)),
        ("2.weight", (6, 20)),
        ("3.weight", (4, 18)),
    ]
    assert report.base["name"] == "Sequential"


def test_scan_changes_nothing():
    model = tiny_model("olmoe", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    quiet(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_include_and_exclude():
    model = tiny_model("llama")
    report = quiet(model)
    assert report.left_out == {
        "model.embed_tokens.weight": "excluded by 'embedding'",
        "lm_head.weight": "excluded by 'head'",
    }
    only = quiet(model, include=["*.q_proj.weight"], exclude=["model.layers.0.*"])
    assert [row.name for row in only.units] == ["model.layers.1.self_attn.q_proj.weight"]
    assert len(only.left_out) + 1 == len(find_units(model))
    assert only.left_out["model.layers.0.self_attn.q_proj.weight"] == "excluded by 'model.layers.0.*'"
    # a pattern that meets only parameters which are never units is right too
    assert len(quiet(model, exclude=["*layernorm*"]).units) == len(find_units(model))


def test_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(KappaTuneError, match="qproj"):
        quiet(tiny_model("llama"), include=["*.qproj.weight"])


def test_bad_weights_are_rows_with_their_status():
    model = tiny_model("olmoe")
    expected = {row.name: row for row in quiet(model).units}
    layers, units = model.model.layers, {unit.name: unit for unit in find_units(model)}
    with torch.no_grad():
        layers[0].self_attn.q_proj.weight[3, 5] = torch.nan
        layers[0].self_attn.k_proj.weight.zero_()
        layers[1].self_attn.o_proj.weight[1] = layers[1].self_attn.o_proj.weight[0]
        unit_matrix(model, units["model.layers.1.mlp.experts.3.down_proj.weight"]).fill_(torch.inf)
    report = quiet(model)
    bad = {
        "model.layers.0.self_attn.q_proj.weight": "nonfinite",
        "model.layers.0.self_attn.k_proj.weight": "zero",
        "model.layers.1.self_attn.o_proj.weight": "rank_deficient",
        "model.layers.1.mlp.experts.3.down_proj.weight": "nonfinite",
    }
    assert {row.name: row.status for row in report.units if row.status != "ok"} == bad
    assert all(row == expected[row.name] for row in report.units if row.name not in bad)
    eligible = len(expected) - len(bad)
    assert not {unit.name for unit in select(report, k=eligible).units} & set(bad)


def test_report_survives_its_file(tmp_path):
    model = tiny_model("olmoe")
    model.model.layers[0].mlp.gate.weight.data.zero_()
    report = quiet(model)
    report.save(tmp_path / "report.json")
    assert KappaReport.load(tmp_path / "report.json") == report


def test_mixed_dtypes_are_named():
    model = two_layers()
    model[2].bfloat16()
    assert quiet(model).dtype == "bfloat16, float32"


def test_nothing_left_is_an_error_with_numbers():
    with pytest.raises(KappaTuneError, match="the model has 3"):
        quiet(two_layers(), exclude=["*.weight"])
    with pytest.raises(KappaTuneError, match="none of its 2 parameters"):
        quiet(nn.LayerNorm(8))


@pytest.mark.parametrize("kind", ["olmoe", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_is_scanned_as_the_model_in_it(tmp_path, kind, dtype):
    """In the dtype it was saved in, with the head it was saved with, and named without the path to it."""
    model = tiny_model(kind, dtype)
    model.save_pretrained(tmp_path / "tiny")
    from_folder, from_memory = quiet(tmp_path / "tiny", exclude=()), quiet(model, exclude=())
    assert from_folder.base == {"name": "tiny", "hash": from_memory.base["hash"]}
    assert from_folder.units == from_memory.units and from_folder.dtype == from_memory.dtype
    assert quiet(str(tmp_path / "tiny"), exclude=()) == from_folder


def test_classifier_keeps_its_head(tmp_path):
    config = tiny_model("llama").config
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    assert quiet(tmp_path, exclude=()).units == quiet(model, exclude=()).units


def test_folder_equals_the_loaded_model(saved_olmoe):
    assert quiet(saved_olmoe) == quiet(AutoModelForCausalLM.from_pretrained(saved_olmoe))


def test_checkpoint_that_names_no_architecture(saved_olmoe, tmp_path):
    shutil.copytree(saved_olmoe, tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    assert quiet(tmp_path / "tiny").units == quiet(saved_olmoe).units


def test_checkpoint_that_lacks_weights_is_an_error(tmp_path):
    model = tiny_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(KappaTuneError, match="lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj"):
        quiet(tmp_path)


def test_what_cannot_be_loaded_is_an_error(tmp_path, saved_olmoe):
    with pytest.raises(KappaTuneError, match="nowhere"):
        quiet(tmp_path / "nowhere")
    with pytest.raises(KappaTuneError, match="Can't load a model"):
        quiet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(KappaTuneError, match="no_such_type"):
        quiet(tmp_path)
    shutil.copytree(saved_olmoe, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(KappaTuneError, match="cut"):
        quiet(tmp_path / "cut")
    with pytest.raises(KappaTuneError, match="dict"):
        quiet({"model": 1})


@pytest.mark.parametrize("threads", [1, 3])
def test_report_does_not_depend_on_the_threads(threads):
    model = tiny_model("olmoe")
    expected, before = quiet(model), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert quiet(model) == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_error_in_a_thread_ends_the_scan(monkeypatch):
    def fail(source, unit):
        raise KappaTuneError(f"no {unit.name}")

    monkeypatch.setattr(ModelSource, "load", fail)
    with pytest.raises(KappaTuneError, match="no .*weight"):
        quiet(two_layers())


@pytest.mark.parametrize("kind", ["olmoe", "llama"])
def test_batches_of_a_gpu_give_the_same_report(kind, monkeypatch):
    """Here on the CPU: the same code."""
    model = tiny_model(kind, torch.bfloat16)
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    expected, sizes, batched = quiet(model, cache=False), [], measure_module.condition_numbers

    def counting(stack, *settings):
        sizes.append(len(stack))
        return batched(stack, *settings)

    monkeypatch.setattr(measure_module, "condition_numbers", counting)
    monkeypatch.setattr(
        measure_module,
        "_in_threads",
        lambda measurer, work, limit, keep: measure_module._in_batches(measurer, work, torch.device("cpu"), keep),
    )
    report = quiet(model)
    assert max(sizes) >= (16 if kind == "olmoe" else 4)
    assert [(row.name, row.status) for row in report.units] == [(row.name, row.status) for row in expected.units]
    for row, other in zip(report.units, expected.units, strict=True):
        assert row.kappa == other.kappa or row.kappa == pytest.approx(other.kappa, rel=1e-3)
    sizes.clear()
    assert quiet(model) == report and not sizes
    partial = quiet(model, k=5, cache=False)
    assert [unit.name for unit in select(partial, k=5).units] == [unit.name for unit in select(expected, k=5).units]
    monkeypatch.setattr(measure_module, "BATCH_BYTES", 1)
    sizes.clear()
    assert quiet(model, cache=False).units == report.units and max(sizes) == 1


def test_progress_bar_can_be_turned_off(capsys):
    scan(two_layers(), progress=True)
    assert "kappa of 3/3 matrices: 100%" in capsys.readouterr().err
    scan(two_layers(), progress=False)
    assert capsys.readouterr().err == ""
