"""A rank that is killed: the others stop with its name, and what was saved is there."""

import importlib.util
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.rank_jobs import save_until_killed, scan_until_killed, scan_with_an_error, train
from helpers.ranks import run_ranks
from kappatune_plugin import KappaTuneError, scan, select
from kappatune_plugin.distributed import lost_ranks as watch
from kappatune_plugin.distributed import ranks
from kappatune_plugin.run.resume import checkpoint_problems

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed")
ZERO2, ZERO3 = (pytest.param(mode, marks=needs_deepspeed) for mode in ("zero2", "zero3"))


@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.distributed),
        pytest.param("zero3", marks=[pytest.mark.distributed, needs_deepspeed]),
    ],
)
def test_killed_in_a_scan(mode, saved_olmoe):
    ((error, seconds),) = run_ranks(scan_until_killed, dies=1, mode=mode, model=str(saved_olmoe))
    assert error.startswith("the scan: rank 1 has given no sign of life for") and seconds < 60


def test_an_error_in_a_scan_is_told_to_the_others(saved_olmoe):
    theirs, own = run_ranks(scan_with_an_error, mode="ddp", model=str(saved_olmoe))
    assert own == "'no row'" and theirs == "the scan: rank 1 stopped (KeyError: 'no row')."


class Store(dict):
    """What ranks meet at, until the process that holds it ends."""

    gone = False

    def set(self, key: str, value: str) -> None:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self


@pytest.fixture
def store(monkeypatch) -> Store:
    store = Store()
    monkeypatch.setattr(watch, "_own_connection", lambda: store)
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "SILENT", 0.2)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    return store


def test_a_rank_that_is_done_doesnt_need_the_others(store):
    with watch.together("the scan", stop_stuck=False):
        store.gone = True


def test_who_is_missing_is_said_where_the_others_cant_be_told(store, monkeypatch):
    """The store goes away between the look at it and the word about what is missing there."""

    def set_or_fail(key: str, value: str) -> None:
        if key.endswith("problem"):
            raise RuntimeError("Connection reset by peer")
        Store.set(store, key, value)

    store.set = set_or_fail
    with pytest.raises(KappaTuneError, match="the scan: rank 1 has given no sign of life for 0 seconds"):
        with watch.together("the scan", stop_stuck=False):
            store[f"kappatune/{watch._times}/1"] = b"0 here"
            time.sleep(1)
            raise RuntimeError("gloo")


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
