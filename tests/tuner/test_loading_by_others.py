"""Adapters as transformers and TRL load and copy them, which go by the names of what is stored."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import use_adapter

from helpers.loops import logits, train
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.tuner.layer import KappaTuneLayer

OLD = Path(__file__).parents[1] / "fixtures" / "before_rooms"
needs_5 = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="the base is transformers 5's")


@pytest.fixture(params=[("llama", {"adapter": "lora", "r": 4}), ("olmoe", {})], ids=("pairs", "whole"))
def saved(request, tmp_path) -> tuple[Path, Path, torch.Tensor]:
    """A base in a folder, a trained adapter in another, and the logits of both together."""
    kind, settings = request.param
    tiny_model(kind, vocab_size=300).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, KappaTuneConfig(k=4, task_type="CAUSAL_LM", **settings))
    train(model)
    for folder in ("base", "adapter"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


def test_the_prefix_stands_in_a_name_once_and_the_adapters_name_inside(saved):
    _, adapter, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved[0]), adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert {key.count("kappatune_") for key in file.keys()} == {1}  # noqa: SIM118
    ours = [name for name, _ in model.named_parameters() if "kappatune_" in name]
    assert len({name.rpartition(".")[0] for name in ours}) == 4 and all(
        ".kappatune_values.default." in name for name in ours
    )


def load_adapter(base: Path, adapter: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


@pytest.mark.parametrize(
    "load",
    [
        lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
        lambda base, adapter: transformers.pipeline("text-generation", model=str(adapter), device="cpu").model,
        load_adapter,
    ],
    ids=["AutoModel", "pipeline", "load_adapter"],
)
def test_transformers_loads_what_was_trained(saved, load):
    base, adapter, expected = saved
    loaded = load(base, adapter)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(base)))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    # as `disable_adapters` does, which asks for PEFT 0.22
    for layer in loaded.modules():
        if isinstance(layer, KappaTuneLayer):
            layer.enable_adapters(enabled=False)
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_transformers_refuses_the_adapter_of_another_base(saved):
    _, adapter, _ = saved
    with pytest.raises(KappaTuneError, match="fingerprint"):
        tiny_model("llama", seed=5).load_adapter(str(adapter))


@needs_5
def test_an_adapter_of_before_is_refused_with_what_to_do(tmp_path):
    shutil.copytree(OLD / "adapter", tmp_path / "old")
    base = AutoModelForCausalLM.from_pretrained(OLD / "base", dtype=torch.float32)
    with pytest.raises(KappaTuneError, match="earlier version"):
        base.load_adapter(str(tmp_path / "old"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(OLD / "base", dtype=torch.float32), tmp_path / "old"
    )
    model.save_pretrained(tmp_path / "new")
    base = AutoModelForCausalLM.from_pretrained(OLD / "base", dtype=torch.float32)
    base.load_adapter(str(tmp_path / "new"))
    assert torch.equal(logits(base), logits(model))


PREFERENCES = {"prompt": "the cat", "chosen": " sat", "rejected": " no"}
ONE_STEP = {"report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1, "save_strategy": "no", "logging_steps": 1}
REWARD = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
# configuration, its settings, trainer, what else the trainer takes, and rows
TRAINERS = {
    "DPO": (DPOConfig, {}, DPOTrainer, {}, [PREFERENCES] * 8),
    "KTO": (
        KTOConfig,
        {"per_device_train_batch_size": 2},
        KTOTrainer,
        {},
        [{"prompt": "the cat", "completion": " sat", "label": bool(number % 2)} for number in range(4)],
    ),
    "GRPO": (
        GRPOConfig,
        {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "beta": 0.1},
        GRPOTrainer,
        REWARD,
        [{"prompt": "the cat"}] * 8,
    ),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trainer_that_goes_on_measures_against_the_adapter_it_began_with(kind, saved, tmp_path):
    base, adapter, expected = saved
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    config, settings, make, others, rows = TRAINERS[kind]
    args = config(str(tmp_path / "run"), **ONE_STEP, **{"learning_rate": 1e-2, **settings})
    rows = Dataset.from_list(rows)
    trainer = make(policy, args=args, processing_class=tiny_tokenizer(), train_dataset=rows, **others)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" not in model.peft_config:
        pytest.skip("this TRL makes no copy of the adapter")
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model), expected)
    trainer.train()
    with use_adapter(model, "ref"):
        assert torch.equal(logits(model), expected)
    # a mixture of experts adds its router's loss
    if kind == "DPO" and model.config.model_type == "llama":
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert kind == "GRPO" or not torch.equal(logits(model), expected)
