"""`k: auto` inside a Trainer: measures, decides, grows the budget, and goes back where it forgot too much."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kappatune_plugin.forgetting.callback import ForgettingCallback
from kappatune_plugin.forgetting.probe import ForgettingProbe
from kappatune_plugin.selection.auto_budget import AutoBudget, Decision, decide
from kappatune_plugin.tuner.layer import KappaTuneLayer

LOGGED = "kappatune/matrices"


class AutoBudgetCallback(ForgettingCallback):
    """Measures forgetting as its base class does, and trains as many matrices as `decide` says.

    What the run leaves was measured within `max_delta`: passing it brings back the values of the last measurement that
    was within, or the base's own. If that was before the budget grew, training continues with the earlier, smaller
    budget; otherwise it ends. A resumed run measures where it resumes.

    Attributes:
        counts: the numbers of matrices that may be trained, rising.
        matrices: the number that is trained now; after training the one that the kept values were trained with.
        log: forgetting.json's "budget" -> "steps".
    """

    def __init__(
        self,
        probe: ForgettingProbe,
        output_dir: str | Path,
        every: int,
        settings: AutoBudget,
        counts: list[int],
        max_delta: float,
    ) -> None:
        super().__init__(probe, output_dir, every)
        self.settings, self.counts, self.max_delta = settings, counts, max_delta
        self.matrices = counts[0]
        self.log: list[dict[str, Any]] = []
        self.report.budget = {"start": counts[0], "most": counts[-1], "steps": self.log}
        self._within: dict[str, Tensor] = {}
        self._within_matrices = counts[0]
        self._shrunk = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        super().on_train_begin(args, state, control, model=model)
        self._tuner = model.base_model
        logged = [entry for entry in state.log_history if LOGGED in entry]
        self._train(int(logged[-1][LOGGED]) if logged else self.matrices)
        self._since = logged[-1]["step"] if logged else state.global_step
        counts = [entry[LOGGED] for entry in logged]
        self._shrunk = counts != sorted(counts)
        if not logged:
            self._log_matrices(model)
        elif self.report.delta(self.probe.measure(model, quick=True)) <= self.max_delta:
            self._remember()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        measured = len(self.report.steps)
        super().on_step_end(args, state, control, model=model)
        if len(self.report.steps) > measured:
            self._decide(state, control, model, kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        # as it is; once more when it is known whether it stays so
        self.save_adapter()
        rise = self.report.delta(self.probe.measure(model, quick=True))
        if not rise <= self.max_delta:
            # a run that ends between two measurements
            self._go_back(state, decide(self.settings, (), 0, rise, self.max_delta, can_grow=False))
        self.report.budget["matrices"] = self.matrices
        super().on_train_end(args, state, control, model=model)

    def _decide(self, state: Any, control: Any, model: nn.Module, optimizer: Any) -> None:
        losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        rise = self.report.delta(self.report.steps[-1])
        can = self.matrices < self.counts[-1] and not self._shrunk, self._within_matrices < self.matrices
        decision = decide(self.settings, losses, self._since, rise, self.max_delta, *can)
        if decision.action in ("keep", "grow"):
            self._remember()
        if decision.action == "grow":
            self._train(next(count for count in self.counts if count > self.matrices))
            self._note_decision(state, decision)
        elif decision.action != "keep":
            self._go_back(state, decision)
            self._forget_states(optimizer)
            self._shrunk = True
        if decision.action == "stop":
            control.should_training_stop = True
        if decision.action in ("grow", "shrink"):
            self._since = state.global_step
            self._log_matrices(model)

    def _train(self, count: int) -> None:
        self.matrices = count
        self._tuner.rest_after(count)

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep a copy of the values as they are, on the CPU."""
        self._within_matrices = self.matrices
        # one that rests has the base's values
        self._within = {
            layer.unit.name: layer.active.weight.detach().to("cpu", copy=True)
            for layer in self._layers()
            if not layer.resting
        }

    @torch.no_grad()
    def _go_back(self, state: Any, decision: Decision) -> None:
        for layer in self._layers():
            within = self._within.get(layer.unit.name)
            layer.active.weight.copy_(layer.original.whole(layer.parameter) if within is None else within)
        self._tuner.write_through(everything=True)
        self._train(self._within_matrices)
        self._note_decision(state, decision)

    def _forget_states(self, optimizer: Any) -> None:
        """What rests has no optimizer state."""
        for layer in self._layers():
            if layer.resting:
                optimizer.state.pop(layer.active.weight, None)

    def _layers(self) -> list[KappaTuneLayer]:
        return [layer for layer in self._tuner.layers() if layer.active is not None]

    def _note_decision(self, state: Any, decision: Decision) -> None:
        entry = {"step": state.global_step, "action": decision.action, "matrices": self.matrices}
        self.log.append({**entry, "reason": decision.reason})

    def _log_matrices(self, model: nn.Module) -> None:
        """Put the budget among the Trainer's metrics: a resumed run reads it there."""
        self._log({LOGGED: self.matrices}, model)
