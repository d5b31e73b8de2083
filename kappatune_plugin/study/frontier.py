"""A finished run scaled back: what it has learned and forgotten at each scale of what it changed."""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.logits import padded
from kappatune_plugin.forgetting.measures import measuring
from kappatune_plugin.forgetting.report import finite_or_none
from kappatune_plugin.interpolation import per_matrix
from kappatune_plugin.interpolation.change import Changes
from kappatune_plugin.interpolation.dial import FURTHER
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.one_scale import largest_within
from kappatune_plugin.interpolation.texts import Control, Texts
from kappatune_plugin.interpolation.token_losses import labelled_nats, texts
from kappatune_plugin.study.bench import Bench
from kappatune_plugin.study.method_configs import peft_refusals
from kappatune_plugin.study.settings import Frontier

# tokens of held-out rows, and of the half of each control that chooses, that are read at each scale tried
ENOUGH_TOKENS = 16384


def measure_frontier(bench: Bench, model: nn.Module, name: str, settings: Frontier) -> dict[str, Any]:
    """What `model`, trained by the method `name`, has learned and forgotten along the scale of what it changed.

    The model is used up: it is scaled, and an adapter that can't be scaled is merged.

    Held-out rows and one half of each control choose the scale for a limit; the test rows and the other half of each
    control are measured at it.

    Returns:
        {"points": one for each of the settings' scales and 1, "within": [{"limit", "one": point, "per_matrix": point or
        None}]}. A point is {"scale" (of one for each matrix the median), "chosen_rise" and "rise" of the control that
        rose most on the half that chooses and on the other, in nats a token, "validation_loss", and what
        `ForgettingProbe.measure` measures quickly}; what isn't finite is None. {"why_not"} with a sentence where the
        run can't be scaled.
    """
    try:
        scaled, changes = _scalable(bench, model, name)
        # a Trainer's model brings its precision
        precision = nullcontext() if scaled is model else bench.precision()
        with measuring(scaled), precision:
            line = _Line(bench, scaled, changes)
            points = [line.point(scale) for scale in settings.measured]
            within = [line.within(limit, settings) for limit in settings.limits]
    except KappaTuneError as error:
        return {"why_not": str(error)}
    return {"points": points, "within": within}


def _scalable(bench: Bench, model: nn.Module, name: str) -> tuple[nn.Module, Changes]:
    """`model`, with its adapter merged where that can't be scaled itself, and what training changed in it."""
    if not hasattr(model, "peft_config"):
        return model, changes_of_checkpoint(bench.base, model)
    try:
        return model, changes_of_adapter(model)
    except KappaTuneError:
        # methods such as OSF, whose change is no multiple of any of its values
        if not hasattr(model, "merge_and_unload"):
            raise
    with peft_refusals(name):
        merged = model.merge_and_unload()
    return merged, changes_of_checkpoint(bench.base, merged)


class _Line:
    """A trained model on the line from its base, and what is measured along it."""

    def __init__(self, bench: Bench, model: nn.Module, changes: Changes) -> None:
        self.bench, self.model, self.changes = bench, model, changes
        size = bench.probe.batch_size
        # the controls are read in halves
        self.rest = replace(bench.probe, controls={})
        self.rows = labelled_texts(model, bench.validation, size).up_to(ENOUGH_TOKENS)
        changes.set(0.0)
        self.choosing, self.unseen = [], []
        for name, pieces in bench.probe.controls.items():
            if len(pieces) < 2:
                raise KappaTuneError(f"forgetting.control {name} is one piece of text: two are the least to divide it.")
            whole = texts(model, [[(piece, 1)] for piece in pieces], size)
            first, second = halves(len(pieces))
            self.choosing.append(Control(whole.take(first).up_to(ENOUGH_TOKENS)))
            self.unseen.append(Control(whole.take(second)))
        self._points: dict[float, dict[str, float | None]] = {}
        self._losses: dict[float, float] = {}
        self._rises: dict[float, float] = {}

    def point(self, scale: float) -> dict[str, float | None]:
        """Everything at one scale for all."""
        if scale not in self._points:
            risen, loss = self._rise_at(scale), self._loss_at(scale)
            self._points[scale] = self._measured([scale] * len(self.changes.names), risen, loss)
        return self._points[scale]

    def within(self, limit: float, settings: Frontier) -> dict[str, Any]:
        """The points of lowest held-out loss whose control rises by at most `limit` on the half that chooses."""
        one = self._one_within(limit, settings.measured)
        each = self._each_within(limit, one) if settings.per_matrix else None
        return {"limit": limit, "one": self.point(one), "per_matrix": each}

    def _one_within(self, limit: float, grid: Sequence[float]) -> float:
        within = [self._rise_at(scale) <= limit for scale in grid]
        # also by scales that were tried for another limit
        beyond = min((scale for scale, rise in self._rises.items() if rise > limit), default=None)
        least = max(scale for scale in (0.0, *self._rises) if beyond is None or scale < beyond)
        largest = 1.0 if beyond is None else largest_within(self._rise_at, limit, beyond, least)
        kept = {0.0, largest, *itertools.compress(grid, within)}
        return min(sorted(kept), key=self._loss_at)

    def _each_within(self, limit: float, one: float) -> dict[str, float | None]:
        """One scale for each matrix, fitted to every other held-out row; one for all where the others prefer it."""
        fitted, others = (self.rows.take(range(first, len(self.rows), 2)) for first in (0, 1))
        # where nothing has to be taken back, or nothing is left to judge by
        if one == 1 or not len(others):
            return self.point(one)
        with self.changes.taking_gradients():
            alphas = per_matrix.choose(self.changes, fitted, self.choosing, one or 1 / 64, limit, quiet=True)
        further = largest_within(lambda scale: self._rise(_times(alphas, scale)), limit, most=FURTHER)
        alphas = _times(alphas, further)
        # a loss that is NaN is no better
        if not self._loss(alphas, others) < self._loss([one] * len(alphas), others):
            return self.point(one)
        return self._measured(alphas, self._rise(alphas), self._loss(alphas, self.rows))

    def _measured(self, alphas: Sequence[float], risen: float, loss: float) -> dict[str, float | None]:
        self.changes.set(alphas)
        found = {
            "scale": sorted(alphas)[len(alphas) // 2],
            "chosen_rise": risen,
            "rise": _worst(self.unseen),
            "validation_loss": loss,
            **self.rest.measure(self.model, quick=True),
        }
        return {key: finite_or_none(value) for key, value in found.items()}

    def _rise_at(self, scale: float) -> float:
        if scale not in self._rises:
            self._rises[scale] = self._rise([scale] * len(self.changes.names))
        return self._rises[scale]

    def _loss_at(self, scale: float) -> float:
        if scale not in self._losses:
            loss = self._loss([scale] * len(self.changes.names), self.rows)
            self._losses[scale] = loss if math.isfinite(loss) else math.inf
        return self._losses[scale]

    def _rise(self, alphas: Sequence[float]) -> float:
        self.changes.set(alphas)
        return _worst(self.choosing)

    def _loss(self, alphas: Sequence[float], rows: Texts) -> float:
        self.changes.set(alphas)
        return float(rows.measured().sum() / sum(rows.tokens))


def labelled_texts(model: nn.Module, rows: Dataset, batch_size: int) -> Texts:
    """The losses of rows as TRL prepares them: of the tokens in "labels", or of all without that column.

    Args:
        rows: with a column "input_ids"; rows that predict nothing are left out.
    """
    labels = rows["labels"] if "labels" in rows.column_names else rows["input_ids"]
    kept = [(ids, own) for ids, own in zip(rows["input_ids"], labels, strict=True) if set(own[1:]) - {IGNORED}]

    def nats(places: Sequence[int]) -> Tensor:
        found = [_row_nats(model, [kept[place] for place in batch]) for batch in _batches(places, batch_size)]
        return torch.cat(found)

    return Texts(nats, [sum(label != IGNORED for label in own[1:]) for _, own in kept], [len(ids) for ids, _ in kept])


def _row_nats(model: nn.Module, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Summed nats of each row's labels, shape (rows,)."""
    labels = pad_sequence([torch.tensor(own) for _, own in batch], batch_first=True, padding_value=IGNORED)
    return labelled_nats(model, *padded([ids for ids, _ in batch], model.device), labels.to(model.device))


def _batches(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[first : first + size] for first in range(0, len(places), size)]


def halves(count: int) -> tuple[list[int], list[int]]:
    """The positions of the pieces that choose, and of the others: drawn, since a file may be sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order[: count // 2], order[count // 2 :]


def _worst(controls: Sequence[Control]) -> float:
    return max(control.rise().mean for control in controls)


def _times(alphas: Sequence[float], scale: float) -> list[float]:
    return [min(1.0, alpha * scale) for alpha in alphas]
