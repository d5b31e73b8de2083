"""The PEFT method: its config, what it saves, and what it loads again."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import nn

from helpers.loops import logits, mixed_selection, steps
from helpers.reference import random_batches
from helpers.tiny import CONFIGS, MOE_KINDS, tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError, scan, select


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


def test_classifier_heads_are_saved_whole(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def model() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**CONFIGS["llama"][1], num_labels=3))

    peft_model = get_peft_model(model(), KappaTuneConfig(k=3, task_type="SEQ_CLS"))
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 4 and any("score.modules_to_save" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    tokens = random_batches(1)[0][0]
    peft_model.train()(input_ids=tokens, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    assert torch.equal(logits(loaded), logits(peft_model))
    expected = logits(peft_model)
    assert torch.equal(logits(peft_model.merge_and_unload()), expected)


def test_new_tokens_can_be_trained_beside_the_units():
    model = tiny_model("llama")
    before = model.model.embed_tokens.weight.detach().clone()
    peft_model = get_peft_model(model, KappaTuneConfig(k=3, trainable_token_indices={"embed_tokens": [60, 61]}))
    tokens = torch.tensor([[3, 60, 5, 61]])
    steps(peft_model, [[tokens]])
    after = peft_model.merge_and_unload().model.embed_tokens.weight
    assert set((after != before).any(1).nonzero().flatten().tolist()) == {60, 61}
