"""What benchmarks/speech.py found, a picture and a section of docs/RESULTS-small-models.md; the settings both know."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ORDERS, K = ("lowest", "highest", "random"), "45%"
CTC_STEPS = 500
# stage 1 and stage 2; LOOKS are the steps of stage 2 at which is measured
BATCH, STEPS, RATES, LOOKS = 8, (100, 24), (4e-3, 3e-4), (8, 16, 24)


def curves(records: list[dict[str, Any]], order: str, key: str) -> np.ndarray:
    """`key` of an order's runs at LOOKS, before them what stage 1 ended with: shape (runs, 1 + looks)."""
    first = next(each for each in records if each["order"] is None)["curve"][-1][key]
    found = [[first, *(point[key] for point in each["curve"])] for each in records if each["order"] == order]
    return np.array(found)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Word errors against the steps of stage 2, and the loss on text below; each run a thin line, means thick."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, key in ((above, "wer"), (below, "text_loss")):
        for number, order in enumerate(ORDERS):
            runs = curves(records, order, key)
            axes.plot((0, *LOOKS), runs.T, color=f"C{number}", alpha=0.3, linewidth=0.8)
            axes.plot((0, *LOOKS), runs.mean(0), color=f"C{number}", linewidth=2, label=f"{order} kappa")
    above.set(ylabel="word error rate, 48 recordings", title="Stage 2: K = 45% of the text model's matrices")
    below.set(ylabel="loss on Wikipedia (nats a token)", xlabel="steps of stage 2")
    above.legend()
    figure.savefig(path, dpi=110)


def section(records: list[dict[str, Any]]) -> str:
    """What the records say, as the section of docs/RESULTS-small-models.md."""
    first = next(each for each in records if each["order"] is None)["curve"][-1]
    seeds = {order: sum(each["order"] == order for each in records) for order in ORDERS}
    lines = [
        "## Speech: SmolLM2-135M-Instruct learns to hear digits",
        "",
        "From `docs/results/speech.jsonl`, which `python benchmarks/speech.py` makes. A small encoder (2 layers,",
        f"trained by CTC for {CTC_STEPS} steps, then frozen) and a projector feed the text model, all 30 layers of it.",
        "Two digits said by one speaker of FSDD, one after the other; tests are takes that training never saw, said",
        f"by the same six speakers. Stage 1: the projector alone, {STEPS[0]} steps of {BATCH} at {RATES[0]:g}.",
        f"Stage 2, from there: the projector and {K} of the 210 matrices, {STEPS[1]} steps at {RATES[1]:g}, all orders",
        "at this one rate, chosen for none of them; equal numbers of matrices, so unequal numbers of parameters. A",
        "seed deals the rows and draws the random matrices. Standard deviation over seeds behind the ±; digits are",
        "compared without case and punctuation.",
        "",
        f"After stage 1: word error rate {first['wer']:.3f}, loss on Wikipedia {first['text_loss']:.3f} nats a token.",
        "",
        "| K matrices of | seeds | trained parameters | "
        + " | ".join(f"WER, step {step}" for step in LOOKS)
        + f" | loss on Wikipedia, step {LOOKS[-1]} | change |",
        "|---|---|---|" + "---|" * (len(LOOKS) + 2),
    ]
    for order in ORDERS:
        wer, text = curves(records, order, "wer"), curves(records, order, "text_loss")
        sizes = [each["parameters"] for each in records if each["order"] == order]
        cells = [f"{order} kappa" if order != "random" else order, str(seeds[order]), f"{np.mean(sizes) / 1e6:.1f}M"]
        cells += [_mean(wer[:, place]) for place in range(1, 1 + len(LOOKS))]
        cells += [_mean(text[:, -1]), f"{(text[:, -1] - text[:, 0]).mean():+.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![](results/speech.png)", "", *_said(records)]) + "\n"


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def _said(records: list[dict[str, Any]]) -> list[str]:
    """The order of the curves in the end, and how far apart they are beside the spread of seeds and of recordings."""
    last = {order: curves(records, order, "wer")[:, -1] for order in ORDERS}
    ranked = sorted(ORDERS, key=lambda order: last[order].mean())
    gap = last[ranked[-1]].mean() - last[ranked[0]].mean()
    spread = max(each.std(ddof=1) if len(each) > 1 else 0 for each in last.values())
    text = {order: curves(records, order, "text_loss")[:, -1].mean() for order in ORDERS}
    least, most = (pick(text, key=text.get) for pick in (min, max))
    telling = "more" if gap > spread else "no more"
    return [
        f"In the end fewest words are wrong with {ranked[0]}, then {ranked[1]}, then {ranked[2]}: {gap:.3f} between",
        f"the first and the last, which is {telling} than the standard deviation between seeds (up to {spread:.3f});",
        "with 96 words a share of a half has a standard error of 0.05 besides. The loss on Wikipedia is lowest with",
        f"{least} and highest with {most}, {text[most] - text[least]:.3f} nats apart. The paper's model has 8",
        "billion parameters and real speech to learn from; this is far smaller, and so short that no curve has ended:",
        "whether the highest degrade after initial gains, as in the paper, it can't show.",
    ]
