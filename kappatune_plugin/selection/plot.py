"""A plot of kappa by layer and type, to see whether it follows the type, the shape or the depth."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import check_replaceable
from kappatune_plugin.selection.names import layer_and_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kappatune_plugin.selection.report import KappaReport, UnitReport
    from kappatune_plugin.selection.selection import Selection

# type -> layer (None outside of layers) -> kappas
Types = Mapping[str, Mapping[int | None, Sequence[float]]]

# rows beyond these would be too small to read
TYPES_SHOWN = 16
BINS = 40
# colour-blind safe: Okabe and Ito (2008); so is the heat map's cividis
BLUE, ORANGE, GREY, YELLOW = "#0072B2", "#D55E00", "#999999", "#F0E442"
# of the medians that the heat map's colours tell apart; what lies outside has the colour of the end
COLOURED = 0.03, 0.97
# how pictures begin: PNG, PDF and PostScript, SVG (also packed), JPEG, WebP, TIFF
PICTURE = "\ufffdPNG|%|<\\?xml|\x1f|\ufffd\ufffd\ufffd|RIFF|II|MM"
WIDTH, ROW, DEPTH_ROW, MARGIN = 10.0, 0.34, 2.3, 1.9


def plot_report(report: "KappaReport", path: str | os.PathLike, selection: "Selection | None" = None) -> None:
    """Draw a kappa report into `path`, whose ending gives the format (.png, .svg, .pdf).

    A row for each type of matrix: a histogram of its kappas, and its median in each layer as a heat map. Below, kappa
    relative to its type's median against depth. What `selection` takes is marked in both, and where it cuts.

    Raises:
        KappaTuneError: no matrix to draw, or the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    check_format(path)
    types = _by_type([unit for unit in report.units if unit.status == "ok"])
    if not types:
        raise KappaTuneError("There is nothing to draw: the report has no matrix with a condition number.")
    figure = _figure(report, types, selection)
    path = Path(path)
    check_replaceable(path, PICTURE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            figure.savefig(Path(folder) / path.name, dpi=150)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise KappaTuneError(f"Can't write the plot {path}: {error}. Give a file such as kappa.png.") from error


def check_format(path: str | os.PathLike) -> None:
    """Raise KappaTuneError if matplotlib writes no files with the ending of `path`."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in known:
        endings = ", ".join(f".{each}" for each in sorted(known))
        raise KappaTuneError(
            f"Can't write the plot {path}: its ending is none of {endings}. Give a file such as kappa.png."
        )


def growth_with_depth(units: Sequence["UnitReport"]) -> tuple[list[int], list[float], float]:
    """Whether kappa grows with depth.

    Returns:
        The layers; for each the median over types of kappa relative to the type's median over all layers; and
        Spearman's rank correlation of the two (nan for fewer than three layers).
    """
    relative: dict[int, list[float]] = {}
    for values in _by_type([unit for unit in units if unit.status == "ok"]).values():
        medians = {layer: median(kappas) for layer, kappas in values.items() if layer is not None}
        for layer, value in medians.items():
            relative.setdefault(layer, []).append(value / median(medians.values()))
    layers = sorted(relative)
    medians = [median(relative[layer]) for layer in layers]
    if len(layers) < 3 or len(set(medians)) == 1:
        return layers, medians, float("nan")
    from scipy.stats import spearmanr

    return layers, medians, float(spearmanr(layers, medians)[0])


def _by_type(units: Sequence["UnitReport"]) -> dict[str, dict[int | None, list[float]]]:
    """Type -> layer (None outside of layers) -> kappas, in the model's order."""
    places = [(*layer_and_type(unit.name), unit.kappa) for unit in units]
    stacks = {layer.rpartition(".")[0] for layer, _, _ in places if layer}
    found: dict[str, dict[int | None, list[float]]] = {}
    for layer, kind, kappa in places:
        stack, _, number = layer.rpartition(".")
        name = f"{stack}: {kind}" if layer and len(stacks) > 1 else kind
        found.setdefault(name, {}).setdefault(int(number) if layer else None, []).append(kappa)
    return found


def _figure(report: "KappaReport", types: Types, selection: "Selection | None" = None) -> "Figure":
    from matplotlib.figure import Figure

    shown = dict(sorted(types.items(), key=lambda item: -sum(map(len, item[1].values())))[:TYPES_SHOWN])
    shown = {kind: types[kind] for kind in types if kind in shown}
    layers = sorted({layer for values in shown.values() for layer in values if layer is not None})
    height = MARGIN + ROW * len(shown) + (DEPTH_ROW if len(layers) > 1 else 0)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=[height - DEPTH_ROW, DEPTH_ROW]) if len(layers) > 1 else [figure]
    left, right = rows[0].subplots(1, 2, width_ratios=[1, 1.35], sharey=True)
    names = {unit.name for unit in selection.units} if selection else set()
    chosen = _by_type([unit for unit in report.units if unit.status == "ok" and unit.name in names])
    _histograms(left, shown, chosen)
    if selection and selection.rank_by == "kappa" and selection.order in ("lowest", "highest"):
        left.axvline(selection.units[-1].kappa, color="black", linewidth=0.8, linestyle="--")
    _heat_map(right, shown, layers, chosen)
    if len(layers) > 1:
        _depth(rows[1].subplots(), shown, report.units)
    left_out = len(types) - len(shown)
    more = f", {left_out} types not drawn" if left_out else ""
    known, total = sum(unit.status == "ok" for unit in report.units), len(report.units)
    count = f"{total}" if known == total else f"{known} of {total}"
    figure.suptitle(f"{report.base['name']}: condition numbers of {count} matrices{more}", fontsize=12)
    return figure


def _histograms(axes: "Axes", types: Types, chosen: Types) -> None:
    kappas = {kind: _all(values) for kind, values in types.items()}
    ends = [number(min_or_max(each) for each in kappas.values()) for number, min_or_max in ((min, min), (max, max))]
    bins = np.geomspace(max(1.0, ends[0] / 1.1), ends[1] * 1.1, BINS + 1)
    for row, (kind, values) in enumerate(kappas.items()):
        counts, _ = np.histogram(values, bins)
        taken, _ = np.histogram(_all(chosen.get(kind, {})), bins)
        for part, colour in ((counts, BLUE), (taken, YELLOW)):
            heights = -0.85 * part / counts.max()
            axes.bar(bins[:-1], heights, np.diff(bins), bottom=row + 0.42, align="edge", color=colour)
        axes.plot([median(values)] * 2, [row - 0.43, row + 0.42], color=ORANGE, linewidth=1.5)
    says = "line: median; yellow: trained" if chosen else "line: median"
    axes.set(xscale="log", xlabel=f"kappa ({says})", ylim=(len(types) - 0.5, -0.5), xlim=(bins[0], bins[-1]))
    axes.set_yticks(range(len(types)), list(types), fontsize=9)
    axes.set_title("by type", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _all(values: Mapping[int | None, Sequence[float]]) -> list[float]:
    return [kappa for each in values.values() for kappa in each]


def _heat_map(axes: "Axes", types: Types, layers: Sequence[int], chosen: Types) -> None:
    from matplotlib.colors import LogNorm

    table = np.full((len(types), max(1, len(layers))), np.nan)
    marks = []
    for row, (kind, values) in enumerate(types.items()):
        for column, layer in enumerate(layers):
            if layer in values:
                table[row, column] = median(values[layer])
                share = len(chosen.get(kind, {}).get(layer, ())) / len(values[layer])
                marks += [(column, row, share)] if share else []
    axes.set_title("median by layer" + (" (dots: share that is trained)" if marks else ""), fontsize=10)
    axes.set_facecolor("#EEEEEE")
    axes.tick_params(labelleft=False)
    if not layers:
        axes.set_xticks([])
        return
    low, high = np.nanquantile(table, COLOURED)
    image = axes.imshow(table, aspect="auto", cmap="cividis", norm=LogNorm(low, max(high, low * 1.01)))
    for column, row, share in marks:
        axes.scatter(column, row, s=4 + 26 * share, color="white", edgecolors="black", linewidths=0.6)
    step = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("layer")
    axes.figure.colorbar(image, ax=axes, label="kappa", extend="both")


def _depth(axes: "Axes", types: Types, units: Sequence["UnitReport"]) -> None:
    axes.set_yscale("log")
    drawn = []
    for values in types.values():
        medians = {layer: median(kappas) for layer, kappas in values.items() if layer is not None}
        relative = [each / median(medians.values()) for each in medians.values()]
        axes.plot(list(medians), relative, color=GREY, linewidth=0.8)
        drawn += relative
    layers, medians, correlation = growth_with_depth(units)
    # so that a few outliers don't hide the course of the median
    low, high = np.quantile(drawn, [0.1, 0.9])
    axes.set_ylim(min(low, *medians) / 1.2, max(high, *medians) * 1.2)
    axes.plot(layers, medians, color=BLUE, linewidth=2.5, marker="o", markersize=4)
    axes.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="layer", ylabel="kappa / type's median")
    # no label 0.9 that overlaps with 1
    axes.yaxis.get_minor_locator().set_params(subs=(2, 3, 5, 7))
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    says = "" if np.isnan(correlation) else f", Spearman's correlation of the median with depth: {correlation:+.2f}"
    axes.set_title(f"by depth (grey: each type, blue: median){says}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
