"""An unmodified TRL SFTTrainer with `peft_config=KappaTuneConfig(...)`, and nothing else from us."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers.recipes import known
from helpers.tiny import tiny_tokenizer
from helpers.training import ON_CPU, losses, unit_values
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.weights.units import find_units

TEXTS = [f"the cat {i} sat on the mat {j} times" for i in range(8) for j in range(4)]


def trainer(base: Path, output: Path, config: KappaTuneConfig | None = None, **settings) -> SFTTrainer:
    arguments = {
        "output_dir": str(output),
        **ON_CPU,
        "max_steps": 6,
        "weight_decay": 0.1,
        "model_init_kwargs": {"dtype": "float32"},
        **settings,
    }
    return SFTTrainer(
        str(base),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tiny_tokenizer(),
        peft_config=config or KappaTuneConfig(k=7),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
    ],
    ids=["plain", "re-entrant", "non-re-entrant", "accumulation", "bf16"],
)
def test_trains_exactly_the_selected(saved_olmoe, tmp_path, settings):
    one = trainer(saved_olmoe, tmp_path, **settings)
    before = {name: value.clone() for name, value in one.model.get_base_model().state_dict().items()}
    one.train()
    assert losses(one)[-1] < losses(one)[0]
    selected = {row.name for row in one.model.base_model.selections["default"].units}
    model = one.model.merge_and_unload()
    units = {unit.name: unit for unit in find_units(model)}
    for name in selected:
        unit = units[name]
        after, base = model.state_dict()[unit.parameter][unit.index], before[unit.parameter][unit.index]
        assert not torch.equal(after, base), name
        after.copy_(base)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["re-entrant", "non-re-entrant", "accumulation"],
)
def test_losses_do_not_depend_on_checkpointing_or_accumulation(saved_olmoe, tmp_path, settings):
    # TRL adds the router's load balancing loss by default: it isn't linear in the batch, and re-entrant checkpointing
    # takes its router logits from the pass without gradients
    no_balancing = known(SFTConfig, router_aux_loss_coef=0.0)
    plain = trainer(saved_olmoe, tmp_path / "a", **no_balancing)
    other = trainer(saved_olmoe, tmp_path / "b", **no_balancing, **settings)
    plain.train()
    other.train()
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)


def test_resumed_equals_uninterrupted(saved_olmoe, tmp_path):
    whole = trainer(saved_olmoe, tmp_path / "whole", save_steps=3)
    whole.train()
    resumed = trainer(saved_olmoe, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    ours, theirs = unit_values(resumed.model.get_base_model()), unit_values(whole.model.get_base_model())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_with_another_selection_is_an_error(saved_olmoe, tmp_path):
    trainer(saved_olmoe, tmp_path, save_steps=3).train()
    other = trainer(saved_olmoe, tmp_path, KappaTuneConfig(k=7, order="highest"))
    with pytest.raises(KappaTuneError, match="another selection"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_best_model_is_loaded_at_the_end(saved_olmoe, tmp_path):
    """ "Best" means the highest loss here, so that it isn't the last checkpoint."""
    one = SFTTrainer(
        str(saved_olmoe),
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=4,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        eval_dataset=Dataset.from_dict({"text": TEXTS[:8]}),
        processing_class=tiny_tokenizer(),
        peft_config=KappaTuneConfig(k=7),
    )
    one.train()
    best = load_file(Path(one.state.best_model_checkpoint) / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    masters = [name for name in best if name.endswith("kappatune_values.weight")]
    assert any(not torch.equal(best[name], last[name]) for name in masters)
    loaded = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    expected = unit_values(PeftModel.from_pretrained(loaded, one.state.best_model_checkpoint).get_base_model())
    found = unit_values(one.model.get_base_model())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_saved_model_reproduces_the_evaluation(saved_olmoe, tmp_path):
    one = trainer(saved_olmoe, tmp_path / "run", model_init_kwargs={"dtype": "bfloat16"})
    one.train()
    one.save_model(str(tmp_path / "adapter"))
    tokens = tiny_tokenizer()(TEXTS[:4], return_tensors="pt", padding=True)
    base = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = one.model.eval()(tokens.input_ids, tokens.attention_mask).logits
        assert torch.equal(loaded(tokens.input_ids, tokens.attention_mask).logits, expected)


@pytest.mark.slow
def test_killed_while_saving_leaves_the_checkpoint_before_it(saved_olmoe, tmp_path):
    """kill -9 between the files of checkpoint-4: checkpoint-2 still loads."""
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from pathlib import Path
            import torch
            from test_trainer import trainer

            real = torch.save
            def save(content, path, *args, **kwargs):
                if "checkpoint-4" in str(path):
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(content, path, *args, **kwargs)
            torch.save = save
            trainer(Path({str(saved_olmoe)!r}), Path({str(tmp_path / "run")!r}), save_steps=2).train()
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()
    resumed = trainer(saved_olmoe, tmp_path / "run", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    whole = trainer(saved_olmoe, tmp_path / "whole", save_strategy="no")
    whole.train()
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_output_head_is_trained(task_type, saved_olmoe, tmp_path):
    """TRL reads its weight from outside, and PEFT calls the base model past the tuner where it knows no task."""
    config = KappaTuneConfig(k=1, include=["head"], exclude=(), task_type=task_type)
    one = trainer(saved_olmoe, tmp_path, config)
    before = unit_values(one.model.get_base_model())
    one.train()
    after = unit_values(one.model.get_base_model())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    assert losses(one)[-1] < losses(one)[0] - 0.1
