"""What fails in whose Trainer, and what is done about it; test_training.py runs what doesn't."""

import functools
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from helpers.tiny import tiny_model
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.distributed import unsupported as modes
from kappatune_plugin.distributed.unsupported import check_mode, checkpointing_problem, saving_problem


@pytest.mark.parametrize(
    ("use_reentrant", "finds_unused", "deepspeed", "words"),
    [
        (None, True, "0.18.9", None),
        (True, True, None, "Re-entrant gradient checkpointing fails under DDP"),
        (True, False, "0.18.9", None),
        (False, True, None, None),
        (False, False, "0.18.9", "under ZeRO-3 of DeepSpeed 0.18.9"),
        (False, False, "0.19.8", None),
    ],
)
def test_checkpointing_that_would_fail(use_reentrant, finds_unused, deepspeed, words):
    model = nn.Sequential(nn.Linear(2, 2))
    if use_reentrant is not None:
        # as transformers' gradient_checkpointing_enable sets it
        model[0]._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=use_reentrant)
    problem = checkpointing_problem(model, finds_unused, deepspeed)
    assert (problem is None) if words is None else (words in problem)


@pytest.mark.parametrize(("transformers", "saves"), [("4.57.6", False), ("5.6.0", True)])
def test_zero3_that_would_save_no_adapter(transformers, saves, monkeypatch):
    monkeypatch.setattr(modes, "version", {"transformers": transformers}.get)
    assert saving_problem({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}) is None
    problem = saving_problem({"stage": 3})
    assert problem is None if saves else "saves no adapter unless zero_optimization has" in problem


def test_a_scheduler_forgets_the_groups_that_deepspeed_drops(tmp_path):
    """As transformers 4 does it: the scheduler is made first, then the group without parameters goes."""
    tuned = get_peft_model(tiny_model("llama"), KappaTuneConfig(k=2))
    trainer = Trainer(tuned, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained}, {"params": []}], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.param_groups[:] = optimizer.param_groups[:1]
    trainer.callback_handler.lr_scheduler = scheduler
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, SimpleNamespace())
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05] and scheduler.base_lrs == [0.1]


class FirstVersion(FullyShardedDataParallel):
    """As accelerate wraps a layer, without the GPU that it takes."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def test_the_first_version_of_fsdp_is_an_error():
    args = SimpleNamespace(n_gpu=1)
    with pytest.raises(KappaTuneError, match="FSDP's first version"):
        check_mode(nn.Sequential(nn.Linear(2, 2), FirstVersion()), args)
    assert not modes.is_fsdp1(nn.Sequential(nn.Linear(2, 2)))
