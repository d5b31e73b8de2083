"""What docs/RESULTS.md calls models and tasks, and its table of every method."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kappatune_plugin.console import number
from kappatune_plugin.study.summary import within_limit
from kappatune_plugin.study.tables import MEASURES, shown

MODELS = {
    "smollm2": "SmolLM2-135M-Instruct (dequantized from 4 bit)",
    "mixture": "A mixture of 8 experts made of SmolLM2-135M-Instruct (dequantized from 4 bit)",
    "gemma3": "Gemma 3 270M (dequantized from 4 bit)",
    "olmoe": "OLMoE-1B-7B",
    "deepseek": "DeepSeek-V2-Lite",
    "llama32": "Llama-3.2-3B",
}
# those of benchmarks/study_gpu.py
LARGER = ("olmoe", "deepseek", "llama32")
# what was learned, on test rows
LOSS, RIGHT = "task_loss", "task_accuracy"
TASKS = {
    "irony": "irony of tweets",
    "sst2": "tone of film reviews (SST-2)",
    "gsm8k": "sums in words (GSM8K), free answers",
    "irony_no_end": "irony of tweets, end token left out",
    "irony_per_matrix": "irony of tweets, also a scale a matrix",
    "sst2_per_matrix": "tone of film reviews (SST-2), also a scale a matrix",
}
LEGEND = """Within each limit: right answers on test rows; loss; × the share kept of what was trained (of a scale a
matrix the median). Then all that was trained, its rise of the control that rose most, and the task that was only asked.
"""


def words_of(setting: str) -> str:
    """A setting's model and task."""
    model, task = setting.split("-")
    return f"{MODELS[model]}: {TASKS[task]}"


def limits_of(contents: Iterable[Mapping[str, Any]]) -> list[float]:
    """All limits of forgetting, in order."""
    return sorted({limit for each in contents for limit in each["settings"]["frontier"]["limits"]})


def within(limits: Iterable[float]) -> list[str]:
    """Heads of the columns of a table that has one for each limit."""
    return [f"{limit:g} nats" for limit in limits]


def head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def every_method(content: Mapping[str, Any]) -> str:
    """A comparison's table: each method at its rate, within each limit and whole."""
    limits = limits_of([content])
    heads = ["method", "rate", "trained", *(f"{limit:g}" for limit in limits), "all kept", "rise", "the other task"]
    rows = head(heads)
    for method in content["methods"]:
        cells = [f"`{method['name']}`", f"{method['learning_rate']:g}", f"{method['trainable']['mean']:,.0f}"]
        if "points" not in method["frontier"]:
            rows.append("| " + " | ".join([*cells, method["frontier"]["why_not"], *[""] * (len(heads) - 4)]) + " |")
            continue
        whole = method["frontier"]["points"][-1]
        cells += [_cell(within_limit(method, place)) for place in range(len(limits))]
        cells += [_cell(whole), shown(whole["rise"], "{:+.3f}"), shown(whole.get("recall"), "{:.1%}")]
        rows.append("| " + " | ".join(cells) + " |")
        each = [_cell(within_limit(method, place, "per_matrix")) for place in range(len(limits))]
        if any(each):
            rows.append("| " + " | ".join(["a scale a matrix", "", "", *each, "", "", ""]) + " |")
    return "\n".join(rows)


def _cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return ""
    parts = [shown(point[each], MEASURES[each][1]) for each in (RIGHT, LOSS) if each in point]
    scale = number("{:.2f}", point["scale"]["mean"]) if point["scale"] else "-"
    return "; ".join([*parts, f"×{scale}"])
