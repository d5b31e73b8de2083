"""benchmarks/mixture.py: a dense model's MLPs divided into experts, and what distilling them does."""

import sys
from pathlib import Path

import pytest
import torch

from helpers.tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mixture  # noqa: E402


@pytest.fixture(scope="module")
def dense():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))


def test_all_experts_at_equal_weight_are_the_dense_model(dense, ids):
    divided = mixture.divided(dense, experts=4, active=4, seed=0)
    for layer in divided.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    with torch.no_grad():
        torch.testing.assert_close(divided(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_clusters_are_balanced_and_find_what_belongs_together():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3, 8).repeat_interleave(5, 0) + 0.01 * torch.randn(15, 8, generator=generator)
    shuffled = torch.randperm(15, generator=generator)
    found = mixture.clusters(directions[shuffled], 3, mixture.np.random.default_rng(3))
    assert sorted(torch.cat(found).tolist()) == list(range(15))
    assert all(len(set((shuffled[group] // 5).tolist())) == 1 for group in found)


def test_distilling_brings_the_mixture_near_and_trains_its_experts_only(dense, ids, monkeypatch):
    monkeypatch.setattr(mixture, "RATES", {"experts": 3e-3, "gate": 3e-2})
    divided = mixture.divided(dense, experts=4, active=2, seed=0)
    before = {name: each.clone() for name, each in divided.state_dict().items()}
    far = mixture.by_distribution(dense, divided, ids)
    mixture.distill(dense, divided, mixture.batches(ids.tolist(), 4, 0), 30)
    assert mixture.by_distribution(dense, divided, ids) < far / 2
    moved = {name for name, each in divided.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {name for name in before if ".mlp." in name}
