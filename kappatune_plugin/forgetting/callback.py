"""Measures forgetting before, during and after a Trainer's run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.forgetting.measures import base_of, measuring, shown_as
from kappatune_plugin.forgetting.probe import ForgettingProbe, Remember, measured_now

# what the trained model wrote to the task's prompts, beside the scores
ANSWERS = "answers.jsonl"


class ForgettingCallback(TrainerCallback):
    """Measures the base before training, the model every so many steps and at the end, without disturbing the run.

    Attributes:
        trainer: set it after adding the callback, and measurements are logged as the Trainer's own metrics are.
        remember: keeps what was measured of the base for other runs, see `ForgettingProbe.measure`.
        save: called when training has ended, before the last measurement: that may take hours, or fail.
    """

    def __init__(self, probe: ForgettingProbe, output_dir: str | Path, every: int = 0) -> None:
        self.probe, self.every = probe, every
        self.path = Path(output_dir) / "forgetting.json"
        self.report = probe.new_report()
        self.trainer: Any = None
        self.save: Callable[[], None] | None = None
        self.remember: Remember = measured_now

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self.report.take_over_steps(self.path, state.global_step)
        with base_of(model), shown_as(None if args.disable_tqdm else "base"):
            self.report.before = self.probe.measure(model, remember=self.remember)
        # a resumed run is past the step that the base belongs to, and its file holds more than is known again here
        if not state.global_step:
            self._note(state, model, self.report.before)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            with shown_as(None if args.disable_tqdm else f"step {state.global_step}"):
                measured = self.probe.measure(model, quick=True)
            self.report.steps.append({"step": state.global_step, **measured})
            self._note(state, model, measured)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self.save_adapter()
        try:
            with shown_as(None if args.disable_tqdm else "trained"):
                self.report.after = {**self.probe.measure(model), **self.probe.divergences(model)}
        except Exception as error:
            # models, tokenizers and harnesses raise anything; what has been trained is not lost by it
            kept = f" The adapter was saved before, in {self.path.parent}." if self.save else ""
            raise KappaTuneError(
                f"Training has ended, and measuring after it failed: {type(error).__name__}: {error}.{kept} "
                "`kappatune eval` measures again."
            ) from error
        self._note(state, model, self.report.after)
        if self.probe.answers and state.is_world_process_zero:
            rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.probe.answers)
            write_text(self.path.with_name(ANSWERS), "".join(rows))

    def save_adapter(self) -> None:
        """Call `save`, if it is set."""
        if self.save is not None:
            self.save()

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
