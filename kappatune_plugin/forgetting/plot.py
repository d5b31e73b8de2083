"""What a run learned and forgot, as a picture."""

import os
import tempfile
from pathlib import Path

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.report import ForgettingReport

PICTURE = "forgetting.png"
BLUE, ORANGE = "#0072B2", "#D55E00"


def plot_forgetting(report: ForgettingReport, folder: Path) -> None:
    """Draw forgetting.png into `folder`: a panel for the task and each control, from the base to what is kept.

    Raises:
        KappaTuneError: the file can't be written.
    """
    from matplotlib.figure import Figure

    later = [(f"step {step['step']}", step) for step in report.steps] + [("trained", report.after)]
    points = [("base", report.before), *later, *([("kept", report.kept)] if report.kept else [])]
    panels = [(title, key) for title, key, _ in report.rows() if not key.endswith("_ppl")]
    figure = Figure(figsize=(max(4.0, 3.6 * len(panels)), 3.4), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = [(label, measured[key]) for label, measured in points if key in measured]
        axes.plot([label for label, _ in found], [value for _, value in found], "o-", color=BLUE)
        axes.axhline(found[0][1], color=ORANGE, linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", rotation=45 if len(found) > 3 else 0, labelsize=8)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{PICTURE}.") as beside:
            figure.savefig(Path(beside) / PICTURE, dpi=120)
            os.replace(Path(beside) / PICTURE, folder / PICTURE)
    except OSError as error:
        raise KappaTuneError(f"Can't write {folder / PICTURE}: {error}. Give a folder to write to.") from error
