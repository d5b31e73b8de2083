"""A scan divided over ranks gives the report of one process."""

import importlib.util
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.rank_jobs import gather_peak, placed_by_columns, scan_divided, train_lost
from helpers.ranks import run_ranks
from kappatune_plugin import KappaTuneError, scan
from kappatune_plugin.distributed import shards
from kappatune_plugin.distributed.work import cost, deal, rounds
from kappatune_plugin.weights.units import WeightUnit

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed")
ZERO3 = pytest.param("zero3", marks=needs_deepspeed)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", ZERO3])
@pytest.mark.parametrize("from_disk", [True, False], ids=["from disk", "from memory"])
def test_the_report_of_two_ranks_is_that_of_one_process(mode, from_disk, saved_olmoe):
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    expected = json.dumps(asdict(scan(model, progress=False, cache=False)))
    found = run_ranks(scan_divided, mode=mode, model=str(saved_olmoe), from_disk=from_disk)
    names = [row["name"] for row in json.loads(expected)["units"]]
    for report, measured, gathered in found:
        assert report == expected
        assert gathered == (mode != "ddp" and not from_disk)
        assert 0.3 * len(names) < len(measured)
    assert sorted(name for _, measured, _ in found for name in measured) == sorted(names)


def test_hands_are_even_and_each_matrix_is_in_one():
    units = [WeightUnit(str(size), (size, size), "") for size in (8, 64, 16, 63, 32, 62, 61, 60, 59)]
    hands = deal(units, 3)
    assert sorted(unit.name for hand in hands for unit in hand) == sorted(unit.name for unit in units)
    loads = [sum(map(cost, hand)) for hand in hands]
    assert max(loads) <= 1.1 * min(loads)
    names = [[unit.name for unit in each] for each in rounds(units, 4)]
    assert names == [["64", "63", "62", "61"], ["60", "59", "32", "16"], ["8"]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", ZERO3])
def test_gathering_takes_the_memory_of_one_matrix(mode):
    for matrix, peaks in run_ranks(gather_peak, mode=mode, rows=256, columns=1024):
        assert max(peaks) <= 1.05 * matrix
        assert len(peaks) == 6 + 3


@pytest.mark.parametrize("mode", ["fsdp2", ZERO3])
def test_a_part_that_was_not_loaded_is_not_trained(mode, saved_olmoe):
    """Seen with DeepSpeed 0.18.9 on processes without a GPU."""
    name = "model.layers.1.mlp.experts.4.gate_proj.weight"
    for error in run_ranks(train_lost, mode=mode, model=str(saved_olmoe)):
        assert f"Matrices with other values: rank 1: 8, such as {name}. " in error


def test_other_ways_to_divide_are_an_error(monkeypatch):
    for error in run_ranks(placed_by_columns):
        assert "only FSDP2's own sharding along the first axis is supported" in error
    parameter = torch.empty(0)
    parameter.ds_tensor = torch.ones(4)
    parameter.ds_secondary_tensor = torch.ones(2)
    with pytest.raises(KappaTuneError, match="delete zero_hpz_partition_size"):
        shards.block_ranges(parameter, ())
    monkeypatch.setattr(shards, "_ranges", lambda parameter: [(0, 4)])
    parameter.ds_tensor.status = SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(KappaTuneError, match="write offload_param.device: cpu"):
        shards.read_block(parameter, ())
