"""Plots: what is drawn is what the report says; that they can be read was looked at."""

import pytest
import torch

from helpers.made_up_reports import report, row
from helpers.tiny import tiny_model
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.plot import _by_type, _figure, growth_with_depth, plot_report
from kappatune_plugin.selection.selection import select


def layers(*kappas: float, kind: str = "mlp.up_proj") -> list:
    return [row(f"model.layers.{i}.{kind}.weight", kappa) for i, kappa in enumerate(kappas)]


def test_growth_with_depth_is_relative_to_each_type():
    rows = [*layers(1, 2, 4, 8), *layers(100, 200, 400, 800, kind="self_attn.q_proj"), row("lm_head.weight", 3.0)]
    assert growth_with_depth(rows) == ([0, 1, 2, 3], pytest.approx([1 / 3, 2 / 3, 4 / 3, 8 / 3]), pytest.approx(1.0))
    assert growth_with_depth(layers(8, 4, 2, 1))[2] == pytest.approx(-1.0)
    assert abs(growth_with_depth(layers(1, 3, 2, 1.5))[2]) < 0.5
    assert growth_with_depth(layers(1, 2))[2] != growth_with_depth(layers(1, 2))[2]
    assert growth_with_depth([row("lm_head.weight")])[:2] == ([], [])
    # equal medians share a rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert growth_with_depth(layers(1, 2, 2, 3))[2] == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_growth_of_an_encoder():
    """Of BERT's names too: matrices made worse with depth show, whatever their type."""
    model = tiny_model("bert", num_hidden_layers=6)
    with torch.no_grad():
        for depth, layer in enumerate(model.bert.encoder.layer):
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.copy_(torch.eye(*weight.shape))
                    weight[0, 0] = 1 + depth
    assert growth_with_depth(scan(model, progress=False).units)[2] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["bert", "olmoe", "gpt_oss"])
def test_plot_of_a_model(tmp_path, kind):
    plot_report(scan(tiny_model(kind), progress=False, exclude=()), tmp_path / "new" / "kappa.png")
    content = (tmp_path / "new" / "kappa.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kappa.png"]


def test_plot_without_layers_and_of_many_types(tmp_path):
    plot_report(report(row("weight", 2.0)), tmp_path / "one.svg")
    assert "kappa" in (tmp_path / "one.svg").read_text()
    rows = [each for i in range(30) for each in layers(1.0 + i, 2.0 + i, kind=f"kind{i}.proj")]
    plot_report(report(*rows), tmp_path / "many.svg")
    assert "14 types not drawn" in (tmp_path / "many.svg").read_text()


def test_title_counts_what_has_a_condition_number():
    rows = [row("a.weight", 2.0), row("b.weight", 3.0), row("c.weight", status="zero")]
    for count, name in ((2, "condition numbers of 2 matrices"), (3, "condition numbers of 2 of 3 matrices")):
        made = report(*rows[:count])
        title = _figure(made, _by_type([unit for unit in made.units if unit.status == "ok"])).get_suptitle()
        assert title == f"base: {name}"


def test_the_selection_and_its_cut_are_marked():
    made = report(*layers(1, 2, 4, 8), *layers(3, 5, 6, 7, kind="self_attn.q_proj"))
    figure = _figure(made, _by_type(made.units), select(made, k=3))
    histograms, heat_map, _ = (
        part for each in figure.subfigs for part in each.axes if part.get_label() != "<colorbar>"
    )
    assert [line.get_xdata()[0] for line in histograms.lines if line.get_linestyle() == "--"] == [3.0]
    dots = [tuple(dot.get_offsets()[0]) for dot in heat_map.collections]
    assert dots == [(0, 0), (1, 0), (0, 1)]
    # without a cut along kappa there is no line
    random = _figure(made, _by_type(made.units), select(made, k=3, order="random")).subfigs[0].axes[0]
    assert not [line for line in random.lines if line.get_linestyle() == "--"]


def test_an_outlier_does_not_take_the_colours():
    made = report(*layers(*range(2, 40), 1e9))
    image = _figure(made, _by_type(made.units)).subfigs[0].axes[1].images[0]
    assert image.get_clim()[1] < 1e4


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(KappaTuneError, match="nothing to draw"):
        plot_report(report(row("a.weight", status="zero")), tmp_path / "kappa.png")
    with pytest.raises(KappaTuneError, match="kappa.txt"):
        plot_report(report(row("a.weight")), tmp_path / "kappa.txt")
    with pytest.raises(KappaTuneError, match="kappa: its ending is none of .*.png"):
        plot_report(report(row("a.weight")), tmp_path / "kappa")
    assert not list(tmp_path.iterdir())
