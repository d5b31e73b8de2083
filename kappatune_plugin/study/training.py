"""One run of a comparison: a method, a learning rate and a seed in, a record of losses and measurements out."""

import copy
import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.forgetting.measures import base_in_place
from kappatune_plugin.forgetting.report import finite_or_none
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.frontier import measure_frontier
from kappatune_plugin.study.method_configs import arm_config, peft_refusals
from kappatune_plugin.study.methods import Method
from kappatune_plugin.study.settings import Frontier
from kappatune_plugin.study.summary import first_crossing, or_infinite, smoothed


def train_run(
    bench: Bench,
    method: Method,
    learning_rate: float,
    seed: int,
    every: int,
    stop_at: int | None = None,
    crossing: tuple[int, float] | None = None,
    stop_at_crossing: bool = False,
    frontier: Frontier | None = None,
    below: float = math.inf,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Train a copy of the base by `method`.

    Args:
        every: steps between measurements without the slow ones (written answers, lm_eval); at the end everything is
            measured.
        stop_at: end after this step, with the schedule and the data order of the whole run, and measure only there.
        crossing: (window, target): also measure where the loss, smoothed over `window` steps, first reaches `target`.
        stop_at_crossing: end there.
        frontier: scale what a whole run changed back so, and measure that; None for not at all.
        below: not where the loss on held-out rows is above this, as a run at a worse rate isn't used further.
        progress: called after each step with the share of them that is done.

    Returns:
        "losses" after each step (None where not finite; of the task's tokens where text is mixed in), "points"
        ({"step", and `Bench.measure`}), "at_target" (a point, or None), "validation_loss" and "frontier" (of whole
        runs; `measure_frontier`), "order" (a fingerprint of each training batch), "trainable" (parameters),
        "training_bytes" (their gradients and the optimizer's state), "peak_bytes" (of a GPU; None without), "seconds"
        (training alone).

    Raises:
        KappaTuneError: the method can't be applied to this model.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder, _quiet():
        replay = bench.replay(method)
        rows, texts = (bench.train, None) if replay is None else bench.replayed(replay)
        trainer = _trainer(bench, rows, method, learning_rate, seed, Path(folder))
        order = _BatchOrder(trainer.data_collator)
        trainer.data_collator = order
        course = _Course(bench, every, stop_at, crossing, stop_at_crossing)
        if texts is not None:
            course.task_loss = _TaskLoss(trainer, texts)
        trainer.add_callback(course)
        trainer.add_callback(_Progress(progress, stop_at))
        trainer.train()
        record = _record(trainer, course, order)
        if stop_at is None:
            loss = record["validation_loss"] = finite_or_none(trainer.evaluate()["eval_loss"])
            if frontier is not None and or_infinite(loss) <= below:
                trained = trainer.accelerator.unwrap_model(trainer.model)
                record["frontier"] = measure_frontier(bench, trained, method.name, frontier)
    # modules and callbacks are in reference cycles; without collecting them this run's GPU memory stays in use
    del trainer, order, course
    if torch.cuda.is_available():
        gc.collect()
    return record


def _record(trainer: SFTTrainer, course: "_Course", order: "_BatchOrder") -> dict[str, Any]:
    """What there is to say of a run that has ended."""
    # a loader reads ahead of the training
    batches = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    return {
        "losses": course.losses,
        "points": course.points,
        "at_target": course.at_target,
        "order": order.batches[:batches],
        "trainable": sum(parameter.numel() for parameter in _trained(trainer.model)),
        "training_bytes": _training_bytes(trainer),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "seconds": course.seconds,
    }


def _trainer(bench: Bench, rows: Dataset, method: Method, learning_rate: float, seed: int, folder: Path) -> SFTTrainer:
    model = copy.deepcopy(bench.base)
    config = arm_config(method, bench.pool, bench.base, seed)
    if config is None:
        model.requires_grad_(True)
        # measurements against the base use PEFT's `disable_adapter`
        model.disable_adapter = partial(base_in_place, model, bench.base)
    with peft_refusals(method.name) if method.kind == "peft" else nullcontext():
        trainer = SFTTrainer(
            model=model,
            args=bench.arguments(learning_rate, seed, folder),
            train_dataset=rows,
            eval_dataset=bench.validation,
            processing_class=bench.tokenizer,
            peft_config=config,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings, which every run of a comparison would repeat."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


class _Course(TrainerCallback):
    """Records a run's losses and measurements, and stops it where that was asked for."""

    def __init__(
        self,
        bench: Bench,
        every: int,
        stop_at: int | None,
        crossing: tuple[int, float] | None,
        stop_at_crossing: bool,
    ) -> None:
        self.bench, self.every, self.stop_at = bench, every, stop_at
        self.crossing, self.stop_at_crossing = crossing, stop_at_crossing
        self.losses: list[float | None] = []
        self.points: list[dict[str, float | None]] = []
        self.at_target: dict[str, float | None] | None = None
        self.task_loss: _TaskLoss | None = None
        self.seconds, self._started = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        step, last = state.global_step, self.stop_at or state.max_steps
        if step == last or (self.stop_at is None and step % self.every == 0):
            self.points.append(self._measured(model, step, quick=step != last))
        if step == last:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], model: nn.Module, **_: Any) -> None:
        """Called after `on_step_end`, before the next step."""
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.losses.append(finite_or_none(loss if self.task_loss is None else self.task_loss.of_step(loss)))
        if self.crossing and self.at_target is None:
            window, target = self.crossing
            if first_crossing(smoothed(self.losses, window), target) == len(self.losses):
                self.at_target = self._measured(model, state.global_step)
                control.should_training_stop = control.should_training_stop or self.stop_at_crossing

    def _measured(self, model: nn.Module, step: int, quick: bool = False) -> dict[str, float | None]:
        measured = self.bench.measure(model, quick)
        return {"step": step, **{key: finite_or_none(value) for key, value in measured.items()}}


class _Progress(TrainerCallback):
    def __init__(self, progress: Callable[[float], None], stop_at: int | None) -> None:
        self.progress, self.stop_at = progress, stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step / (self.stop_at or state.max_steps))


class _TaskLoss:
    """The task's part of a trainer's loss: methods are compared at the same one, with text mixed in and without.

    Each batch carries the labels of its task rows beside all labels; hooks on the model take both means.
    """

    def __init__(self, trainer: SFTTrainer, texts: Dataset) -> None:
        self.texts = {tuple(ids) for ids in texts["input_ids"]}
        self._collator, self._labels = trainer.data_collator, None
        self._all, self._task = [0.0, 0], [0.0, 0]
        self._last = math.nan
        trainer.data_collator = self._collated
        trainer.model.register_forward_pre_hook(self._take_labels, with_kwargs=True)
        trainer.model.register_forward_hook(self._add, with_kwargs=True)

    def of_step(self, loss: float) -> float:
        """The loss of the step just made with the mean of the task's tokens in the place of that of all.

        What a loss has beside these means (the balancing of experts) stays. A step without a row of the task repeats
        the last one's.
        """
        if self._task[1]:
            self._last = loss - self._all[0] / self._all[1] + self._task[0] / self._task[1]
        self._all, self._task = [0.0, 0], [0.0, 0]
        return self._last

    def _collated(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collator(rows)
        return {**batch, "task_labels": self._collator([self._masked(row) for row in rows])["labels"]}

    def _masked(self, row: dict[str, Any]) -> dict[str, Any]:
        ids = row["input_ids"]
        return {**row, "labels": [IGNORED] * len(ids) if tuple(ids) in self.texts else row.get("labels", ids)}

    def _take_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._labels = kwargs.get("task_labels")
        return args, {key: value for key, value in kwargs.items() if key != "task_labels"}

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._labels is None or not model.training:
            return
        labels = kwargs["labels"][:, 1:]
        nats = getattr(output, "log_probs", None)
        if nats is None:
            logits = output.logits[:, -labels.shape[1] - 1 : -1].float().transpose(1, 2)
            nats = -nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        for total, of in ((self._all, labels), (self._task, self._labels[:, 1:])):
            total[0] -= nats.detach()[of != IGNORED].double().sum().item()
            total[1] += int((of != IGNORED).sum())


class _BatchOrder:
    """A data collator that records a fingerprint of each batch."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[str] = []

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        self.batches.append(hashlib.blake2b(batch["input_ids"].numpy().tobytes(), digest_size=4).hexdigest())
        return batch


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _training_bytes(trainer: SFTTrainer) -> int:
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in _trained(trainer.model))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return gradients + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
