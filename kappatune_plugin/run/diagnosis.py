"""What the end of a run shows, and what to change: the failure signatures that the KappaTune paper names."""

from collections import Counter
from collections.abc import Sequence

from kappatune_plugin.forgetting.report import ForgettingReport
from kappatune_plugin.run.end_token import EndTokenShare
from kappatune_plugin.selection.auto_budget import Losses, mean_loss
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.weights.patterns import module_type

# a curve is judged by the means of this many equal parts of it
PARTS = 10
NAMES_SHOWN = 3
# of the task's loss in the end token: a label of one token that is as new as its end makes a half
MUCH = 0.4


def plateau_start(losses: Losses, min_improvement: float = 0.05) -> int | None:
    """The step from which the training loss never fell by `min_improvement` of its value again; None if it still falls.

    Args:
        losses: (step, training loss) as logged; judged by the means of ten equal parts. Fewer than ten are not judged.

    Returns:
        The step at which the part begins that no later part is below by that share; None if that is one of the last
        two, where falling could not have shown.
    """
    if len(losses) < PARTS:
        return None
    last = losses[-1][0]
    edges = [round(last * part / PARTS) for part in range(PARTS + 1)]
    parts = [mean_loss(losses, after, until) for after, until in zip(edges, edges[1:], strict=False)]
    found = [(edge, mean) for edge, mean in zip(edges, parts, strict=False) if mean is not None]
    for position, (edge, mean) in enumerate(found[:-2]):
        if min(later for _, later in found[position + 1 :]) > mean * (1 - min_improvement):
            return edge
    return None


def findings(
    losses: Losses,
    selection: Selection,
    report: KappaReport | None = None,
    forgetting: ForgettingReport | None = None,
    max_delta: float | None = None,
    target_loss: float | None = None,
    end_token: EndTokenShare | None = None,
    adapter: str | None = None,
) -> list[str]:
    """What a run shows of the four signatures, a sentence or two each; empty where nothing does.

    Early plateau: K is too small. Forgetting above the limit: what the selection takes and leaves out. A loss that was
    mostly the end-of-text token. Matrices whose smallest singular value is 0: they were never candidates. Besides, a
    choice that has learned more than this one within a limit of forgetting, where it was measured.

    Args:
        losses: (step, training loss) as logged.
        max_delta: the limit of forgetting; None judges none.
        target_loss: what counts as learned; None: half of the first losses.
        end_token: its share of the task's loss before training.
        adapter: "lora" where a low-rank pair is trained beside each matrix.
    """
    found = _early_plateau(losses, len(selection.units), target_loss)
    if forgetting is not None and max_delta is not None and forgetting.after:
        found += _too_much_forgotten(forgetting, selection, report, max_delta)
    found += _learns_to_stop(end_token)
    if report is not None:
        found += _never_candidates(report) + ([] if adapter else _another_choice(selection, report))
    return found


def _early_plateau(losses: Losses, matrices: int, target_loss: float | None) -> list[str]:
    start = plateau_start(losses)
    if start is None or start > losses[-1][0] / 2:
        return []
    final = mean_loss(losses, start, losses[-1][0])
    # a run that was resumed with other logging_steps may have logged its first loss late
    first = mean_loss(losses, 0, max(losses[-1][0] / PARTS, losses[0][0]))
    target = first / 2 if target_loss is None else target_loss
    if final <= target:
        return []
    return [
        f"The training loss fell no further after step {start} of {losses[-1][0]}: it stayed at {final:.3f}. Unless "
        f"that is as low as this data goes, {matrices} matrices are too small a budget: raise kappatune.k, or write "
        "`k: auto`. If that changes nothing, raise learning_rate."
    ]


def _too_much_forgotten(
    forgetting: ForgettingReport, selection: Selection, report: KappaReport | None, max_delta: float
) -> list[str]:
    rise = forgetting.delta(forgetting.after)
    if rise is None or rise <= max_delta:
        return []
    kinds = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in _names(selection.units))
    trained = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    routers = _routers(selection, report)
    advice = f"Put what may forget into kappatune.exclude (trained were {trained}{_left_out(report)})"
    if routers:
        advice = f"Add router to kappatune.exclude: {len(routers)} routers were trained (of {trained})"
    return [
        f"The control loss rose by {rise:.3f} nats a token, more than forgetting.max_delta allows ({max_delta:g}). "
        f"{advice}; a smaller k or learning_rate also forgets less."
    ]


def _learns_to_stop(end_token: EndTokenShare | None) -> list[str]:
    if end_token is None or end_token.share <= MUCH:
        return []
    return [
        f"{end_token.share:.0%} of the task's loss before training was the end-of-text token {end_token.token} "
        f"({end_token.nats:.2f} nats each, the other tokens {end_token.others:.2f}): much of what the run "
        "learned is to stop there, and it may have forgotten for that. Write `data.end_token: false` to leave it out "
        "of the loss (the model then goes on after an answer: stop generating at the line's end, or by "
        "max_new_tokens), or take a base that knows its end token, such as an instruction-tuned one with its chat "
        "template."
    ]


def _another_choice(selection: Selection, report: KappaReport) -> list[str]:
    """What benchmarks/study_real.py measured against the paper's choice over all matrices."""
    types = {unit.name: module_type(unit.name, unit.groups) for unit in report.units if unit.status == "ok"}
    attention = sum(types.get(name) == "attention" for name in _names(selection.units))
    if (selection.order, selection.rank_by) != ("lowest", "kappa") or not attention or "mlp" not in types.values():
        return []
    return [
        f"{attention} of the {len(selection.units)} matrices of lowest kappa are attention's. On the language models "
        "of docs/RESULTS.md LoRA within the MLP has learned more where as little was forgotten. To train that, write "
        '`kappatune: {adapter: lora, k: "100%", include: [mlp]}`; to see whether it holds for your model and data, run '
        "`kappatune compare --config RECIPE --methods lowest,lora_mlp`."
    ]


def _left_out(report: KappaReport | None) -> str:
    if report is None or not report.left_out:
        return ""
    reasons = Counter(report.left_out.values())
    return "; left out: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _routers(selection: Selection, report: KappaReport | None) -> list[str]:
    chosen = set(_names(selection.units))
    return [unit.name for unit in report.units if unit.name in chosen and "router" in unit.groups] if report else []


def _never_candidates(report: KappaReport) -> list[str]:
    found = []
    singular = [unit.name for unit in report.units if unit.status in ("zero", "rank_deficient")]
    if singular:
        found.append(
            f"{len(singular)} of {len(report.units)} matrices have a smallest singular value of 0, so no condition "
            f"number, and were never candidates: {_some(singular)}. If the task needs them, name their modules in "
            "kappatune.modules_to_save."
        )
    broken = [unit.name for unit in report.units if unit.status == "nonfinite"]
    if broken:
        found.append(f"{len(broken)} matrices hold NaN or infinity: {_some(broken)}. Check the base checkpoint.")
    return found


def _names(units: Sequence) -> list[str]:
    return [unit.name for unit in units]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
