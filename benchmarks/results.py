"""Writes docs/RESULTS.md and its pictures from the comparisons committed in docs/results.

    python benchmarks/results.py

The comparisons come from benchmarks/study.py --results docs/results.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kappatune_plugin.console import number
from kappatune_plugin.study.plots import budget_plot, frontier_plot, matched_plot
from kappatune_plugin.study.statistics import interval
from kappatune_plugin.study.tables import MEASURES, shown

DOCS = Path(__file__).resolve().parents[1] / "docs"
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
    "olmoe-irony": "OLMoE-1B-7B: irony in tweets",
    "olmoe-sst2": "OLMoE-1B-7B: SST-2",
}
HEAD = """# Does it forget less?

Written by `python benchmarks/results.py` from the comparisons in [results](results), which
`python benchmarks/study.py --results docs/results` makes with `kappatune compare`. Change the script, not this file.
"""


def main() -> None:
    contents = committed()
    for name, content in contents.items():
        for kind in pictures(content):
            PICTURES[kind](content, DOCS / "results" / f"{name}-{kind}.png")
    (DOCS / "RESULTS.md").write_text(text(contents), encoding="utf-8")


PICTURES = {
    "matched": matched_plot,
    "frontier": frontier_plot,
    "budgets": lambda content, path: budget_plot(content, path, content["recommendation"]["method"]),
}


def pictures(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of picture that a comparison or sweep has."""
    if "recommendation" in content:
        return ("budgets",)
    return ("matched",) if content["settings"]["stop_at_target"] else ("matched", "frontier")


def committed() -> dict[str, Any]:
    """Setting -> its comparison, for those that there are."""
    found = {name: DOCS / "results" / f"{name}.json" for name in SETTINGS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}


def text(contents: Mapping[str, Any]) -> str:
    """docs/RESULTS.md."""
    earlier = (DOCS / "results" / "earlier.md").read_text(encoding="utf-8")
    sections = [setting(name, each) for name, each in contents.items()]
    return "\n".join([HEAD, conclusions(contents), how(contents), *sections, earlier])


def conclusions(contents: Mapping[str, Any]) -> str:
    """What the numbers say, in words; every figure is read from the files."""
    target, grid = contents["quickstart-target"], contents["quickstart"]
    ratios, fastest = rate_ratios(grid), max(grid["settings"]["learning_rates"])
    higher = sum(method["learning_rate"] == fastest for method in grid["methods"])
    lines = [
        "## In short",
        "",
        "These models have 0.7 to 4.5 million parameters, and were trained for a few hundred steps at most, with three "
        "seeds. What holds for them need not hold for a model a thousand times as large. Differences whose interval "
        "leaves out zero are in bold; the others may be chance.",
        "",
        f"- **On the quickstart the κ-lowest selection forgets least of the tools people would use, and learns "
        f"slowest.** At one learning rate ({target['settings']['learning_rates'][0]:g}), when the training loss first "
        f"reaches {target['target_loss']:g}, the control loss has risen by {rise(target, 'lowest')} nats a token; with "
        f"LoRA by {rise(target, 'lora')}, OSF {rise(target, 'osf')}, full fine-tuning {rise(target, 'full')}. Against "
        f"LoRA that is {difference(target, 'lowest', 'lora')}. It takes {steps(target, 'lowest')} steps, LoRA "
        f"{steps(target, 'lora')}, full fine-tuning {steps(target, 'full')}.",
        "- **It comes from training experts; that κ chooses well among them can't be told.** All that it selects there "
        f"are expert matrices. Random ones (`random_mlp`, another draw a seed) forget {rise(target, 'random_mlp')}, in "
        f"{steps(target, 'random_mlp')} steps; {less_than(target, 'random_mlp', 'lowest')} draws forget less than any "
        f"κ-lowest run, and the difference is {difference(target, 'lowest', 'random_mlp')}. Random matrices of "
        f"the same shapes forget {rise(target, 'shape_matched_random')}. κ-highest takes every attention matrix first, "
        f"and forgets {rise(target, 'highest')}, attention alone {rise(target, 'attention_only')}. Why κ falls that "
        "way: attention is square here and experts are not, and a square matrix has a large κ whatever was learned "
        "(`kappatune scan` prints it beside that of a random matrix of the shape).",
        f"- **The learning rate matters as much.** With 3e-3 in the place of 1e-3, the same method "
        f"forgets {min(ratios.values()):.1f} to {max(ratios.values()):.1f} times as much at the same training loss "
        f"({len(ratios)} methods, one seed each). Held-out task loss, by which rates are usually chosen, prefers the "
        f"higher one for {higher} of {len(grid['methods'])} methods: what a choice of matrices saves, a rate that is "
        "chosen by the task alone can cost again.",
        f"- **After equal steps it looks better than it is.** After {grid['steps']} steps κ-lowest has forgotten "
        f"{rise(grid, 'lowest', 'final')} against LoRA's {rise(grid, 'lora', 'final')}, but it has hardly learned: "
        f"{accuracy(grid, 'lowest')} against {accuracy(grid, 'lora')}.",
        *others(contents),
        *pretrained(contents),
        "",
        "So: the default stays the paper's criterion. If you want less forgetting, first lower the learning rate; then "
        "train within the MLP or the experts (`include: [mlp]`), if there is time for it, else `rank_by: "
        "kappa_over_null`; and measure random choices beside κ (`kappatune compare`).",
        "",
    ]
    return "\n".join(lines)


def others(contents: Mapping[str, Any]) -> list[str]:
    """What other ways to choose gave, where they were run."""
    target, lines = contents["quickstart-target"], []
    tried = {
        "lowest:rank_by=kappa_over_null": "κ over that of a random matrix of the shape",
        "lowest_per_type": "κ-lowest with a share of each type of matrix",
        "highest:rank_by=log_volume": "log-volume",
        "highest:rank_by=gain_over_forgetting": "measured gain over forgetting",
    }
    names = [method["name"] for method in target["methods"]]
    found = [f"{words} (`{name}`) {outcome(target, name)}" for name, words in tried.items() if name in names]
    if found:
        lines.append(
            f"- **No other criterion forgets less than κ-lowest; two are a middle.** At the same point: "
            f"{'; '.join(found)}. κ over its shape's and a share of each type take some attention along: they are "
            f"there as soon as LoRA, and forget {difference(target, 'lowest:rank_by=kappa_over_null', 'lora')} and "
            f"{difference(target, 'lowest_per_type', 'lora')} against it."
        )
    return lines


def pretrained(contents: Mapping[str, Any]) -> list[str]:
    """What the small pretrained models say, a line each, where they were run."""
    found = {name: each for name, each in contents.items() if not name.startswith("quickstart")}
    if not found:
        return []

    def each_difference(name: str, other: str) -> str:
        return ", ".join(f"{difference(each, name, other)} ({setting})" for setting, each in found.items())

    lines = [
        "- **On the small pretrained models κ-lowest over everything forgets what LoRA does or less, and more than "
        "κ-highest; within the MLP it forgets far less, and so do random matrices there.** Over everything it takes "
        "`v_proj` and the routers first, which are wide. κ-highest against κ-lowest at the same training loss: "
        f"{each_difference('highest', 'lowest')}. κ-lowest against LoRA: {each_difference('lowest', 'lora')}. Within "
        f"the MLP or the experts (`lowest_mlp`): {each_difference('lowest_mlp', 'lora')}. Against random matrices of "
        f"the MLP: {each_difference('lowest_mlp', 'random_mlp')}. Each method at the rate that was best for it; "
        "these models hardly learn the tasks, so only the losses tell.",
    ]
    for name, each in found.items():
        figures = ", ".join(f"`{method['name']}` {outcome(each, method['name'])}" for method in each["methods"])
        lines.append(f"  - {SETTINGS[name]}, at a training loss of {each['target_loss']:.3f}: {figures}.")
    return lines


def outcome(content: Mapping[str, Any], name: str) -> str:
    method = method_of(content, name)
    if method["matched"] is None:
        return f"doesn't get there in {content['steps']} steps"
    return f"{rise(content, name)} in {steps(content, name)} steps"


def accuracy(content: Mapping[str, Any], name: str) -> str:
    return shown(method_of(content, name)["final"]["task_accuracy"], "{:.1%}")


def rise(content: Mapping[str, Any], name: str, where: str = "matched") -> str:
    """What a method has forgotten, as the tables show it."""
    return shown(method_of(content, name)[where]["control_loss_change"], "{:+.3f}")


def steps(content: Mapping[str, Any], name: str) -> str:
    """How many steps a method takes to the target."""
    return f"{method_of(content, name)['matched']['step']['mean']:.0f}"


def difference(content: Mapping[str, Any], name: str, other: str) -> str:
    """What `name` has forgotten at the target more than `other`, paired by seed."""
    return against(method_of(content, name)["matched"], method_of(content, other)["matched"])


def less_than(content: Mapping[str, Any], name: str, other: str) -> str:
    """ "2 of 3": how many runs of `name` have forgotten less at the target than every run of `other`."""
    mine, others = (method_of(content, each)["matched"]["control_loss_change"]["values"] for each in (name, other))
    return f"{sum(value < min(others) for value in mine)} of {len(mine)}"


def method_of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(method for method in content["methods"] if method["name"] == name)


def by_forgetting(content: Mapping[str, Any]) -> list[str]:
    """The methods of which every run reaches the target, least forgotten first."""
    whole = [method for method in content["methods"] if method["matched"] and not missed(method)]
    ordered = sorted(whole, key=lambda method: method["matched"]["control_loss_change"]["mean"])
    return [method["name"] for method in ordered]


def missed(method: Mapping[str, Any]) -> bool:
    return method["matched"] is None or None in method["matched"]["step"]["values"]


def rate_ratios(content: Mapping[str, Any]) -> dict[str, float]:
    """Method -> what the grid's highest rate forgets at the target over what its lowest does (first seed)."""
    found = {}
    for method in content["methods"]:
        tries = [method["grid"][rate]["at_target"] for rate in sorted(method["grid"], key=float)]
        if len(tries) > 1 and tries[0] and tries[-1]:
            found[method["name"]] = tries[-1]["control_loss_change"] / tries[0]["control_loss_change"]
    return found


def readme_table(content: Mapping[str, Any]) -> str:
    """The short table of README.md: every method of a comparison at its target, least forgotten first."""
    rows = ["| trained | parameters | steps | task accuracy | control loss (nats a token) |", "|---|---|---|---|---|"]
    for name in by_forgetting(content):
        method = method_of(content, name)
        at = method["matched"]
        cells = (
            f"`{name}`",
            f"{method['trainable']['mean']:,.0f}",
            f"{at['step']['mean']:.0f}",
            shown(at["task_accuracy"], "{:.1%}"),
            shown(at["control_loss_change"], "{:+.3f}"),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def how(contents: Mapping[str, Any]) -> str:
    """What was run, from the files themselves."""
    rows = [
        "| setting | parameters | steps | batch | learning rates | seeds | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, content in contents.items():
        settings, target = content["settings"], content["target_loss"]
        rates = ", ".join(f"{rate:g}" for rate in settings["learning_rates"])
        rates += f" and {settings['widen']} more" if settings.get("widen") else ""
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
after equal steps. ± is the 95% interval of Student's t over seeds; intervals of three seeds are wide. Where the best
rate of a method is at the edge of its grid, the next one beyond it is tried too, as often as the table says.

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
    """A Markdown table of what every rate that was tried forgets, where that is in the file and rates differ."""
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
    return [heading, *rows, ""]


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
    """A Markdown table of the measures, with the difference from LoRA of what was forgotten, paired by seed."""
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
