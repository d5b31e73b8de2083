"""What was measured before, during and after training, as forgetting.json holds it and as a table."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from kappatune_plugin.console import number
from kappatune_plugin.files import read_json, write_json

HARNESS = "lm_eval/"
# of the task's metrics, those that count right answers
SHARES = ("accuracy", "answer_accuracy")
EXACT_MATCH = "exact_match"
# of recordings: word errors a word said, with what they are made of
WER, ERRORS = "wer", ("cer", "substitutions", "deletions", "insertions", "words")


class ForgettingReport:
    """What was measured before, during and after a run.

    Attributes:
        before, after: as `ForgettingProbe.measure` gives them; `after` with the divergences too, and empty until then.
        steps: [{"step": n, ...}] of those in between.
        kept: as `after`, once what was trained was scaled back; empty where it wasn't.
        examples: how many the task has.
        recall_metric: "exact_match" of facts, or "accuracy" of another task's questions.
        majority: share of the task's examples whose answer is the most frequent one; None for a task without labels.
        budget: what `k: auto` decided: {"start", "most", "matrices", "steps": [{"step", "action", "matrices",
            "reason"}]}; None for a fixed k.
    """

    def __init__(
        self,
        controls: list[str],
        metric: str | None,
        facts: int,
        examples: int = 0,
        majority: float | None = None,
        recall_metric: str = EXACT_MATCH,
    ) -> None:
        self.controls, self.metric, self.facts = controls, metric, facts
        self.examples, self.majority, self.recall_metric = examples, majority, recall_metric
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.kept: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.budget: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of forgetting.json; what isn't measured yet, or isn't finite, is null."""
        before, after, kept = (
            {key: finite_or_none(value) for key, value in each.items()} for each in (self.before, self.after, self.kept)
        )
        control = {
            name: {
                "loss_before": before.get(f"{name}_loss"),
                "loss_after": after.get(f"{name}_loss"),
                "ppl_before": before.get(f"{name}_ppl"),
                "ppl_after": after.get(f"{name}_ppl"),
                "kl_after": after.get(f"{name}_kl"),
            }
            for name in self.controls
        }
        content: dict[str, Any] = {"control": control}
        if self.metric:
            key = f"task_{self.metric}"
            kl = after.get("task_kl")
            content["task"] = {
                "metric": self.metric,
                "before": before.get(key),
                "after": after.get(key),
                "kl_after": kl,
                "examples": self.examples,
            }
            if self.metric == WER:
                del content["task"]["kl_after"]
                for error in ERRORS:
                    values = {"before": before.get(f"task_{error}"), "after": after.get(f"task_{error}")}
                    content["task"][error] = values
            if self.metric in SHARES:
                for when, value in (("before", before.get(key)), ("after", after.get(key))):
                    content["task"][f"interval_{when}"] = share_interval(value, self.examples)
            if self.majority is not None:
                content["task"]["majority"] = self.majority
        if self.facts:
            recall = {"before": before.get("recall"), "after": after.get("recall")}
            content["recall"] = {"metric": self.recall_metric, "facts": self.facts, **recall}
        harness = {key: {"before": before[key], "after": after.get(key)} for key in before if key.startswith(HARNESS)}
        if harness:
            content["lm_eval"] = {key.removeprefix(HARNESS): values for key, values in harness.items()}
        if self.budget is not None:
            content["budget"] = self.budget
        if kept:
            content["kept"] = kept
        return {
            **content,
            "steps": [{key: finite_or_none(value) for key, value in step.items()} for step in self.steps],
        }

    def save(self, path: Path) -> None:
        """Write forgetting.json, atomically."""
        write_json(path, self.to_dict())

    def take_over_steps(self, path: Path, before_step: int) -> None:
        """Keep what an interrupted run measured up to the step it resumes from, where its forgetting.json is there."""
        if before_step and path.exists():
            content = read_json(path, "a forgetting report")
            self.steps = [step for step in content.get("steps", []) if step["step"] <= before_step]
            if self.budget is not None:
                decided = content.get("budget", {}).get("steps", [])
                self.budget["steps"] += [step for step in decided if step["step"] <= before_step]

    def rows(self) -> list[tuple[str, str, int]]:
        """What is measured before and after: its title, its key in `before` and `after`, and of how many a share is."""
        rows = []
        if self.metric:
            count = self.examples if self.metric in SHARES else 0
            title = f"task {self.metric.replace('_', ' ')}" + (f" ({count} examples)" if count else "")
            rows.append((title, f"task_{self.metric}", count))
            errors = ERRORS[:-1] if self.metric == WER else ()
            rows += [(f"task {error}" + (" (words)" if error != "cer" else ""), f"task_{error}", 0) for error in errors]
        if self.facts:
            rows.append((recall_title(self.recall_metric, self.facts), "recall", self.facts))
        for name in self.controls:
            rows.append((f"{name}: loss a token (nats)", f"{name}_loss", 0))
            rows.append((f"{name}: perplexity", f"{name}_ppl", 0))
        return rows + [(key.removeprefix(HARNESS), key, 0) for key in self.before if key.startswith(HARNESS)]

    def divergence_rows(self) -> list[tuple[str, str]]:
        """What is measured against the base, after only: its title and its key in `after`."""
        names = [*self.controls, *(["task"] if self.metric and self.metric != WER else [])]
        return [(f"{name}: KL to the base (nats)", f"{name}_kl") for name in names]

    @property
    def caption(self) -> str | None:
        """What a reader of the table needs to know of its shares; None without any."""
        if not any(count for _, _, count in self.rows()):
            return None
        said = "In brackets: 95% interval (Wilson)."
        return said if self.majority is None else f"{said} Always the most frequent answer: {self.majority:.1%}."

    def table(self) -> Table:
        """Before, after and change, a row for each measure; after what was kept too, where that is less."""
        later = {"trained": self.after, "kept": self.kept} if self.kept else {"after": self.after}
        titles = {"title": "What was learned, what was forgotten", "caption": self.caption}
        table = Table("", "before", *later, "change", **titles)
        for title, key, count in self.rows():
            values = [measured.get(key, math.nan) for measured in (self.before, *later.values())]
            change = shown_change(values[-1] - values[0], count)
            table.add_row(title, *(shown(value, count) for value in values), change)
        for title, key in self.divergence_rows():
            values = (number("{:.4f}", measured.get(key, math.nan)) for measured in later.values())
            table.add_row(title, "0", *values, "")
        return table

    def delta(self, measured: Mapping[str, float]) -> float | None:
        """The rise of the control loss in `measured` since before, in nats a token: of the control that rose most.

        None without controls, infinite where a loss isn't finite.
        """
        rises = [measured[f"{name}_loss"] - self.before[f"{name}_loss"] for name in self.controls]
        return max(rise if math.isfinite(rise) else math.inf for rise in rises) if rises else None


def recall_title(metric: str, count: int) -> str:
    """What tables call the row of `recall`."""
    return f"recall of {count} facts" if metric == EXACT_MATCH else f"another task: accuracy ({count} examples)"


def shown(value: float, count: int) -> str:
    """A measure as tables show it; with its 95% interval a share of `count` examples, which is 0 for other measures."""
    if not count:
        return number("{:.3f}", value)
    interval = share_interval(value, count)
    return f"{value:.1%}" + (" [{:.0f}, {:.0f}]".format(*(100 * end for end in interval)) if interval else "")


def shown_change(change: float, count: int) -> str:
    """The change of a measure as tables show it; `count` as in `shown`."""
    return number("{:+.1f} points", 100 * change) if count else number("{:+.3f}", change)


def share_interval(share: float | None, count: int) -> list[float] | None:
    """Wilson's 95% interval of a share of `count` examples; None for what isn't a share of any."""
    if share is None or not math.isfinite(share) or not count:
        return None
    # scipy takes long to load
    from scipy.stats import binomtest

    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return [round(float(interval.low), 4), round(float(interval.high), 4)]


def finite_or_none(value: float) -> float | None:
    """`value` for a JSON file, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None
