"""What benchmarks/one_matrix.py found, as a section of docs/RESULTS.md: rank correlations with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from kappatune_plugin.study.plots import COLOURS, MARKERS

RESAMPLES = 2000
CRITERIA = {
    "kappa": "κ",
    "kappa_over_null": "κ over that of a random matrix of the shape",
    "log_volume": "log-volume",
    "gain_over_forgetting": "measured gain over forgetting",
}
FORGOTTEN, PICTURE = "forgotten for each nat learned", "one-matrix.png"


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """The section; what there is to say of a run that hasn't ended, or of none."""
    kept, lost = useful(records), sum(each["learned"] <= 0 for each in records)
    if len(kept) < 3 * len({each["type"] for each in kept}) or not kept:
        return "## One matrix at a time\n\nNot measured yet: `python benchmarks/one_matrix.py`, then `results.py`.\n"
    learned, rises = (np.quantile([each[key] for each in kept], (0.25, 0.5, 0.75)) for key in ("learned", "rise"))
    kinds = len({each["type"] for each in kept})
    lines = [
        "## One matrix at a time: does κ say anything that shape and type don't?",
        "",
        f"`python benchmarks/one_matrix.py` trained {len(records)} matrices of {kinds} types of SmolLM2-135M-Instruct "
        "(dequantized from 4 bit), each alone and for the same few steps, at rates by which to first order all learn "
        f"the same. A matrix learned {learned[1]:.3f} nats on held-out rows (median; quartiles {learned[0]:.3f} and "
        f"{learned[2]:.3f}), and the loss on WikiText rose by {rises[1]:+.4f} ({rises[0]:+.4f} and {rises[2]:+.4f}). "
        + (f"{lost} learned nothing and are left out. " if lost else "")
        + "In the table: rank correlations (Spearman) with what was forgotten for each nat learned, over all matrices "
        "and with ranks taken within each type, so that type and shape say nothing; then, within types, with each of "
        "the two alone. 95% interval by bootstrap in brackets, bold where it leaves out zero; one task, one seed.",
        "",
        f"| | {FORGOTTEN}, all | {FORGOTTEN}, within types | learned, within types | rise, within types |",
        "|---|---|---|---|---|",
    ]
    for key, words in CRITERIA.items():
        lines.append(f"| {words} | {' | '.join(_cell(each) for each in correlations(kept, key))} |")
    return "\n".join([*lines, "", said(kept), "", f"![κ against what was forgotten](results/{PICTURE})", ""])


def useful(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of matrices that learned, with what they forgot for each nat learned."""
    return [{**each, FORGOTTEN: each["rise"] / each["learned"]} for each in records if each["learned"] > 0]


def correlations(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float, float]]:
    """Of `key` with what was forgotten for each nat over all matrices and within types, and with each part within."""
    together, types = [list(range(len(records)))], {}
    for place, each in enumerate(records):
        types.setdefault(each["type"], []).append(place)
    within = list(types.values())
    wanted = ((FORGOTTEN, together), (FORGOTTEN, within), ("learned", within), ("rise", within))
    return [correlation(records, key, other, groups) for other, groups in wanted]


def correlation(
    records: Sequence[Mapping[str, Any]], key: str, other: str, groups: Sequence[Sequence[int]]
) -> tuple[float, float, float]:
    """Spearman's correlation of ranks taken within groups, and its 95% interval over resamples of each group."""
    values = [np.array([each[name] for each in records]) for name in (key, other)]
    random = np.random.default_rng(0)
    # the matrices themselves, then resamples
    drawn = [np.vstack([group, random.choice(group, (RESAMPLES, len(group)))]) for group in map(np.array, groups)]
    x, y = (np.hstack([centered(rankdata(value[places], axis=1)) for places in drawn]) for value in values)
    with np.errstate(invalid="ignore"):
        found = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    low, high = np.nanquantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


def centered(ranks: np.ndarray) -> np.ndarray:
    """Ranks of each row around zero, divided by their number: groups of any size count alike."""
    return (ranks - ranks.mean(1, keepdims=True)) / ranks.shape[1]


def said(records: Sequence[Mapping[str, Any]]) -> str:
    """What the correlations within types mean for each criterion."""
    kinds: dict[str, list[str]] = {}
    for key, words in CRITERIA.items():
        _, low, high = correlations(records, key)[1]
        verdict = "more" if low > 0 else "less" if high < 0 else ""
        kinds.setdefault(verdict, []).append(words)
    parts = [
        f"the matrices of high {', '.join(words)} forget {verdict} for what they learn"
        for verdict, words in kinds.items()
        if verdict
    ]
    parts += [f"{', '.join(kinds[''])}: nothing that can be told from chance"] if "" in kinds else []
    return f"So among matrices of one type {'; '.join(parts)}."


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """κ of each matrix against what it forgot for each nat learned, a colour a type."""
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes, kept = figure.subplots(), useful(records)
    for place, kind in enumerate(sorted({each["type"] for each in kept})):
        points = [(each["kappa"], each[FORGOTTEN]) for each in kept if each["type"] == kind]
        axes.plot(
            *zip(*points, strict=True), MARKERS[place], color=COLOURS[place % len(COLOURS)], label=kind, markersize=5
        )
    axes.set(xscale="log", xlabel="κ", ylabel="WikiText's rise for each nat learned")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def _cell(found: tuple[float, float, float]) -> str:
    value, low, high = found
    text = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
