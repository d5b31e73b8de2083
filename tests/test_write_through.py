"""What would fail under a Trainer; tests/test_distributed_training.py runs what doesn't."""

import functools

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint

from kappatune_plugin import write_through
from kappatune_plugin.write_through import _checkpointing_problem, _saving_problem


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
    problem = _checkpointing_problem(model, finds_unused, deepspeed)
    assert (problem is None) if words is None else (words in problem)


@pytest.mark.parametrize(("transformers", "saves"), [("4.57.6", False), ("5.6.0", True)])
def test_zero3_that_would_save_no_adapter(transformers, saves, monkeypatch):
    monkeypatch.setattr(write_through, "version", {"transformers": transformers}.get)
    assert _saving_problem({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}) is None
    problem = _saving_problem({"stage": 3})
    assert problem is None if saves else "leaves no adapter unless zero_optimization has" in problem
