"""The section "In short" of docs/RESULTS-small-models.md, with every figure read from the committed comparisons."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from figures import (
    accuracy,
    at_two_rates,
    difference,
    gentlest,
    less_than,
    outcome,
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
CRITERIA = {
    "κ over that of a random matrix of the shape": "lowest:rank_by=kappa_over_null",
    "log-volume": "highest:rank_by=log_volume",
    "a share of each type": "lowest_per_type",
    "measured gain over forgetting": "highest:rank_by=gain_over_forgetting",
}
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
    """The quickstart's results on κ-lowest, on the end token, and on learning rates."""
    target, grid = contents["quickstart-target"], contents["quickstart"]
    (rate,), (slow, *_, fast) = target["settings"]["learning_rates"], sorted(grid["settings"]["learning_rates"])
    rates = [f"{name} {tried[0]:+.3f} and {tried[1]:+.3f}" for name, tried in at_two_rates(grid).items()]
    return [
        "- **On the quickstart nothing that people use forgets much at a moderate rate, and κ-lowest is the slowest.** "
        f"At {rate:g}, when the training loss first reaches {target['target_loss']:g}, the control loss has risen by "
        f"{rise(target, 'lowest')} nats a token in {steps(target, 'lowest')} steps; with LoRA by "
        f"{rise(target, 'lora')} in {steps(target, 'lora')}, OSF {rise(target, 'osf')} in {steps(target, 'osf')}, "
        f"attention alone {rise(target, 'attention_only')} in {steps(target, 'attention_only')}, full fine-tuning "
        f"{rise(target, 'full')} in {steps(target, 'full')}. Against LoRA κ-lowest is "
        f"{difference(target, 'lowest', 'lora')}.",
        "- **What earlier versions of this page showed there was the end token.** Their base had never seen one, "
        "and had to learn to stop; that took κ-lowest long and disturbed it little. The base of today knows its end "
        "token, and the lead over LoRA is gone.",
        "- **That κ chooses well among the experts can't be told.** All that it selects there are expert matrices. "
        f"Random ones (`random_mlp`, another draw a seed) forget {rise(target, 'random_mlp')}, in "
        f"{steps(target, 'random_mlp')} steps; {less_than(target, 'random_mlp', 'lowest')} draws forget less than any "
        f"κ-lowest run, and the difference is {difference(target, 'lowest', 'random_mlp')}. Random matrices of "
        f"the same shapes forget {rise(target, 'shape_matched_random')}, κ-highest, which takes every attention matrix "
        f"first, {rise(target, 'highest')}.",
        f"- **The learning rate matters most.** Forgotten at the same training loss with {slow:g} and with {fast:g} "
        f"(one seed): {'; '.join(rates)}. Held-out task loss, by which rates are usually chosen, prefers the higher "
        f"one for {sum(method['learning_rate'] == fast for method in grid['methods'])} of {len(grid['methods'])} "
        f"methods, κ-lowest among them: so chosen it has forgotten {rise(grid, 'lowest', 'final')} after "
        f"{grid['steps']} steps ({accuracy(grid, 'lowest')} right), LoRA "
        f"{rise(grid, 'lora', 'final')} ({accuracy(grid, 'lora')}).",
    ]


def other_criteria(contents: Mapping[str, Any]) -> list[str]:
    """The quickstart's results with other ways to choose matrices."""
    target = contents["quickstart-target"]
    names = [method["name"] for method in target["methods"]]
    found = [f"{words} (`{name}`) {outcome(target, name)}" for words, name in CRITERIA.items() if name in names]
    gain, volume = CRITERIA["measured gain over forgetting"], CRITERIA["log-volume"]
    return [
        f"- **Other criteria there.** At the same point: {'; '.join(found)}. Measured gain over forgetting is as fast "
        f"as LoRA, and against it {difference(target, gain, 'lora')}; against κ-lowest "
        f"{difference(target, gain, 'lowest')}. "
        f"Log-volume is the only one that is clearly worse: {difference(target, volume, 'lora')} against LoRA."
    ]


def pretrained(contents: Mapping[str, Any]) -> list[str]:
    """The results of the small pretrained models."""
    dense, experts = (contents[name] for name in CHOICES)
    tuned = {title: contents[name] for name, title in TUNED.items()}

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
        + "; ".join(f"{words} (`{name}`) {apart(name, 'lowest')}" for words, name in CRITERIA.items())
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
    parts, recommended = [], []
    for name, title in SWEEPS.items():
        content = contents[name]
        each = ", ".join(
            f"{method['name'].partition('k=')[2]} {accuracy(content, method['name'])} at "
            f"{rise(content, method['name'], 'final')}"
            for method in content["methods"]
        )
        parts.append(f"{title}: {each}")
        recommended.append(content["recommendation"]["method"].partition("k=")[2])
    return [
        "- **How many matrices: which ones they are matters more.** On the experts 10% of the matrices, which are the "
        "routers and a `v_proj`, forget as much as all of them. Task accuracy and control loss after equal steps, by "
        "`kappatune sweep`: "
        f"{'; '.join(parts)}. It recommends {' and '.join(recommended)}: it goes by the task first, and takes the "
        "smallest budget that learned as well as the best in these steps.",
    ]
