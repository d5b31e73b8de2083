"""Writes docs/RESULTS.md and its pictures from the comparisons committed in docs/results.

    python benchmarks/results.py

The comparisons come from benchmarks/study.py --results docs/results.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappatune_plugin.study.plots import frontier_plot, matched_plot
from kappatune_plugin.study.statistics import interval
from kappatune_plugin.study.tables import MEASURES, shown

DOCS = Path(__file__).resolve().parents[1] / "docs"
REFERENCE = "lora"
SETTINGS = {
    "quickstart": "Quickstart, 100 steps: a mixture of experts (4 layers, 16 experts) learns the tone of letters",
    "quickstart-target": "Quickstart, every method at one rate until it is there (400 steps at most)",
    "dense-subj": "tinystories-656k, dense: is a sentence a plot or an opinion (Subj)",
    "moe-subj": "tinystories-656k upcycled to 4 experts: Subj",
    "dense-sst2": "tinystories-656k, dense: sentiment (SST-2)",
    "moe-sst2": "tinystories-656k upcycled to 4 experts: SST-2",
}
HEAD = """# Does it forget less?

Written by `python benchmarks/results.py` from the comparisons in [results](results), which
`python benchmarks/study.py --results docs/results` makes with `kappatune compare`. Change the script, not this file.
"""


def main() -> None:
    contents = committed()
    for name, content in contents.items():
        if not content["settings"]["stop_at_target"]:
            frontier_plot(content, DOCS / "results" / f"{name}-frontier.png")
        matched_plot(content, DOCS / "results" / f"{name}-matched.png")
    (DOCS / "RESULTS.md").write_text(text(contents), encoding="utf-8")


def committed() -> dict[str, Any]:
    """Setting -> its comparison, for those that there are."""
    found = {name: DOCS / "results" / f"{name}.json" for name in SETTINGS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}


def text(contents: Mapping[str, Any]) -> str:
    """docs/RESULTS.md."""
    conclusions = (DOCS / "results" / "conclusions.md").read_text(encoding="utf-8")
    return "\n".join([HEAD, conclusions, how(contents), *(setting(name, each) for name, each in contents.items())])


def how(contents: Mapping[str, Any]) -> str:
    """What was run, from the files themselves."""
    rows = [
        "| setting | parameters | steps | batch | learning rates | seeds | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, content in contents.items():
        settings, target = content["settings"], content["target_loss"]
        rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
        given = "given" if settings["target_loss"] is not None else "the worst run's best"
        rows.append(
            f"| {name} | {content['parameters']:,} | {content['steps']} | "
            f"{content['recipe']['per_device_train_batch_size']} | {rates} | {len(settings['seeds'])} | "
            f"{target:.3f} ({given}) |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in next(iter(contents.values()))["versions"].items())
    return f"""## How it was measured

Every method trains a copy of the same base on the same batches in the same order. Its learning rate is that of lowest
loss on a tenth of the training rows, held out for that, with the first seed. KappaTune methods, LoRA and OSF train as
many parameters as the κ-lowest selection does, as near as whole matrices and ranks allow; full fine-tuning trains all.
Forgetting is the rise of the loss on control text that the task doesn't touch, in nats a token. It is compared when the
training loss, smoothed over {next(iter(contents.values()))["settings"]["smooth"]} steps, first reaches a target, and
after equal steps. ± is the 95% interval of Student's t over seeds; intervals of three seeds are wide.

{chr(10).join(rows)}

{versions}, one CPU thread. Seconds in the files are of a busy machine and not to be compared.
"""


def setting(name: str, content: Mapping[str, Any]) -> str:
    """A section: tables, what the KappaTune methods chose, and pictures."""
    target = content["target_loss"]
    parts = [
        f"## {SETTINGS[name]}\n",
        f"Before training: {before(content)}.\n",
        f"When the smoothed training loss first reaches {target:.3f}:\n",
        table(content, "matched"),
        f"\n![forgotten at the target](results/{name}-matched.png)\n",
    ]
    if not content["settings"]["stop_at_target"]:
        parts += [
            f"After {content['steps']} steps:\n",
            table(content, "final"),
            f"\n![learned against forgotten](results/{name}-frontier.png)\n",
        ]
    return "\n".join([*parts, "What they train (first seed), of each type of matrix:\n", choices(content), ""])


def choices(content: Mapping[str, Any]) -> str:
    """A Markdown list of what each KappaTune method chose."""
    lines = []
    for method in content["methods"]:
        if method["trains"]:
            each = ", ".join(f"{count} {kind}" for kind, count in sorted(method["trains"].items()))
            lines.append(f"- `{method['name']}`: {each}")
    return "\n".join(lines)


def before(content: Mapping[str, Any]) -> str:
    base = content["before"]
    controls = [f"{key[:-4]} perplexity {value:.2f}" for key, value in base.items() if key.endswith("_ppl")]
    recall = [f"recall {base['recall']:.1%}"] if "recall" in base else []
    return ", ".join([f"task accuracy {base['task_accuracy']:.1%}", *controls, *recall])


def table(content: Mapping[str, Any], where: str) -> str:
    """A Markdown table of the measures, with the difference from LoRA of what was forgotten, paired by seed."""
    keys = [key for key in MEASURES if any(key in (method[where] or {}) for method in content["methods"])]
    headings = [MEASURES[key][0].replace("\n", " ") for key in keys]
    heading = ["method", "rate", "trained", "steps", *headings, f"control loss against {REFERENCE}"]
    rows = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    reference = next((method for method in content["methods"] if method["name"] == REFERENCE), None)
    seeds = len(content["settings"]["seeds"])
    for method in content["methods"]:
        found = method[where]
        cells = [f"`{method['name']}`", f"{method['learning_rate']:g}", f"{method['trainable']['mean']:,.0f}"]
        if found is None:
            lowest = min(value for value in method["lowest_loss"]["values"] if value is not None)
            cells += [f"not reached (lowest {lowest:.3f})", *("" for _ in keys), ""]
        else:
            reached = sum(value is not None for value in found["step"]["values"])
            steps = f"{found['step']['mean']:.0f}" + ("" if reached == seeds else f" ({reached} of {seeds} seeds)")
            cells += [steps, *(shown(found.get(key), MEASURES[key][1]) for key in keys)]
            cells.append(against(found, reference[where] if reference and method is not reference else None))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def against(found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    """The paired difference of what was forgotten, in bold where its interval leaves out zero."""
    if reference is None:
        return ""
    pairs = zip(found["control_loss_change"]["values"], reference["control_loss_change"]["values"], strict=True)
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return ""
    each = interval(differences)
    text = shown({"mean": each.mean, "half": each.half}, "{:+.3f}")
    return f"**{text}**" if each.half is not None and abs(each.mean) > each.half else text


if __name__ == "__main__":
    main()
