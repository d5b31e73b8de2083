"""The failure signatures on made-up runs."""

import pytest

from helpers.made_up_reports import report, row, twelve_units
from kappatune_plugin import select
from kappatune_plugin.forgetting.report import ForgettingReport
from kappatune_plugin.run.diagnosis import findings, plateau_start

EARLY = [(step, max(2.0 - 0.05 * step, 1.5)) for step in range(1, 101)]
LATE = [(step, max(2.0 - 0.02 * step, 0.7)) for step in range(1, 101)]
LEARNED = [(step, max(2.0 - 0.1 * step, 0.1)) for step in range(1, 101)]
FALLING = [(step, 2.0 - 0.015 * step) for step in range(1, 101)]


@pytest.mark.parametrize(
    ("losses", "start"),
    [(EARLY, 10), (LATE, 60), (LEARNED, 20), (FALLING, None), (EARLY[:9], None), ([], None), (EARLY[4::5], 10)],
)
def test_where_a_curve_stops_falling(losses, start):
    """To a tenth of the curve: EARLY reaches its floor at step 10, LATE at 65, LEARNED at 19."""
    assert plateau_start(losses) == start


def forgotten(rise: float) -> ForgettingReport:
    made = ForgettingReport(["stories", "wiki"], None, 0)
    made.before = {"stories_loss": 1.0, "wiki_loss": 3.0}
    made.after = {"stories_loss": 1.0 + rise, "wiki_loss": 2.5}
    return made


def test_an_early_plateau_asks_for_more_matrices():
    selection = select(twelve_units(), k=4)
    (found,) = findings(EARLY, selection)
    assert "fell no further after step" in found and "stayed at 1.5" in found
    assert "4 matrices are too small a budget" in found and "raise kappatune.k" in found
    for losses in (LATE, LEARNED, FALLING, []):
        assert findings(losses, selection) == []
    # learned by the target that the recipe gave, or not
    assert findings(EARLY, selection, target_loss=1.6) == []
    assert len(findings(LEARNED, selection, target_loss=0.05)) == 1


def test_a_first_loss_that_was_logged_late_is_the_first_one():
    """A run resumed from step 50 that logs every step, after one that logged every 50."""
    (found,) = findings(EARLY[49:], select(twelve_units(), k=4))
    assert "fell no further after step 40 of 100: it stayed at 1.5" in found


def test_forgetting_above_the_limit_names_what_was_trained():
    made = report(
        row("layers.0.mlp.gate.weight", 1.0, groups=("router",)),
        row("layers.0.mlp.experts.0.up_proj.weight", 2.0),
        row("layers.1.mlp.experts.0.up_proj.weight", 3.0),
        left_out={"lm_head.weight": "excluded by 'head'"},
    )
    (found,) = findings([], select(made, k=3), made, forgotten(0.2), max_delta=0.1)
    assert "rose by 0.200 nats a token" in found and "(0.1)" in found
    assert "Add router to kappatune.exclude: 1 routers were trained (of 2 up_proj, 1 gate)" in found
    experts = report(*made.units[1:], left_out=made.left_out)
    (found,) = findings([], select(experts, k=2), experts, forgotten(0.2), max_delta=0.1)
    assert "trained were 2 up_proj; left out: 1 excluded by 'head'" in found and "router" not in found
    for limit in (0.25, None):
        assert findings([], select(made, k=3), made, forgotten(0.2), max_delta=limit) == []


def test_matrices_without_a_condition_number_are_named():
    made = report(*twelve_units().units, row("broken.weight", status="nonfinite"))
    singular, broken = findings([], select(made, k=3), made)
    assert "2 of 13 matrices" in singular and "zero.weight, deficient.weight" in singular
    assert "modules_to_save" in singular
    assert "1 matrices hold NaN" in broken and "broken.weight" in broken


def test_the_papers_choice_over_all_matrices_is_told_what_has_learned_more():
    made = report(
        row("layers.0.self_attn.v_proj.weight", 1.0),
        row("layers.0.self_attn.k_proj.weight", 2.0),
        row("layers.0.mlp.up_proj.weight", 3.0),
    )
    (found,) = findings([], select(made, k=3), made)
    assert (
        found.startswith("2 of the 3 matrices of lowest kappa are attention's.")
        and "--config RECIPE --methods lowest,lora_mlp" in found
    )
    # another choice, pairs in the place of matrices, no MLP that could be chosen, none of attention's chosen
    assert findings([], select(made, k=3, order="highest"), made) == []
    assert findings([], select(made, k=3), made, adapter="lora") == []
    attention, mlp = report(*made.units[:2]), report(*made.units[2:])
    assert findings([], select(attention, k=2), attention) == findings([], select(mlp, k=1), mlp) == []
