"""How much a run forgets: what it measures, when, and what it leaves behind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from kappatune_plugin.answers import answer_accuracy
from kappatune_plugin.console import number
from kappatune_plugin.data import load_rows, pairs
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import read_json, write_json
from kappatune_plugin.forgetting_config import SELF, ForgettingConfig
from kappatune_plugin.probes import (
    ChoiceExample,
    base_of,
    blocks,
    completion_kl,
    completion_loss,
    exact_recall,
    kl_to_base,
    label_accuracy,
    measuring,
    sample_base,
    token_loss,
)

Task = list[ChoiceExample] | list[tuple[str, str]]
HARNESS = "lm_eval/"
# of the task's metrics, those that count right answers
SHARES = ("accuracy", "answer_accuracy")


@dataclass
class ForgettingData:
    """What is measured, as text.

    Attributes:
        controls: name -> texts; None where the base model writes them.
        task: test examples with labels, or (prompt, completion) pairs without; empty for no task.
        facts: (prompt, completion) pairs to recall.
    """

    controls: dict[str, list[str] | None] = field(default_factory=dict)
    task: Task = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def load(cls, config: ForgettingConfig, task: Task | None = None, folder: Path | None = None) -> "ForgettingData":
        """Load what `config` names; relative paths may start in `folder`.

        Raises:
            KappaTuneError: data that can't be loaded, a column that isn't there, nothing to measure.
        """
        controls = {
            name: None if spec == SELF else _control_texts(spec, name, config, folder)
            for name, spec in config.controls().items()
        }
        facts = _facts(config, folder) if config.recall else []
        if not (controls or facts or task or config.lm_eval):
            raise KappaTuneError("forgetting: there is nothing to measure: add control, recall, or a data.test.")
        if config.generate is not None and (not task or isinstance(task[0], ChoiceExample)):
            raise KappaTuneError(
                "forgetting.generate: there is no task to write answers to: give data.test with prompt and completion, "
                "without labels, or delete generate."
            )
        return cls(controls, task or [], facts)


@dataclass
class ForgettingProbe:
    """What is measured, the controls tokenized once.

    Attributes:
        controls: name -> pieces of token ids.
        task, facts: as `ForgettingData` has them.
        generate: settings of `answer_accuracy`; None measures the task by likelihood.
        harness: settings of `harness.run_harness`; None runs none.
    """

    tokenizer: PreTrainedTokenizerBase
    controls: dict[str, list[list[int]]] = field(default_factory=dict)
    task: Task = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    batch_size: int = 8
    generate: dict[str, int] | None = None
    harness: dict[str, Any] | None = None

    @classmethod
    def build(
        cls, config: ForgettingConfig, data: ForgettingData, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> "ForgettingProbe":
        """Tokenize `data`; `model`, without its adapter, writes the texts that are None.

        Raises:
            KappaTuneError: a control without two tokens in a row, a tokenizer without a token to start from, or a
                harness that isn't installed or doesn't know a task.
        """
        harness = config.harness()
        if harness is not None:
            from kappatune_plugin.harness import check_harness

            check_harness(**harness)
        truncate = config.long_texts == "truncate"
        controls = {
            name: sample_base(model, tokenizer, config.samples, config.max_length, config.seed, config.batch_size)
            if texts is None
            else blocks(tokenizer, texts, config.max_length, truncate)
            for name, texts in data.controls.items()
        }
        return cls(tokenizer, controls, data.task, data.facts, config.batch_size, config.generate, harness)

    @property
    def metric(self) -> str | None:
        """How the task is measured; None for no task.

        "accuracy" of likelihoods for a task with labels; without labels "answer_accuracy" of what the model writes if
        `generate` is set, else "loss" (nats a completion token).
        """
        if not self.task:
            return None
        if isinstance(self.task[0], ChoiceExample):
            return "accuracy"
        return "loss" if self.generate is None else "answer_accuracy"

    def measure(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """The losses and perplexities of the controls, the task's metric, the share of facts recalled, the harness.

        Args:
            quick: leave out what writes text or runs the harness: for measurements during a run.
        """
        found = {}
        for name, pieces in self.controls.items():
            loss = token_loss(model, pieces, self.batch_size)
            found[f"{name}_loss"], found[f"{name}_ppl"] = loss.nats_per_token, loss.perplexity
        if self.metric in ("accuracy", "loss"):
            measure = label_accuracy if self.metric == "accuracy" else completion_loss
            found[f"task_{self.metric}"] = measure(model, self.tokenizer, self.task, self.batch_size)
        if self.facts:
            found["recall"] = exact_recall(model, self.tokenizer, self.facts, self.batch_size)
        return found if quick else {**found, **self._slow(model)}

    def _slow(self, model: nn.Module) -> dict[str, float]:
        found = {}
        if self.metric == "answer_accuracy":
            settings = {"batch_size": self.batch_size, **self.generate}
            found["task_answer_accuracy"] = answer_accuracy(model, self.tokenizer, self.task, **settings)
        if self.harness is not None:
            from kappatune_plugin.harness import run_harness

            found |= run_harness(model, self.tokenizer, batch_size=self.batch_size, **self.harness)
        return found

    def divergences(self, model: nn.Module) -> dict[str, float]:
        """KL(base || model) a token in nats: on each control, and on the completions of the task as `task_kl`."""
        found = {f"{name}_kl": kl_to_base(model, pieces, self.batch_size) for name, pieces in self.controls.items()}
        if self.task:
            found["task_kl"] = completion_kl(model, self.tokenizer, task_pairs(self.task), self.batch_size)
        return found


def task_pairs(task: Task) -> list[tuple[str, str]]:
    """(prompt, right completion) of each test example."""
    return [(each.prompt, each.choices[each.answer]) if isinstance(each, ChoiceExample) else each for each in task]


class ForgettingReport:
    """What was measured before, during and after a run.

    Attributes:
        before, after: as `ForgettingProbe.measure` gives them; `after` with the divergences too, and empty until then.
        steps: [{"step": n, ...}] of those in between.
        budget: what `k: auto` decided: {"start", "most", "matrices", "steps": [{"step", "action", "matrices",
            "reason"}]}; None for a fixed k.
    """

    def __init__(self, controls: list[str], metric: str | None, facts: int) -> None:
        self.controls, self.metric, self.facts = controls, metric, facts
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.budget: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of forgetting.json; what isn't measured yet, or isn't finite, is null."""
        before, after = (
            {key: finite_or_none(value) for key, value in each.items()} for each in (self.before, self.after)
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
            }
        if self.facts:
            recall = {"before": before.get("recall"), "after": after.get("recall")}
            content["recall"] = {"metric": "exact_match", "facts": self.facts, **recall}
        harness = {key: {"before": before[key], "after": after.get(key)} for key in before if key.startswith(HARNESS)}
        if harness:
            content["lm_eval"] = {key.removeprefix(HARNESS): values for key, values in harness.items()}
        if self.budget is not None:
            content["budget"] = self.budget
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

    def rows(self) -> list[tuple[str, str, bool]]:
        """What is measured before and after: its title, its key in `before` and `after`, whether it is a share."""
        rows = []
        if self.metric:
            rows.append((f"task {self.metric.replace('_', ' ')}", f"task_{self.metric}", self.metric in SHARES))
        if self.facts:
            rows.append((f"recall of {self.facts} facts", "recall", True))
        for name in self.controls:
            rows.append((f"{name}: loss a token (nats)", f"{name}_loss", False))
            rows.append((f"{name}: perplexity", f"{name}_ppl", False))
        return rows + [(key.removeprefix(HARNESS), key, False) for key in self.before if key.startswith(HARNESS)]

    def divergence_rows(self) -> list[tuple[str, str]]:
        """What is measured against the base, after only: its title and its key in `after`."""
        names = [*self.controls, *(["task"] if self.metric else [])]
        return [(f"{name}: KL to the base (nats)", f"{name}_kl") for name in names]

    def table(self) -> Table:
        """Before, after and change, a row for each measure."""
        table = Table("", "before", "after", "change", title="What was learned, what was forgotten")
        for title, key, share in self.rows():
            before, after = self.before.get(key, math.nan), self.after.get(key, math.nan)
            table.add_row(title, shown(before, share), shown(after, share), shown_change(after - before, share))
        for title, key in self.divergence_rows():
            table.add_row(title, "0", number("{:.4f}", self.after.get(key, math.nan)), "")
        return table

    def delta(self, measured: Mapping[str, float]) -> float | None:
        """The rise of the control loss in `measured` since before, in nats a token: of the control that rose most.

        None without controls, infinite where a loss isn't finite.
        """
        rises = [measured[f"{name}_loss"] - self.before[f"{name}_loss"] for name in self.controls]
        return max(rise if math.isfinite(rise) else math.inf for rise in rises) if rises else None


class ForgettingCallback(TrainerCallback):
    """Measures the base before training, the model every so many steps and at the end, without disturbing the run.

    Set `trainer` after adding it, so that measurements are logged as the Trainer's own metrics are.
    """

    def __init__(self, probe: ForgettingProbe, output_dir: str | Path, every: int = 0) -> None:
        self.probe, self.every = probe, every
        self.path = Path(output_dir) / "forgetting.json"
        self.report = ForgettingReport(list(probe.controls), probe.metric, len(probe.facts))
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self.report.take_over_steps(self.path, state.global_step)
        with base_of(model):
            self.report.before = self.probe.measure(model)
        self._note(state, model, self.report.before)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            measured = self.probe.measure(model, quick=True)
            self.report.steps.append({"step": state.global_step, **measured})
            self._note(state, model, measured)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self.report.after = {**self.probe.measure(model), **self.probe.divergences(model)}
        self._note(state, model, self.report.after)

    def _note(self, state: Any, model: nn.Module, measured: Mapping[str, float]) -> None:
        if state.is_world_process_zero:
            self.report.save(self.path)
        self._log({f"forgetting/{name}": value for name, value in measured.items()}, model)

    def _log(self, metrics: Mapping[str, float], model: nn.Module) -> None:
        if self.trainer is None:
            return
        # logging takes back the wish to log this step's training loss
        wished = self.trainer.control.should_log
        # TRL puts the averages of its own metrics into the next log of the mode that the model is in
        with measuring(model):
            self.trainer.log(dict(metrics))
        self.trainer.control.should_log = wished


def _control_texts(spec: Mapping[str, Any], name: str, config: ForgettingConfig, folder: Path | None) -> list[str]:
    spec = dict(spec) if isinstance(spec, Mapping) else {"path": spec}
    column = spec.pop("text_column", None) or config.text_column
    rows = load_rows(spec, f"forgetting.control {name}", folder)
    if column not in rows.column_names:
        raise KappaTuneError(
            f"forgetting.text_column: control {name} has no column '{column}', only {', '.join(rows.column_names)}."
        )
    return [text for text in rows[column] if text and text.strip()][: config.max_samples]


def _facts(config: ForgettingConfig, folder: Path | None) -> list[tuple[str, str]]:
    spec = {key: value for key, value in config.recall.items() if key not in ("prompt", "completion")}
    rows = load_rows(spec, "forgetting.recall", folder)
    return pairs(rows, config.recall["prompt"], config.recall["completion"])[: config.max_samples]


def shown(value: float, share: bool) -> str:
    """A measure as tables show it."""
    return number("{:.1%}" if share else "{:.3f}", value)


def shown_change(change: float, share: bool) -> str:
    """The change of a measure as tables show it."""
    return number("{:+.1f} points", 100 * change) if share else number("{:+.3f}", change)


def finite_or_none(value: float) -> float | None:
    """`value` for a JSON file, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None
