"""TRL's other trainers, unmodified, with `peft_config=KappaTuneConfig(...)`; SFTTrainer is in test_trainer.py."""

import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import MixtralForSequenceClassification, PreTrainedModel, Trainer

from helpers.recipes import known
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.training import ON_CPU
from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.weights.units import find_units, unit_block

K = 7
PROMPTS = [f"the cat {number} sat on" for number in range(8)]
ROWS = {
    "DPO": {"prompt": PROMPTS, "chosen": [" the mat"] * 8, "rejected": [" no bad"] * 8},
    "KTO": {"prompt": PROMPTS, "completion": [" the mat", " no bad"] * 4, "label": [True, False] * 4},
    "Reward": {
        "chosen": [f"{prompt} the mat" for prompt in PROMPTS],
        "rejected": [f"{each} no bad" for each in PROMPTS],
    },
    "GRPO": {"prompt": PROMPTS},
}
SETTINGS = {"GRPO": {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}}


def short_words(completions: list[str], **_: object) -> list[float]:
    """A reward that differs between completions."""
    return [-float(len(completion)) for completion in completions]


def trainer(kind: str, model: PreTrainedModel, output: Path, config: dict | None = None, **settings: object) -> Trainer:
    arguments = {
        "output_dir": str(output),
        **ON_CPU,
        "max_steps": 3,
        "weight_decay": 0.1,
        **SETTINGS.get(kind, {}),
        **settings,
    }
    extra = {"reward_funcs": short_words} if kind == "GRPO" else {}
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(**arguments),
        train_dataset=Dataset.from_dict(ROWS[kind]),
        processing_class=tiny_tokenizer(),
        peft_config=KappaTuneConfig(k=K, **config or {}),
        **extra,
    )


def base_model(kind: str) -> PreTrainedModel:
    model = tiny_model("mixtral", vocab_size=300)
    if kind != "Reward":
        return model
    model.config.num_labels = 1
    reward = MixtralForSequenceClassification(model.config)
    reward.model = model.model
    return reward


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(tokens.input_ids, attention_mask=tokens.attention_mask).logits


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DPO", {}),
        ("KTO", {}),
        ("GRPO", {}),
        ("Reward", {"task_type": "SEQ_CLS"}),
        ("Reward", {"modules_to_save": ["score"]}),
    ],
    ids=["DPO", "KTO", "GRPO", "Reward", "Reward with its head by name"],
)
def test_trains_the_selected_alone_and_keeps_the_base(tmp_path, kind, config):
    base = base_model(kind)
    expected, before = logits(base), {name: value.clone() for name, value in base.state_dict().items()}
    one = trainer(kind, base, tmp_path, config)
    one.train()
    with one.model.disable_adapter():
        assert torch.equal(logits(one.model), expected), "the reference model is the base"
    assert not torch.equal(logits(one.model), expected)
    selected = [row.name for row in one.model.base_model.selections["default"].units]
    merged = one.model.merge_and_unload()
    units = {unit.name: unit for unit in find_units(merged)}
    after = merged.state_dict()
    assert len(selected) == K
    for unit in (units[name] for name in selected):
        slices = [unit_block(values[unit.parameter], unit) for values in (after, before)]
        assert not torch.equal(*slices), unit.name
        slices[0].copy_(slices[1])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # the new head is trained whole: PEFT sees to it for SEQ_CLS
    assert changed == ({"score.weight"} if kind == "Reward" else set())


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_reference_inside_a_step_is_the_base(tmp_path, kind):
    """The reference runs between the policy's forward and its backward; precomputed it can't disturb either."""

    def losses(**settings: object) -> list[float]:
        # the balancing loss of the experts comes on top of these
        no_balancing = known(getattr(trl, f"{kind}Config"), router_aux_loss_coef=0.0)
        one = trainer(kind, base_model(kind), tmp_path, **no_balancing, **settings)
        one.train()
        return [entry["loss"] for entry in one.state.log_history if "loss" in entry]

    found = losses()
    assert found[0] == pytest.approx(math.log(2) if kind == "DPO" else 0.5, abs=1e-4)
    assert found == pytest.approx(losses(precompute_ref_log_probs=True), abs=1e-5) and found[-1] < found[0]
