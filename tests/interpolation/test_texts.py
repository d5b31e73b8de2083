"""The rise of a loss and its upper limit, against simulation and the obvious sums."""

import numpy as np
import pytest
import torch

from kappatune_plugin.interpolation.dial import LEAST, DialSettings
from kappatune_plugin.interpolation.one_scale import largest_within
from kappatune_plugin.interpolation.texts import Control, Texts, rise


def test_rise_is_all_nats_over_all_tokens():
    found = rise(np.array([4.0, 9.0]), np.array([5.0, 9.5]), [2, 8])
    assert found.mean == pytest.approx(1.5 / 10) and found.documents == 2 and not found.enough


def test_equal_documents_leave_the_t_interval_of_their_means():
    from scipy.stats import ttest_1samp

    change = np.random.default_rng(0).normal(0.3, 1.0, 40)
    found = rise(np.zeros(40), change, [5] * 40)
    wanted = ttest_1samp(change / 5, 0, alternative="less").confidence_interval(0.95).high
    assert found.upper == pytest.approx(wanted) and found.enough


def test_upper_limit_is_above_the_truth_in_95_of_100_samples():
    random, above, samples = np.random.default_rng(1), 0, 2000
    for _ in range(samples):
        tokens = random.integers(5, 50, 30)
        change = tokens * (0.02 + random.normal(0, 0.05, 30))
        above += rise(np.zeros(30), change, tokens).upper >= 0.02
    assert 0.935 <= above / samples <= 0.97


def test_one_document_and_infinite_losses():
    assert rise(np.array([1.0]), np.array([2.0]), [4]).upper == 0.25
    assert rise(np.array([1.0, 1.0]), np.array([2.0, np.inf]), [4, 4]).upper == np.inf


def test_texts_taken_twice_name_the_same_documents():
    values = torch.arange(10.0)
    texts = Texts(lambda rows: values[list(rows)], list(range(1, 11)))
    taken = texts.take([7, 2, 5]).take([1, 2])
    assert taken.tokens == [3, 6] and taken.measured().tolist() == [2.0, 5.0]
    assert texts.up_to(10).tokens == [1, 2, 3, 4] and len(texts.up_to(0)) == 2
    assert float(texts.loss([1, 3])) == pytest.approx((1 + 3) / (2 + 4))


def test_a_control_is_paired_with_the_base():
    values = torch.ones(4)
    control = Control(Texts(lambda rows: values[list(rows)], [2, 2, 2, 2]))
    values += 0.5
    assert control.rise().mean == pytest.approx(0.25) == control.rise().upper
    assert float(control.differentiable_rise([0, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize(("limit", "wanted"), [(1.0, 1.0), (0.25, 0.5), (0.1, 0.316), (1e-9, 0.0)])
@pytest.mark.parametrize("power", [1, 2, 4])
def test_the_largest_scale_within_the_limit_from_below(limit, wanted, power):
    tried = []
    found = largest_within(lambda scale: tried.append(scale) or scale**power, limit ** (power / 2))
    assert found**2 <= limit and wanted - 1 / 64 <= found <= wanted + 1e-3
    # halving the line would take seven
    assert len(tried) <= (4 if power == 2 else 7) and (found in tried or found == 0)
    # from a scale on that keeps it, which is returned where none above does
    further = largest_within(lambda scale: scale**power, limit ** (power / 2), least=found)
    assert found <= further <= found + 1 / 64 and further**2 <= limit


def test_a_loss_that_is_not_finite_is_above_every_limit():
    found = largest_within(lambda scale: scale if scale < 0.3 else float("inf"), 0.5)
    assert 0.3 - 1 / 64 <= found < 0.3


def test_settings_read_no_more_than_they_may():
    settings = DialSettings(0.1)
    assert settings.affordable(1) == settings
    cut = DialSettings(0.1, within=80_000).affordable(1)
    assert cut.reads(1) <= 1.01 * 80_000 and cut.steps == settings.steps
    least = DialSettings(0.1, within=1).affordable(1)
    assert (least.choose_tokens, least.verify_tokens, least.batch) == LEAST
