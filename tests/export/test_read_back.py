"""Exactly what was trained differs between the base's files and an export's, whatever form the base has."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from helpers.loops import logits, train
from helpers.quantize import needs_bitsandbytes
from helpers.tiny import CONFIGS, QWEN_VL, SHAPE, tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.export import merge
from kappatune_plugin.export.export import export_adapter
from kappatune_plugin.weights.quantized import whole_model

PATCHES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GEMMA3 = {
    "text_config": {**CONFIGS["gemma3"][1], "model_type": "gemma3_text"},
    "vision_config": {**PATCHES, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
    **{"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62},
}


@dataclass
class Case:
    """A base (a kind of `tiny_model`, or a class and its config) and what is trained of it."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    shards: str = "1GB"

    def base(self) -> PreTrainedModel:
        if self.kind in CONFIGS:
            return tiny_model(self.kind, **self.settings)
        torch.manual_seed(0)
        cls = getattr(transformers, self.kind)
        return cls(cls.config_class(**{**SHAPE, **self.settings}))


# of hidden size 32
SLIM, SQUARE = (
    {"intermediate_size": 8, "moe_intermediate_size": 8},
    {"intermediate_size": 32, "moe_intermediate_size": 32},
)
EXPERTS = {"include": ["*.experts.*"]}
TEXT = {"include": ["mlp", "attention"], "exclude": ["tower", "norm", "bias", "embedding", "head"]}
CASES = {
    **{f"{kind}, 2I < H": Case(kind, SLIM, EXPERTS) for kind in ("olmoe", "mixtral", "qwen3_moe", "gpt_oss")},
    **{f"{kind}, I = H": Case(kind, SQUARE, EXPERTS) for kind in ("olmoe", "mixtral", "qwen3_moe", "gpt_oss")},
    "tied": Case("llama", {"tie_word_embeddings": True}),
    "tied, embedding trained": Case(
        "llama", {"tie_word_embeddings": True}, {"include": ["embedding"], "exclude": ["norm"], "k": 1}
    ),
    "sharded": Case("llama", shards="20KB"),
    "sharded experts": Case("mixtral", shards="20KB"),
    "bfloat16": Case("llama", {"dtype": torch.bfloat16}),
    "sees, Qwen2-VL": Case("Qwen2VLForConditionalGeneration", QWEN_VL, TEXT),
    "sees, Gemma 3": Case("Gemma3ForConditionalGeneration", GEMMA3, TEXT),
}


def stored(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(places.values())}
    return {name: files[file][name] for name, file in places.items()}


def adapter_on(base: Path, folder: Path, config: dict[str, Any], **loading: Any) -> PeftModel:
    """The trained model; its adapter is in `folder`."""
    cls = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    model = cls.from_pretrained(base, dtype="auto", **loading)
    model = get_peft_model(model, KappaTuneConfig(**{"k": 4, "order": "random", "task_type": "CAUSAL_LM", **config}))
    train(model)
    model.save_pretrained(folder)
    return model


def expected_changes(adapter: Path, names: set[str]) -> set[str]:
    """The checkpoint's tensors that hold what the adapter trains: an expert's own, or the fused one of all experts."""
    found = set()
    for unit in json.loads((adapter / "adapter_config.json").read_text())["selection"]["units"]:
        owner, _, projection = unit["name"].removesuffix(".weight").rpartition(".")
        fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
        found.add(unit["name"] if unit["name"] in names else f"{owner.rpartition('.')[0]}.{fused}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_exactly_what_was_trained_differs(name, tmp_path):
    case = CASES[name]
    case.base().save_pretrained(tmp_path / "base", max_shard_size=case.shards)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tuned = adapter_on(tmp_path / "base", tmp_path / "adapter", case.config)
    if "ConditionalGeneration" in case.kind:
        assert all(layer.unit.parameter.startswith("model.language_model.") for layer in tuned.base_model.layers())
    before = stored(tmp_path / "base")
    wanted = expected_changes(tmp_path / "adapter", set(before))
    assert wanted and (case.shards == "1GB" or len(list((tmp_path / "base").glob("*.safetensors"))) > 2)
    for form in ("merged", "patch"):
        export_adapter(tmp_path / "adapter", tmp_path / form, form)
        after = stored(tmp_path / form)
        assert after.keys() == before.keys(), form
        assert {key: value.dtype for key, value in after.items()} == {key: each.dtype for key, each in before.items()}
        assert {key for key in before if not torch.equal(before[key], after[key])} == wanted, form
        loaded = type(tuned.base_model.model).from_pretrained(tmp_path / form, dtype="auto")
        assert torch.equal(logits(loaded), logits(tuned)), form


@needs_bitsandbytes
def test_of_a_quantized_base_nothing_else_differs_from_what_it_computed_with(tmp_path):
    tiny_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    adapter_on(tmp_path / "base", tmp_path / "adapter", {}, quantization_config=settings)
    export_adapter(tmp_path / "adapter", tmp_path / "merged")
    coarse = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    before = {name: value.clone() for name, value in whole_model(coarse).state_dict().items()}
    after, plain = stored(tmp_path / "merged"), stored(tmp_path / "base")
    assert after.keys() == before.keys() == plain.keys()
    assert {value.dtype for value in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == expected_changes(tmp_path / "adapter", set(before))
    # the comparison means something: quantizing moved every linear layer
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], plain["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(KappaTuneError, match="The base is quantized: its files hold no tensors to lay a patch over"):
        export_adapter(tmp_path / "adapter", tmp_path / "patch", "patch")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a small Llama's adapter; its base lies beside. Read only."""
    work = tmp_path_factory.mktemp("damaged")
    tiny_model("llama").save_pretrained(work / "base")
    tiny_tokenizer().save_pretrained(work / "base")
    adapter_on(work / "base", work / "adapter", {})
    return work / "adapter"


def cast(values: dict[str, Tensor], trained: str) -> None:
    values["model.norm.weight"] = values["model.norm.weight"].to(torch.bfloat16)


def lose(values: dict[str, Tensor], trained: str) -> None:
    del values["model.norm.weight"]


def add(values: dict[str, Tensor], trained: str) -> None:
    values["model.norm.bias"] = torch.zeros(32)


def flip(values: dict[str, Tensor], trained: str) -> None:
    values["model.norm.weight"][0] += 1e-6


def reset(values: dict[str, Tensor], trained: str) -> None:
    values[trained] = values["base " + trained]


DAMAGE = {
    cast: "1 tensors are of another dtype, such as model.norm.weight",
    lose: "1 tensors are missing, such as model.norm.weight",
    add: "1 tensors are there that the model doesn't have, such as model.norm.bias",
    flip: "1 tensors differ that weren't trained, such as model.norm.weight",
    reset: "holds the base's values, and it was trained",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("form", ["merged", "patch"])
def test_a_file_damaged_between_writing_and_reading_back_is_not_published(trained, tmp_path, monkeypatch, damage, form):
    real = merge.check_names

    def damaged(folder, saved):
        values = load_file(folder / "model.safetensors")
        base = load_file(trained.parent / "base" / "model.safetensors")
        name = json.loads((trained / "adapter_config.json").read_text())["selection"]["units"][0]["name"]
        values |= {f"base {name}": base[name]}
        damage(values, name)
        save_file(
            {key: value for key, value in values.items() if not key.startswith("base ")}, folder / "model.safetensors"
        )
        real(folder, saved)

    monkeypatch.setattr(merge, "check_names", damaged)
    with pytest.raises(KappaTuneError, match=DAMAGE[damage]):
        export_adapter(trained, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
