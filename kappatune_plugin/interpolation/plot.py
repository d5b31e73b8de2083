"""What was kept of a training, as a picture."""

import os
import tempfile
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.interpolation.dial import Dialed
from kappatune_plugin.selection.names import layer_and_type

# of Okabe and Ito (2008), told apart by all eyes
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def plot_dial(dialed: Dialed, path: str | os.PathLike) -> None:
    """Draw into `path`: the task's loss against the control's rise along one scale for all, with what was kept, and
    the scales by layer and type.

    Raises:
        KappaTuneError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    _frontier(left, dialed)
    _heat_map(right, dialed)
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            figure.savefig(Path(folder) / path.name, dpi=150)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise KappaTuneError(f"Can't write the picture {path}: {error}. Give a folder to write to.") from error


def _frontier(axes: Axes, dialed: Dialed) -> None:
    rises, losses = ([point[key] for point in dialed.frontier] for key in ("control_rise", "task_loss"))
    axes.plot(rises, losses, "o-", color=BLUE, label="one scale for all")
    for point, rise, loss in zip(dialed.frontier, rises, losses, strict=True):
        axes.annotate(f"{point['alpha']:.2g}", (rise, loss), textcoords="offset points", xytext=(5, 4), fontsize=8)
    kept = max(rise.mean for rise in dialed.verified.values())
    axes.plot([kept], [dialed.task["kept"]], "D", color=ORANGE, label=f"kept ({dialed.mode.replace('_', ' ')})")
    axes.axvline(dialed.limit, color=GREY, linestyle="--", label="limit")
    axes.set(xlabel="rise of the control loss (nats a token)", ylabel="task loss on held-out rows (nats a token)")
    axes.legend(fontsize=8)


def _heat_map(axes: Axes, dialed: Dialed) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for name, alpha in dialed.alphas.items():
        layer, kind = layer_and_type(name)
        found.setdefault(kind, {}).setdefault(layer, []).append(alpha)
    layers = list(dict.fromkeys(layer for values in found.values() for layer in values))
    layers.sort(key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2] or -1)))
    rows = [[mean(values[layer]) if layer in values else float("nan") for layer in layers] for values in found.values()]
    image = axes.imshow(rows, vmin=0, vmax=1, aspect="auto", cmap="cividis")
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_xticks(range(len(layers)), [layer.rpartition(".")[2] for layer in layers], fontsize=8)
    axes.set(xlabel="layer", title="mean scale (0: the base, 1: as trained)")
    axes.figure.colorbar(image, ax=axes)
