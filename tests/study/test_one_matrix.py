"""benchmarks/one_matrix.py on a tiny model, and what its page makes of made-up records."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from helpers.made_up_reports import row
from helpers.tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import one_matrix  # noqa: E402
import one_matrix_page as page  # noqa: E402

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def bench(monkeypatch):
    for name, value in (("STEPS", 3), ("BATCH", 2)):
        monkeypatch.setattr(one_matrix, name, value)
    model = tiny_model("llama").eval()
    dealt = random.Random(0)
    documents = [[([dealt.randrange(64) for _ in range(7)], 4)] for _ in range(9)]
    found = one_matrix.Bench(model, [], documents[:4], documents[4:6], documents[6:], [])
    found.before = [each.measured() for each in found.measured_on(model)]
    return found


def loss(model, documents):
    """Mean nats of the tokens that count, one after the other."""
    nats = [
        -model(input_ids=torch.tensor([ids])).logits[0, place - 1].log_softmax(-1)[ids[place]]
        for [(ids, first)] in documents
        for place in range(first, len(ids))
    ]
    return sum(nats) / len(nats)


def test_rates_are_such_that_all_learn_the_same_to_first_order(bench, monkeypatch):
    monkeypatch.setattr(one_matrix, "FURTHEST", 1e9)
    rates = one_matrix.first_order_rates(bench)
    weight = bench.base.get_parameter(NAME)
    (gradient,) = torch.autograd.grad(loss(bench.base, bench.learned), weight)
    assert rates[NAME] * 3 * gradient.abs().sum().item() == pytest.approx(one_matrix.FALL, rel=1e-4)
    assert all(parameter.grad is None for parameter in bench.base.parameters())
    monkeypatch.setattr(one_matrix, "FURTHEST", 1e-6)
    assert one_matrix.first_order_rates(bench)[NAME] == pytest.approx(1e-6 * weight.square().mean().sqrt().item())


def test_one_matrix_alone_is_trained_and_measured(bench, monkeypatch):
    made = []
    monkeypatch.setattr(
        one_matrix, "trained", lambda *args, train=one_matrix.trained: made.append(train(*args)) or made[0]
    )
    before = {name: each.clone() for name, each in bench.base.state_dict().items()}
    found = one_matrix.run(bench, NAME, 1e-2)
    (model,) = made
    changed = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == {NAME} and all(torch.equal(each, before[name]) for name, each in bench.base.state_dict().items())
    with torch.no_grad():
        learned = loss(bench.base, bench.held) - loss(model, bench.held)
        risen = loss(model, bench.control) - loss(bench.base, bench.control)
    assert (found["learned"], found["rise"]) == pytest.approx((learned.item(), risen.item()), abs=1e-5)
    assert 0 < found["moved"] and found["rate"] == 1e-2


def test_the_sample_has_as_many_of_each_type_and_begins_with_one_of_each():
    units = [
        row(f"model.layers.{i}.{kind}.weight", i + 1.0) for i in range(6) for kind in ("mlp.up_proj", "mlp.down_proj")
    ]
    found = [unit.name for unit in one_matrix.sampled(units, 4)]
    assert len(set(found)) == 8 and found == [unit.name for unit in one_matrix.sampled(units, 4)]
    assert all(
        sum(kind in name for name in found[first : first + 2]) == 1 for kind in ("up", "down") for first in (0, 2)
    )
    assert len(one_matrix.sampled(units, 9)) == 12


def records(count=12, within=True):
    """Two types that differ in everything; within them what is forgotten grows with kappa, or is noise."""
    dealt, found = random.Random(1), []
    for kind, base in (("up", 1.0), ("down", 100.0)):
        for place in range(count):
            forgotten = base * (1 + place / count if within else dealt.random())
            scores = dict.fromkeys(page.CRITERIA, base + place) | {"log_volume": dealt.random()}
            learned = 0.5 + 0.1 * dealt.random()
            found.append({"type": kind, "learned": learned, "rise": learned * forgotten, **scores})
    return found


def test_correlations_are_spearmans():
    made = page.useful(records(within=False))
    over_all, within, _, _ = page.correlations(made, "kappa")
    kappas, forgotten = ([each[key] for each in made] for key in ("kappa", page.FORGOTTEN))
    assert over_all[0] == pytest.approx(spearmanr(kappas, forgotten).statistic)
    # of groups of one size the mean over groups
    halves = [spearmanr(kappas[part], forgotten[part]).statistic for part in (slice(12), slice(12, 24))]
    assert within[0] == pytest.approx(np.mean(halves)) and within[1] < within[0] < within[2]
    # what only tells the types apart says nothing within them
    assert over_all[0] > 0.5 and within[1] < 0 < within[2]


def test_the_section_says_what_is_clear_and_what_is_not():
    text = page.section([*records(), {"type": "up", "learned": -0.1, "rise": 0.1, **dict.fromkeys(page.CRITERIA, 1.0)}])
    assert "trained 25 matrices of 2 types" in text and "1 learned nothing and are left out" in text
    assert text.splitlines()[6].startswith("| κ | **+1.00 [+1.00, +1.00]** | **+1.00 [+1.00, +1.00]** | ")
    assert (
        "the matrices of high κ, κ over that of a random matrix of the shape, measured gain over forgetting forget more"
        in text
    )
    assert "log-volume: nothing that can be told from chance." in text
    assert "Not measured yet" in page.section([]) and "Not measured yet" in page.section(records(1))


def test_the_picture_is_drawn(tmp_path):
    page.plot(records(), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
