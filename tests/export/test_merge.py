"""Merged checkpoints of every class that can be trained load without this package and compute what was trained."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers.loops import TOKENS, train
from helpers.tiny import CONFIGS, QWEN_VL, SHAPE, tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.export.merge import merge_adapter

LM = {"input_ids": TOKENS, "labels": TOKENS}
ENCODER = {**SHAPE, "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5["decoder_start_token_id"] = 0
BARTISH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BARTISH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
LLAMA = CONFIGS["llama"][1]
CLASSES = torch.arange(len(TOKENS)) % 3
PIXELS = torch.randn(len(TOKENS), 3, 8, 8, generator=torch.Generator().manual_seed(0))
VIT = {**ENCODER, "image_size": 8, "patch_size": 4}
VIT.pop("vocab_size")


@dataclass
class Case:
    """What is trained: a base class and its config, the class trained on it, and a batch."""

    base: str
    config: str
    settings: dict[str, Any]
    trained: str = ""
    task: str | None = None
    batch: dict[str, Tensor] = field(default_factory=lambda: LM)
    loading: dict[str, Any] = field(default_factory=dict)


NEW_HEAD = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
SEQUENCES = {"input_ids": TOKENS, "labels": CLASSES}
REWARDS = {"input_ids": TOKENS, "labels": CLASSES.float()}
SPANS = {"input_ids": TOKENS, "start_positions": CLASSES, "end_positions": CLASSES + 1}
CASES = {
    "causal": Case("LlamaForCausalLM", "LlamaConfig", LLAMA, task="CAUSAL_LM"),
    "sequence to sequence": Case("T5ForConditionalGeneration", "T5Config", T5, task="SEQ_2_SEQ_LM"),
    "sequence to sequence, no task": Case("BartForConditionalGeneration", "BartConfig", BARTISH),
    "vision and language": Case("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN_VL, task="CAUSAL_LM"),
    "masked LM": Case("BertForMaskedLM", "BertConfig", ENCODER),
    "classifier that was finished": Case(
        "BertForSequenceClassification", "BertConfig", ENCODER | NEW_HEAD, task="SEQ_CLS", batch=SEQUENCES
    ),
    "classifier, new": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        SEQUENCES,
        NEW_HEAD | {"pad_token_id": 0},
    ),
    "classifier of two layers, new": Case(
        "RobertaForMaskedLM",
        "RobertaConfig",
        ENCODER,
        "RobertaForSequenceClassification",
        "SEQ_CLS",
        SEQUENCES,
        NEW_HEAD,
    ),
    "reward model": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        REWARDS,
        {"num_labels": 1},
    ),
    "tokens": Case(
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        "BertForTokenClassification",
        "TOKEN_CLS",
        {"input_ids": TOKENS, "labels": TOKENS % 3},
        NEW_HEAD,
    ),
    "answers": Case("BertForMaskedLM", "BertConfig", ENCODER, "BertForQuestionAnswering", "QUESTION_ANS", SPANS),
    "images": Case(
        "ViTForImageClassification",
        "ViTConfig",
        VIT | NEW_HEAD,
        batch={"pixel_values": PIXELS, "labels": CLASSES},
    ),
}


def trained_adapter(case: Case, config: Any, folder: Path) -> tuple[nn.Module, Path]:
    """The trained model, and the folder of its adapter; its base lies beside."""
    torch.manual_seed(0)
    settings = getattr(transformers, case.config)(**{**({} if case.config == "ViTConfig" else SHAPE), **case.settings})
    getattr(transformers, case.base)(settings).save_pretrained(folder / "base")
    if "pixel_values" in case.batch:
        (folder / "base" / "preprocessor_config.json").write_text('{"size": 8}')
    else:
        tiny_tokenizer().save_pretrained(folder / "base")
    base = getattr(transformers, case.trained or case.base).from_pretrained(folder / "base", **case.loading)
    model = get_peft_model(base, config)
    batch = case.batch
    if "Sequence" in case.trained and model.config.pad_token_id is None:
        batch = {name: value[:1] for name, value in batch.items()}
    train(model, 2, **batch)
    model.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


def outputs(model: nn.Module, case: Case) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model.eval()(**case.batch)
    return tuple(found[name] for name in ("logits", "start_logits", "end_logits") if name in found)


@pytest.mark.parametrize("name", CASES)
def test_every_class_that_can_be_trained(name, tmp_path, recwarn):
    case = CASES[name]
    model, adapter = trained_adapter(case, KappaTuneConfig(k=3, task_type=case.task), tmp_path)
    torch.manual_seed(5)
    merge_adapter(adapter, tmp_path / "merged")
    assert not [str(each.message) for each in recwarn if "random numbers in the merged" in str(each.message)]
    cls = getattr(transformers, case.trained or case.base)
    made = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert made["architectures"] == [cls.__name__]
    plain, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if "id2label" in case.loading | case.settings:
        assert plain.config.id2label == NEW_HEAD["id2label"]
    if "Sequence" in (case.trained or case.base):
        assert plain.config.pad_token_id is not None
        model.config.pad_token_id = plain.config.pad_token_id
    for found, expected in zip(outputs(plain, case), outputs(model, case), strict=True):
        assert torch.equal(found, expected)
    left = {path.name for path in (tmp_path / "merged").iterdir()}
    assert ("preprocessor_config.json" if name == "images" else "tokenizer_config.json") in left


@pytest.mark.parametrize("name", ["classifier, new", "classifier of two layers, new", "reward model", "tokens"])
def test_the_head_of_another_method(name, tmp_path):
    case = CASES[name]
    modules = {"target_modules": ["q_proj", "query"], "init_lora_weights": False}
    model, adapter = trained_adapter(case, LoraConfig(task_type=case.task, **modules), tmp_path)
    merge_adapter(adapter, tmp_path / "merged")
    plain = getattr(transformers, case.trained).from_pretrained(tmp_path / "merged")
    model.config.pad_token_id = plain.config.pad_token_id
    torch.testing.assert_close(outputs(plain, case), outputs(model, case), rtol=0, atol=1e-5)


@pytest.mark.parametrize("include", [None, ["embedding"]])
@pytest.mark.parametrize("more", [1, 400])
def test_added_tokens(more, include, tmp_path):
    vocabulary = len(tiny_tokenizer())
    tiny_model("llama", vocab_size=vocabulary).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(vocabulary + more)
    exclude = ["norm"] if include else None
    model = get_peft_model(base, KappaTuneConfig(k=1, include=include, exclude=exclude, task_type="CAUSAL_LM"))
    case = Case("", "", {}, batch={"input_ids": torch.tensor([[3, vocabulary + more - 1, 4]])})
    train(model, 2, **case.batch, labels=case.batch["input_ids"])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<t{number}>" for number in range(more)]})
    tokenizer.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(5)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(plain, case), outputs(model, case), rtol=0, atol=1e-6)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == vocabulary + more


def test_random_numbers_in_a_merged_model_are_said(tmp_path):
    case = CASES["classifier that was finished"]
    case = Case("BertForMaskedLM", "BertConfig", ENCODER, case.base, "SEQ_CLS", SEQUENCES, NEW_HEAD)
    with pytest.warns(UserWarning, match="aren't in the checkpoint"):
        _, adapter = trained_adapter(case, KappaTuneConfig(k=3, task_type="SEQ_CLS"), tmp_path)
    with pytest.warns(UserWarning, match=r"Neither .* holds bert.pooler.dense.bias and 1 more"):
        merge_adapter(adapter, tmp_path / "merged")
