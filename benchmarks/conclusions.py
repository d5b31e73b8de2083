"""The section "In short" of docs/RESULTS.md, with every figure read from the committed comparisons."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from figures import (
    accuracy,
    difference,
    gentlest,
    less_than,
    outcome,
    rate_ratios,
    rise,
    steps,
    times_a_third,
)

# the small pretrained models: which comparisons choose each method's rate, and which have one rate for every choice
TUNED = {
    "dense-subj": "dense, Subj",
    "moe-subj": "experts, Subj",
    "dense-sst2": "dense, SST-2",
    "moe-sst2": "experts, SST-2",
}
CHOICES = ("dense-subj-choices", "moe-subj-choices")
NO_ROUTERS = "lowest:exclude=[router]"
SWEEPS = {"quickstart-sweep": "quickstart", "moe-subj-sweep": "experts, Subj"}


def conclusions(contents: Mapping[str, Any]) -> str:
    """The section "In short"."""
    lines = [
        "## In short",
        "",
        "These models have 0.7 to 4.5 million parameters, and were trained for a few hundred steps at most, with three "
        "seeds. What holds for them need not hold for a model a thousand times as large. Differences whose interval "
        "leaves out zero are in bold; the others may be chance.",
        "",
        *quickstart(contents),
        *other_criteria(contents),
        *pretrained(contents),
        *sweeps(contents),
        "",
        "So: the default stays the paper's criterion, and nothing here says that it is the best one. If you want less "
        "forgetting, first lower the learning rate; then train within the MLP or the experts (`include: [mlp]`), where "
        "κ-lowest and random matrices forgot less than LoRA at a moderate rate, in more steps; on the pretrained "
        "models `order: highest` there forgot least of all that was tried. Measure random choices beside κ (`kappatune "
        "compare`) before you believe any of it of your model.",
        "",
    ]
    return "\n".join(lines)


def quickstart(contents: Mapping[str, Any]) -> list[str]:
    """The quickstart's results on κ-lowest, their cause, and on learning rates."""
    target, grid = contents["quickstart-target"], contents["quickstart"]
    ratios, fastest = rate_ratios(grid), max(grid["settings"]["learning_rates"])
    higher = sum(method["learning_rate"] == fastest for method in grid["methods"])
    return [
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
    ]


def other_criteria(contents: Mapping[str, Any]) -> list[str]:
    """The quickstart's results with other ways to choose matrices."""
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
    """The results of the small pretrained models."""
    dense, experts = (contents[name] for name in CHOICES)
    tuned = {title: contents[name] for name, title in TUNED.items()}
    criteria = {
        "κ over that of a random matrix of the shape": "lowest:rank_by=kappa_over_null",
        "log-volume": "highest:rank_by=log_volume",
        "a share of each type": "lowest_per_type",
        "measured gain over forgetting": "highest:rank_by=gain_over_forgetting",
    }

    def both(name: str) -> str:
        return f"{rise(dense, name)} and {rise(experts, name)}"

    def apart(name: str, other: str) -> str:
        return f"{difference(dense, name, other)} and {difference(experts, name, other)}"

    return [
        "- **On the small pretrained models the paper's order is the wrong way round.** At one rate, 3e-3, and the "
        "same training loss on Subj, κ-lowest over everything forgets "
        f"{both('lowest')} nats a token (dense model and experts), κ-highest {both('highest')}, the difference being "
        f"{apart('highest', 'lowest')}. Within the MLP or the experts κ-lowest forgets {both('lowest_mlp')}, random "
        f"matrices {both('random_mlp')}, κ-highest {both('highest_mlp')} (against κ-lowest there "
        f"{apart('highest_mlp', 'lowest_mlp')}).",
        "- **Why: attention, more than routers.** Over everything κ-lowest takes `v_proj` and the routers first, which "
        f"are wide. Leaving the routers out changes {difference(experts, NO_ROUTERS, 'lowest')}; leaving out attention "
        f"too, {apart('lowest_mlp', 'lowest')}. Attention alone forgets {both('attention_only')}. Other criteria, "
        "against κ-lowest: "
        + "; ".join(f"{words} (`{name}`) {apart(name, 'lowest')}" for words, name in criteria.items())
        + ".",
        "- **Against LoRA it depends on how the rates are chosen.** With 1e-3 or 3e-3, by held-out loss (SST-2), "
        f"κ-lowest forgets {pair(tuned, 'SST-2', 'lowest')} against LoRA, within the MLP or the experts "
        f"{pair(tuned, 'SST-2', 'lowest_mlp')}. With rates up to 2.7e-2 to choose from (Subj) the same rule takes 9e-3 "
        f"or 2.7e-2 for most choices of matrices, and those forget more than LoRA: κ-lowest "
        f"{pair(tuned, 'Subj', 'lowest')}. Random matrices of the MLP or the experts, for which it takes 3e-3, "
        f"{pair(tuned, 'Subj', 'random_mlp')}.",
        *rates(tuned),
    ]


def pair(tuned: Mapping[str, Any], task: str, name: str) -> str:
    """The differences from LoRA on the dense model and on the experts."""
    return " and ".join(difference(tuned[f"{model}, {task}"], name, "lora") for model in ("dense", "experts"))


def rates(tuned: Mapping[str, Any]) -> list[str]:
    """The effect of the learning rate, and the results with the gentlest one."""
    ratios = [ratio for content in tuned.values() for ratio in times_a_third(content)]
    rows = []
    for title, content in tuned.items():
        found = gentlest(content)
        least = min(found, key=lambda name: found[name][1])
        named = dict.fromkeys([least, "lowest_mlp", "random_mlp", "highest", "lora", "full", "lowest"])
        rows.append(f"  - {title}: " + ", ".join(f"`{name}` {found[name][1]:+.3f}" for name in named) + ".")
    return [
        f"- **The learning rate decides more than the choice of matrices.** Three times the rate forgets "
        f"{median(ratios):.1f} times as much (median of {len(ratios)} pairs of runs, {min(ratios):.1f} to "
        f"{max(ratios):.1f}). If each method has the gentlest of its rates that learns as well as the worst method at "
        "its best (held-out loss, after equal steps, one seed; each section lists all), it has forgotten:",
        *rows,
    ]


def sweeps(contents: Mapping[str, Any]) -> list[str]:
    """The measurements and recommendations of `kappatune sweep`."""
    parts = []
    for name, title in SWEEPS.items():
        content = contents[name]
        each = ", ".join(
            f"{method['name'].partition('k=')[2]} {accuracy(content, method['name'])} at "
            f"{rise(content, method['name'], 'final')}"
            for method in content["methods"]
        )
        parts.append(f"{title}: {each}")
    return [
        "- **How many matrices: which ones they are matters more.** On the experts 10% of the matrices, which are the "
        "routers and a `v_proj`, forget as much as all of them. Task accuracy and control loss after equal steps, by "
        "`kappatune sweep`: "
        f"{'; '.join(parts)}. It recommends everything in both cases: it "
        "goes by the task alone, and at a fixed number of steps no smaller budget learned as well.",
    ]
