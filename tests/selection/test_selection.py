"""Selections: what each budget and order takes, why each unit was taken or left, and what is refused."""

import dataclasses
import json
import random

import pytest

from helpers.made_up_reports import report, row, twelve_units
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.ranking import ORDERS
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection, differences, select

BUDGETS = [3, "30%", {"params": 48}, {"kappa": 3}]


def names(selection: Selection) -> list[str]:
    return [unit.name.removesuffix(".weight") for unit in selection.units]


def shuffled(original: KappaReport, seed: int) -> KappaReport:
    rows = list(original.units)
    random.Random(seed).shuffle(rows)
    return report(*rows, left_out=original.left_out)


@pytest.mark.parametrize(
    ("k", "lowest", "highest"),
    [
        (3, 3, 3),
        ("3", 3, 3),
        (" 10 ", 10, 10),
        ("10%", 1, 1),
        ("30%", 3, 3),
        ("33.3 %", 3, 3),
        ("1%", 1, 1),
        ("100%", 10, 10),
        ({"params": 16}, 1, 1),
        ({"params": 47}, 2, 2),
        ({"params": 48.0}, 3, 3),
        ({"params": "0.064K"}, 4, 4),
        ({"params": "160M"}, 10, 10),
        ({"params": "1e3"}, 10, 10),
        ({"kappa": 1}, 1, 10),
        ({"kappa": 3}, 3, 8),
        ({"kappa": 3.5}, 3, 7),
        ({"kappa": "3.5"}, 3, 7),
        ({"kappa": 10}, 10, 1),
    ],
)
def test_budgets(k, lowest, highest):
    assert names(select(twelve_units(), k=k)) == [f"u{i}" for i in range(lowest)]
    assert names(select(twelve_units(), k=k, order="highest")) == [f"u{9 - i}" for i in range(highest)]
    assert len(select(twelve_units(), k=k, order="random").units) == lowest
    assert len(select(twelve_units(), k=k, order="shape_matched_random").units) == lowest


def test_params_stop_at_the_first_that_does_not_fit():
    """The next one would fit, but its rank is worse than that of one that was left."""
    rows = [row("a", 1.0, (2, 2)), row("b", 2.0, (10, 10)), row("c", 3.0, (2, 2))]
    assert names(select(report(*rows), k={"params": 50})) == ["a"]


def test_share_is_exact():
    rows = [row(f"u{i}", 1.0 + i) for i in range(100)]
    for percent in range(1, 101):
        assert len(select(report(*rows), k=f"{percent}%").units) == percent


def test_default_is_the_papers():
    rows = [row(f"u{i:03}", 1.0 + i) for i in range(200)]
    selection = select(report(*rows))
    assert names(selection) == [f"u{i:03}" for i in range(75)]
    assert (selection.k, selection.order, selection.rank_by, selection.seed) == (75, "lowest", "kappa", 0)
    assert selection.base == {"name": "base", "hash": "0123"}


@pytest.mark.parametrize("k", BUDGETS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_whatever_the_reports_order(order, k):
    expected = select(twelve_units(), k=k, order=order, seed=5)
    for seed in range(5):
        selection = select(shuffled(twelve_units(), seed), k=k, order=order, seed=5)
        assert selection == expected and selection.reasons == expected.reasons


def test_random_draw_does_not_depend_on_kappa():
    rows = [row(f"u{i}", 1.0 + i) for i in range(20)]
    reversed_rows = [row(f"u{i}", 40.0 - i) for i in range(20)]
    for order in ("random", "shape_matched_random"):
        draws = [names(select(report(*each), k=5, order=order, seed=2)) for each in (rows, reversed_rows)]
        assert draws[0] == draws[1]


def test_equal_kappas_are_settled_by_name():
    rows = [row(name, 2.0) for name in ("c", "a", "d", "b")]
    assert names(select(report(*rows), k=2)) == ["a", "b"]
    assert names(select(report(*rows), k=2, order="highest")) == ["a", "b"]


@pytest.mark.parametrize("order", ["random", "shape_matched_random"])
def test_random_orders_follow_the_seed(order):
    draws = [tuple(names(select(twelve_units(), k=4, order=order, seed=seed))) for seed in range(200)]
    assert draws == [tuple(names(select(twelve_units(), k=4, order=order, seed=seed))) for seed in range(200)]
    assert len(set(draws)) > 100
    counts = [sum(f"u{i}" in draw for draw in draws) for i in range(10)]
    assert all(50 < count < 110 for count in counts) and sum(counts) == 800


@pytest.mark.parametrize("k", [7, "30%", "100%", {"params": 200}, {"kappa": 1.5}])
def test_shape_matched_random_has_the_shapes_of_lowest(k):
    rows = [row(f"s{i}", 1 + i / 10, (8, 8)) for i in range(4)] + [
        row(f"t{i}", 1.05 + i / 5, (2, 8)) for i in range(20)
    ]
    expected = sorted(unit.shape for unit in select(report(*rows), k=k).units)
    for seed in range(10):
        selection = select(report(*rows), k=k, order="shape_matched_random", seed=seed)
        assert sorted(unit.shape for unit in selection.units) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_units_that_are_not_ok_are_never_taken(order):
    for seed in range(20):
        assert set(names(select(twelve_units(), k=10, order=order, seed=seed))) == {f"u{i}" for i in range(10)}


def test_status_decides_and_not_kappa():
    finite = dataclasses.replace(row("a", status="rank_deficient"), kappa=1.5)
    assert names(select(report(finite, row("b", 9.0)), k=1)) == ["b"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", BUDGETS)
def test_every_unit_has_a_reason(k, order):
    made_of = twelve_units()
    selection = select(made_of, k=k, order=order)
    assert set(selection.reasons) == {unit.name for unit in made_of.units} | set(made_of.left_out)
    taken = {name for name, reason in selection.reasons.items() if reason.startswith("taken: ")}
    assert taken == {unit.name for unit in selection.units}
    assert all(reason.startswith(("taken: ", "left: ")) for reason in selection.reasons.values())


def test_reasons_are_exact():
    reasons = select(twelve_units(), k=4).reasons
    assert reasons["u3.weight"] == "taken: kappa 4 is rank 4 of 10, K = 4"
    assert reasons["u4.weight"] == "left: rank 5 of 10, K = 4"
    assert reasons["zero.weight"] == "left: zero"
    assert reasons["deficient.weight"] == "left: rank_deficient"
    assert reasons["lm_head.weight"] == "left: excluded by 'head'"
    assert select(twelve_units(), k="20%").reasons["u0.weight"] == "taken: kappa 1 is rank 1 of 10, K = 2 (20%)"
    by_size = select(twelve_units(), k={"params": 40}, order="highest").reasons
    assert by_size["u8.weight"] == "taken: kappa 9 is rank 2 of 10 from the highest, K = 2 (40 parameters)"
    assert by_size["u7.weight"] == "left: rank 3 of 10 from the highest, K = 2 (40 parameters)"
    assert select(twelve_units(), k={"kappa": 2.5}).reasons["u2.weight"] == "left: rank 3 of 10, K = 2 (kappa 2.5)"
    drawn = select(twelve_units(), k=4, order="random", seed=7)
    first = drawn.units[0]
    rank = int(first.kappa)
    assert drawn.reasons[first.name] == f"taken: kappa {rank} is rank {rank} of 10, drawn with seed 7, K = 4"
    left = next(i for i in range(10) if f"u{i}" not in names(drawn))
    assert drawn.reasons[f"u{left}.weight"] == f"left: rank {left + 1} of 10, not drawn with seed 7, K = 4"


@pytest.mark.parametrize(
    "k",
    [0, -3, "0", "-3", "0%", "150%", "-5%", "%", True, False, 3.5, 75.0, None, "", "many", "3.5", "1e2", "160M", [75]]
    + [(3,), {}, {"parms": 3}, {"params": 3, "kappa": 3}, {3: 3}]
    + [{"params": value} for value in (0, -1, 0.5, True, None, "", "160X", "160MM", "-1M", "M", float("nan"), [1])]
    + [{"kappa": value} for value in (0, 0.9, -3, True, None, "3K", "low", float("inf"))],
)
def test_budgets_that_cannot_be_right_are_refused(k):
    with pytest.raises(KappaTuneError) as error:
        select(twelve_units(), k=k)
    assert repr(k) in str(error.value) or repr(next(iter(k.values()))) in str(error.value)
    for example in ("75", "10%", "{params: 160M}", "{kappa: 30}"):
        assert example in str(error.value)


def test_two_ways_to_write_a_budget_are_equal():
    assert parse_budget("75") == parse_budget(75)
    assert parse_budget("10%") == parse_budget("10.0 %")
    assert parse_budget({"params": "160M"}) == parse_budget({"params": 160e6}) == parse_budget({"params": "160e6"})
    assert parse_budget({"params": "1.5B"}) == parse_budget({"params": 1_500_000_000})
    assert parse_budget({"kappa": 30}) == parse_budget({"kappa": "30.0"}) != parse_budget(30)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 11}, ["11", "10 weight matrices eligible", "2 not ok", "1 rank_deficient", "1 zero", "1 left out"]),
        ({"k": 11, "order": "random"}, ["11", "10 weight matrices eligible"]),
        ({"k": {"params": 15}}, ["15 parameters", "u0.weight", "16"]),
        ({"k": {"kappa": 99}, "order": "highest"}, ["99", "highest is 10"]),
        ({"order": "lowset"}, ["lowset", "lowest, highest, random, shape_matched_random"]),
        ({"rank_by": "entropy"}, ["entropy", "kappa"]),
        ({"rank_by": ["kappa"]}, ["rank_by", "['kappa']"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"seed": True}, ["seed", "True"]),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, words):
    with pytest.raises(KappaTuneError) as error:
        select(twelve_units(), **settings)
    for word in words:
        assert word in str(error.value)


def test_threshold_below_the_lowest_names_the_lowest():
    with pytest.raises(KappaTuneError, match="lowest is 5.25") as error:
        select(report(row("a", 5.25), row("b", 6.0)), k={"kappa": 5})
    assert "2 weight matrices eligible" in str(error.value)


@pytest.mark.parametrize("k", BUDGETS)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_eligible_is_an_error(order, k):
    with pytest.raises(KappaTuneError, match="0 weight matrices eligible, 2 not ok .2 zero.") as error:
        select(report(row("a", status="zero"), row("b", status="zero")), k=k, order=order)
    assert "base weights" in str(error.value)
    with pytest.raises(KappaTuneError, match="include"):
        select(report(left_out={"a": "not in include"}), k=k, order=order)


@pytest.mark.parametrize("k", [*BUDGETS, "3", {"params": "48"}])
@pytest.mark.parametrize("order", ORDERS)
def test_saved_and_loaded_is_the_same(tmp_path, order, k):
    selection = select(twelve_units(), k=k, order=order, seed=3)
    assert Selection.from_dict(selection.to_dict()) == selection
    selection.save(tmp_path / "selection.json")
    loaded = Selection.load(tmp_path / "selection.json")
    assert loaded == selection and loaded.reasons == {}
    assert loaded.k == k and type(loaded.units[0].shape) is tuple


def test_file_is_as_documented(tmp_path):
    select(report(row("a", 2.5, (3, 4))), k=1, seed=9).save(tmp_path / "selection.json")
    assert json.loads((tmp_path / "selection.json").read_text()) == {
        "format": 1,
        "k": 1,
        "order": "lowest",
        "rank_by": "kappa",
        "seed": 9,
        "base": {"name": "base", "hash": "0123"},
        "units": [{"name": "a", "shape": [3, 4], "kappa": 2.5}],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("seed"), ["seed is missing"]),
        (lambda content: content.pop("format"), ["format is missing"]),
        (lambda content: content.update(format=2), ["format", "2"]),
        (lambda content: content.update(reason="x"), ["unknown key 'reason'", "It takes k, order"]),
        (lambda content: content.update(k=0), ["k", "0"]),
        (lambda content: content.update(order="down"), ["order", "down", "shape_matched_random"]),
        (lambda content: content.update(rank_by="size"), ["rank_by", "size"]),
        (lambda content: content.update(rank_by=["kappa"]), ["rank_by", "none of"]),
        (lambda content: content.update(seed="0"), ["seed", "'0'"]),
        (lambda content: content.update(base=None), ["base: ", "None"]),
        (lambda content: content.update(base={"name": "a", "hash": 1}), ["base.hash: 1", "a text"]),
        (lambda content: content.update(units=[]), ["units: 0 matrices, and k is 3"]),
        (lambda content: content.update(k=0), ["matrices, and k is 0"]),
        (lambda content: content.update(units="all"), ["units", "all"]),
        (lambda content: content["units"].__setitem__(1, "u1"), ["units[1]", "u1"]),
        (lambda content: content["units"][1].pop("kappa"), ["units[1] (u1.weight).kappa is missing"]),
        (lambda content: content["units"][1].update(status="ok"), ["unknown key 'units[1] (u1.weight).status'"]),
        (lambda content: content["units"][1].update(kappa=None), ["kappa", "None"]),
        (lambda content: content["units"][1].update(kappa=0.0), ["kappa", "0.0"]),
        (lambda content: content["units"][1].update(shape=[4]), ["units[1] (u1.weight).shape[1] is missing"]),
        (lambda content: content["units"][1].update(shape="4x4"), ["shape", "4x4"]),
        (lambda content: content["units"][1].update(name=3), ["name", "3"]),
        (lambda content: content["units"][1].update(name="u0.weight"), ["u0.weight", "twice"]),
    ],
)
def test_damaged_selections_are_refused(tmp_path, change, words):
    content = select(twelve_units(), k=3).to_dict()
    change(content)
    with pytest.raises(KappaTuneError, match="Not a selection") as error:
        Selection.from_dict(content)
    for word in words:
        assert word in str(error.value)
    (tmp_path / "selection.json").write_text(json.dumps(content))
    with pytest.raises(KappaTuneError, match="selection"):
        Selection.load(tmp_path / "selection.json")


@pytest.mark.parametrize("content", [None, [], "selection.json", 3])
def test_other_things_are_no_selection(content):
    with pytest.raises(KappaTuneError, match="Not a selection"):
        Selection.from_dict(content)


def test_differences():
    low, high = select(twelve_units(), k=7), select(twelve_units(), k=7, order="highest")
    assert differences(low, low) == ""
    assert differences(low, select(shuffled(twelve_units(), 1), k="60%")) == ""
    assert differences(low, high).splitlines() == [
        "3 only in the first: u0.weight, u1.weight, u2.weight",
        "3 only in the second: u9.weight, u8.weight, u7.weight",
    ]
    few = select(twelve_units(), k=1)
    assert differences(low, few) == (
        "6 only in the first: u1.weight, u2.weight, u3.weight, u4.weight, u5.weight, and 1 more"
    )


def test_differences_of_base_and_shape():
    here, there = report(row("a", shape=(2, 3))), report(row("a", shape=(3, 2)))
    there.base = {"name": "other", "hash": "4567"}
    assert differences(select(here, k=1), select(there, k=1)).splitlines() == [
        "base model: base (0123) and other (4567)",
        "1 of other shape: a",
    ]
