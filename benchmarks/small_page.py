"""docs/RESULTS-small-models.md: the comparisons on models of 0.7 to 4.5 million parameters, and earlier ones."""

from collections.abc import Mapping
from typing import Any

import speech_results
from figures import against, gentlest
from small_conclusions import conclusions

from kappatune_plugin.console import number
from kappatune_plugin.study.plots import budget_plot, frontier_plot, matched_plot
from kappatune_plugin.study.tables import MEASURES, shown

# differences are from the first of them that a comparison has
REFERENCES = ("lora", "lowest")
SETTINGS = {
    "quickstart": "Quickstart, 100 steps: a mixture of experts (4 layers, 16 experts) learns the tone of letters",
    "quickstart-target": "Quickstart, every method at one rate until it is there (400 steps at most)",
    "quickstart-sweep": "Quickstart: how many matrices",
    "dense-subj": "tinystories-656k, dense: is a sentence a plot or an opinion (Subj)",
    "moe-subj": "tinystories-656k upcycled to 4 experts: Subj",
    "dense-sst2": "tinystories-656k, dense: sentiment (SST-2)",
    "moe-sst2": "tinystories-656k upcycled to 4 experts: SST-2",
    "dense-subj-choices": "tinystories-656k, dense, Subj: every choice of matrices at one rate",
    "moe-subj-choices": "tinystories-656k upcycled to 4 experts, Subj: every choice of matrices at one rate",
    "moe-subj-sweep": "tinystories-656k upcycled to 4 experts, Subj: how many matrices",
}
HEAD = """# Small models, and earlier studies

Written by `python benchmarks/results.py` from the comparisons in `docs/results`, which
`python benchmarks/study.py --results docs/results` makes with `kappatune compare`. Change the script, not this file.
What real models did is on [another page](RESULTS.md).
"""
PICTURES = {
    "matched": matched_plot,
    "frontier": frontier_plot,
    "budgets": lambda content, path: budget_plot(content, path, content["recommendation"]["method"]),
}


def pictures(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of plot that a comparison or sweep has data for."""
    if "recommendation" in content:
        return ("budgets",)
    return ("matched",) if content["settings"]["stop_at_target"] else ("matched", "frontier")


def text(contents: Mapping[str, Any], heard: list[dict[str, Any]], earlier: str) -> str:
    """The page.

    Args:
        contents: setting -> its comparison.
        heard: the records of benchmarks/speech.py.
        earlier: a section at the end.
    """
    sections = [setting(name, each) for name, each in contents.items()]
    return "\n".join([HEAD, conclusions(contents), how(contents), *sections, speech_results.section(heard), earlier])


def how(contents: Mapping[str, Any]) -> str:
    """How it was measured, from the files themselves."""
    rows = [
        "| setting | parameters | steps | batch | mean over | learning rates | seeds | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, content in contents.items():
        settings, target = content["settings"], content["target_loss"]
        rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
        rates += f" and {settings['widen']} more" if settings.get("widen") else ""
        given = "given" if settings["target_loss"] is not None else "the worst run's best"
        cells = (
            name,
            f"{content['parameters']:,}",
            content["steps"],
            content["recipe"]["per_device_train_batch_size"],
            settings["smooth"],
            rates,
            len(settings["seeds"]),
            f"{target:.3f} ({given})",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in next(iter(contents.values()))["versions"].items())
    return f"""## How it was measured

Every method trains a copy of the same base on the same batches in the same order. Its learning rate is that of lowest
loss on a tenth of the training rows, held out for that, with the first seed. KappaTune methods, LoRA and OSF train as
many parameters as the κ-lowest selection does, as near as whole matrices and ranks allow; OSF adapts no fused experts,
so it trains fewer where there are some, and full fine-tuning trains all.

Forgetting is the rise of the loss on control text that the task doesn't touch, in nats a token. It is compared when the
training loss, as a mean over the last 8 or 16 steps, first reaches a target, and after equal steps. ± is the 95%
interval of Student's t over seeds; intervals of three seeds are wide. Where the best rate of a method is at the edge of
its grid, the next one beyond it is tried too, as often as the table says.

{chr(10).join(rows)}

{versions}, one CPU thread. Seconds in the files are of a busy machine and not to be compared.
"""


def setting(name: str, content: Mapping[str, Any]) -> str:
    """A section: tables, pictures, and what the KappaTune methods chose."""
    parts = [f"## {SETTINGS[name]}\n", f"Before training: {before(content)}.\n"]
    if "recommendation" not in content:
        parts += [f"When the smoothed training loss first reaches {content['target_loss']:.3f}:\n"]
        parts += [table(content, "matched"), f"\n![forgotten at the target](results/{name}-matched.png)\n"]
    if not content["settings"]["stop_at_target"]:
        parts += [f"After {content['steps']} steps:\n", table(content, "final"), ""]
    if "recommendation" in content:
        parts += [f"`kappatune sweep` says: {content['recommendation']['why']}\n"]
        return "\n".join([*parts, f"![learned and forgotten by budget](results/{name}-budgets.png)\n"])
    if "frontier" in pictures(content):
        parts += [f"![learned against forgotten](results/{name}-frontier.png)\n"]
    parts += rates_table(content)
    return "\n".join([*parts, "What they train (first seed), of each type of matrix:\n", choices(content), ""])


def rates_table(content: Mapping[str, Any]) -> list[str]:
    """A Markdown table of what each learning rate forgets, if the file has several."""
    found = {
        method["name"]: {float(rate): tried for rate, tried in method["grid"].items() if tried.get("final")}
        for method in content["methods"]
    }
    rates = sorted({rate for grid in found.values() for rate in grid})
    if len(rates) < 2:
        return []
    rows = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method in content["methods"]:
        cells = []
        for rate in rates:
            tried = found[method["name"]].get(rate)
            cell = "" if tried is None else rate_cell(tried)
            cells.append(f"**{cell}**" if rate == method["learning_rate"] else cell)
        rows.append(f"| `{method['name']}` | " + " | ".join(cells) + " |")
    heading = (
        f"What each learning rate has forgotten after {content['steps']} steps (control loss), and in brackets the "
        "loss on held-out rows by which the rate in bold was chosen; first seed:\n"
    )
    found_gentle = sorted(gentlest(content).items(), key=lambda item: item[1][1])
    gentle = ", ".join(f"`{name}` {forgotten:+.3f} (at {rate:g})" for name, (rate, forgotten) in found_gentle)
    words = "At the gentlest of these rates whose held-out loss is no worse than the worst method's best: "
    return [heading, *rows, "", f"{words}{gentle}.\n"]


def rate_cell(tried: Mapping[str, Any]) -> str:
    forgotten, held_out = tried["final"]["control_loss_change"], tried["validation_loss"]
    if forgotten is None or held_out is None:
        return "diverged"
    return f"{number('{:+.3f}', forgotten)} ({held_out:.3f})"


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
    """A Markdown table of the measures, with the difference in forgetting from LoRA, paired by seed."""
    keys = [key for key in MEASURES if any(key in (method[where] or {}) for method in content["methods"])]
    headings = [MEASURES[key][0].replace("\n", " ") for key in keys]
    by_name = {method["name"]: method for method in content["methods"]}
    reference = next((by_name[name] for name in REFERENCES if name in by_name), None)
    heading = ["method", "rate", "trained", "steps", *headings]
    heading += [f"control loss against {reference['name']}"] if reference else []
    rows = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    seeds = len(content["settings"]["seeds"])
    for method in content["methods"]:
        found = method[where]
        cells = [f"`{method['name']}`", f"{method['learning_rate']:g}", f"{method['trainable']['mean']:,.0f}"]
        if found is None:
            lowest = min(value for value in method["lowest_loss"]["values"] if value is not None)
            cells += [f"not reached (lowest {lowest:.3f})", *("" for _ in heading[4:])]
        else:
            reached = sum(value is not None for value in found["step"]["values"])
            steps = f"{found['step']['mean']:.0f}" + ("" if reached == seeds else f" ({reached} of {seeds} seeds)")
            cells += [steps, *(shown(found.get(key), MEASURES[key][1]) for key in keys)]
            if reference:
                cells.append("" if method is reference else against(found, reference[where]))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
