"""Reports: saved and loaded whole, refused when damaged, readable in a terminal of 100 columns."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from helpers.made_up_reports import report, row, twelve_units
from kappatune_plugin.condition.null_condition import null_condition
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.console import short_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.chosen_table import chosen_table
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.selection.ranking import ranked
from kappatune_plugin.selection.report import KappaReport, UnitReport
from kappatune_plugin.selection.selection import select
from kappatune_plugin.selection.table import report_table, report_tables
from kappatune_plugin.version import __version__


def printed(shown: KappaReport, *selected: str, full: bool = False) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    units = [SimpleNamespace(name=name) for name in selected]
    selection = SimpleNamespace(rank_by="kappa", units=units) if selected else None
    console.print(report_table(shown, selection, full))
    return console.export_text()


def mixture(layers: int, experts: int = 8) -> KappaReport:
    """A mixture of experts; one unit of its second layer is zero."""
    rows = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        rows.append(row(f"{prefix}.self_attn.q_proj.weight", 3456.7, (64, 64)))
        rows.append(row(f"{prefix}.mlp.gate.weight", 1.5, (8, 64), groups={"router"}))
        for expert in range(experts):
            status = "zero" if (layer, expert) == (1, 2) else "ok"
            rows.append(row(f"{prefix}.mlp.experts.{expert}.up_proj.weight", 10.0 + expert, (32, 64), status))
            rows.append(row(f"{prefix}.mlp.experts.{expert}.gate_proj.weight", 20.0 + expert, (32, 64)))
    return report(*rows, left_out={"lm_head.weight": "excluded by 'head'"})


def test_row_holds_what_was_measured():
    kappa = condition_number(torch.randn(12, 8))
    measured = UnitReport.of("a.weight", (12, 8), kappa, {"router", "head"})
    assert (measured.kappa, measured.lo, measured.hi) == (kappa.value, kappa.lo, kappa.hi)
    assert measured.groups == ("head", "router")
    assert measured.null == null_condition(12, 8)
    for key in ("status", "log_volume", "stable_rank", "sigma_max", "sigma_min", "frobenius", "method"):
        assert getattr(measured, key) == getattr(kappa, key)


@pytest.mark.parametrize("fill", [0.0, math.nan, 1.0])
def test_numbers_that_are_not_finite_are_none(fill):
    measured = UnitReport.of("a.weight", (4, 3), condition_number(torch.full((4, 3), fill)))
    assert measured.status != "ok" and measured.kappa is None and measured.hi is None and measured.log_volume is None
    assert measured.frobenius == (None if math.isnan(fill) else pytest.approx(fill * math.sqrt(12)))


def test_saved_and_loaded_is_the_same(tmp_path):
    matrices = [
        torch.randn(9, 7),
        torch.zeros(4, 4),
        torch.ones(5, 3),
        torch.full((2, 2), math.nan),
        torch.eye(3) * 1e-30,
    ]
    rows = [UnitReport.of(f"{i}.weight", tuple(w.shape), condition_number(w)) for i, w in enumerate(matrices)]
    saved = report(*rows, row("r.weight", groups={"router"}), left_out={"x.weight": "not in include"})
    saved.save(tmp_path / "deep" / "report.json")
    assert KappaReport.load(tmp_path / "deep" / "report.json") == saved
    assert {unit.status for unit in saved.units} == {"ok", "zero", "rank_deficient", "nonfinite"}


def test_file_is_strict_json_with_versions(tmp_path):
    twelve_units().save(tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["format"] == 1
    assert content["versions"] == {"torch": torch.__version__, "kappatune_plugin": __version__}
    assert content["units"][0]["shape"] == [2, 8]


def broken(tmp_path: Path, change) -> Path:
    twelve_units().save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    change(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    return tmp_path / "report.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format=2), ["format", "2"]),
        (lambda content: content.pop("units"), ["units is missing"]),
        (lambda content: content.update(extra=1), ["unknown key 'extra'"]),
        (lambda content: content.update(units={}), ["units", "list"]),
        (lambda content: content.update(base="gpt2"), ["base", "gpt2"]),
        (lambda content: content.update(base={"name": "gpt2"}), ["base.hash is missing"]),
        (lambda content: content.update(base={"name": "gpt2", "hash": 3}), ["base.hash: 3", "a text"]),
        (lambda content: content.update(dtype=32), ["dtype", "32"]),
        (lambda content: content.update(left_out=["lm_head"]), ["left_out"]),
        (lambda content: content.update(versions={"torch": 2}), ["versions"]),
        (lambda content: content["units"].__setitem__(3, 7), ["units[3]", "7"]),
        (lambda content: content["units"][0].pop("kappa"), ["units[0] (u5.weight).kappa is missing"]),
        (lambda content: content["units"][0].update(colour=1), ["unknown key 'units[0] (u5.weight).colour'"]),
        (lambda content: content["units"][0].update(kappa="6"), ["units[0] (u5.weight).kappa", "'6'"]),
        (lambda content: content["units"][0].update(kappa=True), ["kappa", "True"]),
        (lambda content: content["units"][0].update(kappa=0.5), ["kappa", "0.5", "at least 1"]),
        (lambda content: content["units"][0].update(kappa=None), ["status is ok", "None"]),
        (lambda content: content["units"][0].update(log_volume=None), ["status is ok, but log_volume is null"]),
        (lambda content: content["units"][0].update(lo=math.nan), ["lo", "nan"]),
        (lambda content: content["units"][0].update(null=None), ["null", "None"]),
        (lambda content: content["units"][0].update(status="fine"), ["status", "fine", "rank_deficient"]),
        (lambda content: content["units"][0].update(status=[]), ["status"]),
        (lambda content: content["units"][0].update(shape=[2]), ["shape[1] is missing"]),
        (lambda content: content["units"][0].update(shape=[2, 0]), ["shape[1]: 0"]),
        (lambda content: content["units"][0].update(shape=[2, 2.5]), ["shape", "2.5"]),
        (lambda content: content["units"][0].update(name=""), ["name"]),
        (lambda content: content["units"][0].update(method=None), ["method"]),
        (lambda content: content["units"][0].update(groups="router"), ["groups", "router"]),
        (lambda content: content["units"][0].update(name="u0.weight"), ["u0.weight", "twice"]),
        (lambda content: content["units"][0].update(name="lm_head.weight"), ["lm_head.weight", "twice"]),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, words):
    path = broken(tmp_path, change)
    with pytest.raises(KappaTuneError) as error:
        KappaReport.load(path)
    for word in [*words, "report.json"]:
        assert word in str(error.value)


def test_many_problems_are_counted(tmp_path):
    path = broken(tmp_path, lambda content: [unit.pop("kappa") for unit in content["units"]])
    with pytest.raises(KappaTuneError, match="and 7 more"):
        KappaReport.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "a: 1", '{"format": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(KappaTuneError, match="is not a kappa report"):
        KappaReport.load(tmp_path / "file.json")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(KappaTuneError, match="nowhere.json"):
        KappaReport.load(tmp_path / "nowhere.json")


def test_selection_file_is_no_report(tmp_path):
    select(twelve_units(), k=3).save(tmp_path / "selection.json")
    with pytest.raises(KappaTuneError, match="is not a kappa report"):
        KappaReport.load(tmp_path / "selection.json")


def test_few_units_are_shown_one_by_one():
    lines = printed(twelve_units(), "u0.weight", "u3.weight").splitlines()
    rows = [line.split() for line in lines if "4x4" in line or "2x8" in line]
    assert [cells[0] for cells in rows] == [*(f"u{i}" for i in range(10)), "deficient", "zero"]
    assert [cells[0] for cells in rows if cells[-1] == "*"] == ["u0", "u3"]
    assert rows[0][1:5] == ["4x4", "1.00", short_number(1 / null_condition(4, 4)), "ok"]
    assert rows[-1][1:] == ["4x4", "-", "-", "zero"]
    assert lines[0].strip() == "base (float32)"
    assert lines[1].strip() == "12 weight matrices, 2 trained (*), 32 values"


def test_many_units_are_grouped_by_layer_and_type():
    assert len(mixture(3).units) == 54 and "model.layers.0.mlp.experts.3.up_proj" in printed(mixture(3))
    selected = "model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.0.up_proj.weight"
    text = printed(mixture(4), *selected, full=True)
    rows = [line.split() for line in text.splitlines() if "_proj" in line or "mlp.gate" in line]
    assert len(rows) == 4 * 4
    assert rows[0] == ["layers.0", "self_attn.q_proj", "1", "64x64", "3,457", *rows[0][5:6], "ok"]
    assert rows[1][:4] == ["mlp.gate", "(router)", "1", "8x64"] and rows[1][-3:] == ["ok", "*", "1"]
    assert rows[2][:6] == ["mlp.experts.*.up_proj", "8", "32x64", "10.0", "13.5", "17.0"]
    assert rows[6][:2] == ["mlp.experts.*.up_proj", "8"] and rows[6][-2:] == ["1", "zero"]
    assert rows[10][-3:] == ["ok", "*", "1"] and rows[3][-1] == "ok"


def test_the_summary_has_a_row_a_type_and_says_what_was_taken():
    selected = "model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.0.up_proj.weight"
    text = printed(mixture(12), *selected, "model.layers.2.mlp.experts.1.up_proj.weight")
    rows = [line.split() for line in text.splitlines() if "_proj" in line or "mlp.gate" in line]
    assert [cells[0] for cells in rows] == [
        "self_attn.q_proj",
        "mlp.gate",
        "mlp.experts.*.up_proj",
        "mlp.experts.*.gate_proj",
    ]
    assert rows[1][-6:] == ["1", "in", "1", "of", "12", "layers"]
    assert rows[2][1:6] == ["96", "32x64", "10.0", "14.0", "17.0"]
    assert rows[2][-9:] == ["1", "zero", "*", "2", "in", "1", "of", "12", "layers"]
    assert "trained are" not in text
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(12)]
    assert "All 12 trained are mlp.gate: kappa follows the matrix's shape" in printed(mixture(12), *routers)


@pytest.mark.parametrize("full", [False, True])
def test_the_chosen_in_their_order_the_cut_and_what_comes_next(full):
    shown = mixture(12)
    selection = select(shown, k=40)
    ranking = ranked(shown.units, "kappa")
    assert [unit.name for unit in selection.units] == [unit.name for unit in ranking[:40]]
    table = chosen_table(shown, selection, full)
    names = [str(cell) for cell in table.columns[1].cells]
    last = ranking[36:40] if not full else ranking[8:40]
    wanted = [*ranking[:8], *last, *ranking[40:43]]
    assert [name for name in names if "more" not in name] == [unit.name.removesuffix(".weight") for unit in wanted]
    assert ("... 28 more (--table full)" in names) is not full
    places = [cell for cell in table.columns[0].cells if cell]
    assert places[-4:] == ["40", "41", "42", "43"]
    assert [row.end_section for row in table.rows].index(True) == len(table.rows) - 4
    assert len(report_tables(shown, selection)) == 2 and len(report_tables(twelve_units(), None)) == 1


def test_a_random_selection_has_no_cut():
    shown = mixture(12)
    table = chosen_table(shown, select(shown, k=5, order="random"))
    assert len(table.rows) == 5 and "random" in str(table.title)
    kappas = [float(cell) for cell in table.columns[3].cells]
    assert kappas == sorted(kappas)


def test_tables_fit_in_100_columns():
    for shown in (twelve_units(), mixture(3), mixture(12, 64)):
        for full in (False, True):
            for table in report_tables(shown, select(shown, k=5), full):
                assert Console(width=1000).measure(table).maximum <= 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kappa": 99.0}, "kappa 99 is not between lo and hi"),
        ({"kappa": 10**400}, "kappa: 1000"),
        ({"null": 0}, "null: expected a number above 0"),
        ({"frobenius": None}, "frobenius is null"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, change, words):
    path = broken(tmp_path, lambda content: content["units"][0].update(change))
    with pytest.raises(KappaTuneError, match=words):
        KappaReport.load(path)


def test_table_says_what_was_left_out():
    assert "Left out: 1 excluded by 'head'." in printed(twelve_units())
    assert "Left out" not in printed(report(row("a.weight")))
    assert "trained" not in printed(twelve_units())


def test_names_are_not_markup():
    assert "[red]a" in printed(report(row("[red]a.weight")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("layers.3", "mlp.experts.*.up_proj")),
        ("transformer.h.11.attn.c_attn.weight", ("transformer.h.11", "attn.c_attn")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", ("encoder.block.2", "layer.*.SelfAttention.q")),
        ("lm_head.weight", ("", "lm_head")),
        ("0.weight", ("", "0")),
    ],
)
def test_layer_and_type(name, expected):
    assert layer_and_type(name) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (1.0, "1.00"),
        (2.345, "2.35"),
        (148.2, "148"),
        (0.0123, "0.0123"),
        (7531.4, "7,531"),
        (3.1e7, "3.1e+07"),
    ],
)
def test_short_number(value, text):
    assert short_number(value) == text


def test_a_report_and_a_selection_are_a_line():
    shown = report(row("a", 2.0), row("b", 1234.5), row("c", status="zero"))
    assert repr(shown) == f"KappaReport(3 matrices of {shown.base['name']!r}, kappa 2 to 1.23e+03)"
    chosen = select(report(row("a", 2.0), row("b", 3.0)), k=1)
    assert repr(chosen).startswith("Selection(1 matrices of ") and repr(chosen).endswith("lowest kappa, k=1, first a)")
