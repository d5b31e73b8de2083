"""A rank that is killed: the others stop with its name, and what was saved is there."""

import importlib.util

import pytest
import torch
from rank_jobs import save_until_killed, scan_until_killed, scan_with_an_error, train
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from kappatune_plugin import scan, select
from kappatune_plugin.checkpoint import checkpoint_problems

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed")
ZERO2, ZERO3 = (pytest.param(mode, marks=needs_deepspeed) for mode in ("zero2", "zero3"))


@pytest.mark.parametrize("mode", ["ddp", ZERO3])
def test_killed_in_a_scan(mode, saved_olmoe):
    ((error, seconds),) = run_ranks(scan_until_killed, dies=1, mode=mode, model=str(saved_olmoe))
    assert error.startswith("the scan: rank 1 has given no sign of life for") and seconds < 60


def test_an_error_in_a_scan_is_told_to_the_others(saved_olmoe):
    theirs, own = run_ranks(scan_with_an_error, mode="ddp", model=str(saved_olmoe))
    assert own == "'no row'" and theirs == "the scan: rank 1 stopped (KeyError: 'no row')."


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", ZERO2, ZERO3])
def test_killed_in_a_save(mode, saved_olmoe, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    config = {"selection": select(scan(model, progress=False), k=9, order="random").to_dict()}
    arguments = {"mode": mode, "model": str(saved_olmoe), "config": config}
    killed = tmp_path / "killed"
    ((error, seconds),) = run_ranks(save_until_killed, dies=1, output=str(killed), max_steps=6, **arguments)
    assert error.startswith("training: rank 1 has given no sign of life for") and seconds < 60
    # elsewhere the first rank writes all that a checkpoint needs
    assert bool(checkpoint_problems(killed / "checkpoint-4")) or not mode.startswith("zero")
    assert not [each for each in checkpoint_problems(killed / "checkpoint-2") if "can't load it on 1" not in each]
    resumed = run_ranks(
        train, output=str(tmp_path / "resumed"), resume=str(killed / "checkpoint-2"), max_steps=6, **arguments
    )[0]
    whole = run_ranks(train, output=str(tmp_path / "whole"), max_steps=6, **arguments)[0]
    assert resumed["losses"][-4:] == whole["losses"][-4:]
    assert all(torch.equal(value, whole["weights"][name]) for name, value in resumed["weights"].items())
