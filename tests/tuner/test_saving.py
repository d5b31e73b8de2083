"""The PEFT method: its config, what it saves, and what it loads again."""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file

from helpers.loops import TOKENS, logits, mixed_selection, steps, train, trainable
from helpers.reference import random_batches
from helpers.tiny import MOE_KINDS, tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError, scan, select
from kappatune_plugin.weights import fingerprint
from kappatune_plugin.weights.units import find_units


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", MOE_KINDS)
def test_saved_adapter_reproduces_the_logits(kind, low_cpu_mem_usage, tmp_path):
    model = tiny_model(kind, torch.bfloat16)
    peft_model = get_peft_model(model, KappaTuneConfig(k=7))
    steps(peft_model, random_batches(3))
    peft_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    values = {name: tensor for name, tensor in saved.items() if name.endswith("kappatune_values.weight")}
    assert len(values) == 7 and all(tensor.dtype == torch.float32 for tensor in values.values())
    loaded = PeftModel.from_pretrained(tiny_model(kind, torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(peft_model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model(kind, torch.bfloat16)))
    assert torch.equal(logits(loaded), logits(peft_model))


def test_adapter_config_carries_the_selection(tmp_path):
    peft_model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k="10%"))
    peft_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "KAPPATUNE" and saved["k"] == "10%"
    assert saved["selection"] == peft_model.base_model.selections["default"].to_dict()
    assert len(saved["selection"]["units"]) == 5 and saved["selection"]["base"]["hash"]


def test_a_folder_says_which_package_reads_it(tmp_path):
    """Without the package PEFT says only KeyError: 'KAPPATUNE'; the folder is where one looks next."""
    get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=2)).save_pretrained(tmp_path)
    assert "kappatune_plugin" in json.loads((tmp_path / "adapter_config.json").read_text())["read_by"]
    assert PeftModel.from_pretrained(tiny_model("olmoe"), tmp_path).peft_config["default"].peft_type == "KAPPATUNE"


def test_loading_on_another_base_is_an_error(tmp_path):
    get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5)).save_pretrained(tmp_path)
    with pytest.raises(KappaTuneError, match="fingerprint"):
        PeftModel.from_pretrained(tiny_model("olmoe", seed=1), tmp_path)
    with pytest.raises(KappaTuneError, match="fingerprint"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_loading_values_into_a_run_on_another_base_is_an_error(tmp_path):
    """What Trainer does on resume: the adapter exists already, its config isn't read."""
    selection = mixed_selection(tiny_model("olmoe"))
    get_peft_model(tiny_model("olmoe"), KappaTuneConfig(selection=selection.to_dict())).save_pretrained(tmp_path)
    other = tiny_model("olmoe", seed=1)
    same_names = {**selection.to_dict(), "base": scan(other, progress=False).base}
    running = get_peft_model(other, KappaTuneConfig(selection=same_names))
    with pytest.raises(KappaTuneError, match="another base model"):
        running.load_adapter(str(tmp_path), "default", is_trainable=True)


@pytest.mark.parametrize(("order", "k"), [("highest", 5), ("lowest", 4), ("lowest", 6)])
def test_loading_another_selection_is_an_error(order, k, tmp_path):
    get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=5)).save_pretrained(tmp_path)
    running = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=k, order=order))
    with pytest.raises(KappaTuneError, match="another selection"):
        running.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_merged_checkpoint_loads_without_this_package(tmp_path):
    peft_model = get_peft_model(tiny_model("mixtral", torch.bfloat16), KappaTuneConfig(k=9))
    steps(peft_model, random_batches(2))
    trained = logits(peft_model)
    peft_model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
    plain = type(tiny_model("mixtral")).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert torch.equal(logits(plain), trained)


def test_registered_once_and_found_by_name(tmp_path):
    import importlib

    from kappatune_plugin.tuner import register

    importlib.reload(register)
    assert PeftType("KAPPATUNE") is PeftType.KAPPATUNE and list(PeftType).count(PeftType.KAPPATUNE) == 1
    assert PeftType.KAPPATUNE == "KAPPATUNE" and json.dumps(PeftType.KAPPATUNE) == '"KAPPATUNE"'
    assert copy.deepcopy(PeftType.KAPPATUNE) is PeftType.KAPPATUNE


def test_config_names_all_problems_at_once():
    with pytest.raises(KappaTuneError) as error:
        KappaTuneConfig(k=0, order="lowset", rank_by="kapa", exclude="norm", seed=-1, rtol=2)
    for word in ("k", "lowset", "kapa", "exclude", "seed", "rtol"):
        assert word in str(error.value)


def test_config_can_be_used_for_two_models():
    config = KappaTuneConfig(k=3)
    for seed in (0, 1):
        get_peft_model(tiny_model("llama", seed=seed), config)
    assert config.selection is None and config.k == 3


def test_report_of_another_base_is_refused(tmp_path):
    report = scan(tiny_model("llama", seed=1), progress=False)
    report.save(tmp_path / "kappa_report.json")
    with pytest.raises(KappaTuneError, match="fingerprint"):
        get_peft_model(tiny_model("llama"), KappaTuneConfig(k=3, report=str(tmp_path / "kappa_report.json")))


def test_report_made_earlier_is_used(tmp_path):
    report = scan(tiny_model("llama"), progress=False)
    report.save(tmp_path / "kappa_report.json")
    peft_model = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=3, report=str(tmp_path / "kappa_report.json")))
    expected = [row.name for row in select(report, k=3).units]
    assert [row.name for row in peft_model.base_model.selections["default"].units] == expected


def test_a_whole_model_is_pickled(tmp_path):
    model = get_peft_model(tiny_model("olmoe"), KappaTuneConfig(k=6))
    train(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert train(loaded) == train(model)


def test_the_base_is_walked_for_its_fingerprint_once(monkeypatch):
    calls, real = [], fingerprint._samples_over_ranks
    monkeypatch.setattr(fingerprint, "_samples_over_ranks", lambda units: calls.append(len(units)) or real(units))
    get_peft_model(tiny_model("llama"), KappaTuneConfig(k=4))
    # the units, and the first rows of embedding and head; then one call for each matrix that is trained
    assert calls == [len(find_units(tiny_model("llama"))) + 2, 1, 1, 1, 1]


def test_what_diverged_is_saved_as_it_is_and_said(tmp_path):
    model = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=4))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    broken = model.base_model.layers()[1]
    broken.active.weight.grad.fill_(torch.nan)
    optimizer.step()
    with pytest.warns(UserWarning, match=f"1 of 4 trained matrices.*{broken.unit.name}"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert [layer.active.weight.isnan().all() for layer in loaded.base_model.layers()] == [False, True, False, False]


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_an_adapter_of_separate_experts_loads_on_fused_ones_and_back(kind, tmp_path):
    """transformers 4 has experts as modules, 5 has them fused: the keys of an adapter differ in the same way."""
    model = get_peft_model(tiny_model(kind), KappaTuneConfig(k=20, include=["*experts*"]))
    train(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    fused = re.compile(r"experts\.kappatuned_(\d+)_(\w+?)\.")
    separate = re.compile(r"experts\.(\d+)\.(\w+?)\.kappatuned_weight\.")
    separated = {fused.sub(r"experts.\1.\2.kappatuned_weight.", key): value for key, value in saved.items()}
    # Mixtral's experts moved to a module of another name too
    separated = {key.replace(".mlp.experts", ".block_sparse_moe.experts"): value for key, value in separated.items()}
    back = {separate.sub(r"experts.kappatuned_\1_\2.", key): value for key, value in separated.items()}
    # what transformers 4 wrote with earlier versions of this package
    before = {
        re.sub(r"kappatuned_(\w+)\.kappatune_values\.(weight|base)$", old_name, key): value
        for key, value in separated.items()
    }
    assert set(separated).isdisjoint(back)
    for keys in (separated, back, before):
        save_file(keys, path, metadata={"format": "pt"})
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(kind), tmp_path)), logits(model))


def old_name(key: re.Match[str]) -> str:
    return f"kappatune_{key[1]}.kappatune_{'master' if key[2] == 'weight' else 'base'}"
