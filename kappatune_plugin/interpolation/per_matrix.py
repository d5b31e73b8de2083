"""One scale for each trained matrix: learn most within the limit, by projected Adam."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kappatune_plugin.interpolation.change import Changes
from kappatune_plugin.interpolation.texts import Control, Texts

# a step of Adam at first, and at the end
RATES = 0.08, 0.02
BETAS = 0.8, 0.95
# of the rise that the weight of the controls follows, what an earlier mini-batch counts
MEMORY = 0.7


def choose(
    changes: Changes,
    task: Texts,
    controls: Sequence[Control],
    start: float,
    limit: float,
    steps: int = 24,
    batch: int = 512,
    seed: int = 0,
    quiet: bool = False,
) -> list[float]:
    """The alphas, each in [0, 1], that minimize the task's loss while no control's mean rise passes `limit`.

    Minimizes task loss + weight * control rise on mini-batches; one backward pass gives the slopes for all alphas. The
    second half of the steps is averaged, so that no single mini-batch decides.

    Args:
        start: the scale for all to begin at, in (0, 1].
        limit: of the mean rise on the documents of `controls`, in nats a token.
        batch: about how many tokens of the task, and of each control, a mini-batch reads.
    """
    rows = _Batches(task.lengths, batch, seed)
    documents = [_Batches(each.texts.lengths, batch, seed) for each in controls]
    descent, tried = _Descent(len(changes.names), start, limit), []
    for step in tqdm(range(steps), desc="One scale a matrix", disable=quiet, leave=False):
        changes.set(descent.alphas)
        _, learned = _slopes(changes, task.loss, rows.next())
        found = [
            _slopes(changes, each.differentiable_rise, its.next())
            for each, its in zip(controls, documents, strict=True)
        ]
        descent.step(learned, *max(found, key=lambda pair: pair[0]), share=step / steps)
        tried.append(descent.alphas)
    return np.mean(tried[steps // 2 :], axis=0).tolist()


class _Descent:
    """Projected Adam on task + weight * control, where the weight follows how far the control is from the limit.

    The weight begins where both losses pull alike.
    """

    def __init__(self, count: int, start: float, limit: float) -> None:
        self.alphas, self._limit = np.full(count, float(start)), limit
        self._mean, self._square = np.zeros(count), np.zeros(count)
        self._taken, self._weight, self._rise = 0, 0.0, 0.0

    def step(self, learned: np.ndarray, rise: float, forgotten: np.ndarray, share: float) -> None:
        """Go on from the slopes of the task and of the control that rose most; `share` of all steps are done."""
        if not self._taken:
            self._rise, self._weight = rise, max(-learned.sum(), 1e-3) / max(forgotten.sum(), 1e-3)
        self._taken += 1
        self._rise = MEMORY * self._rise + (1 - MEMORY) * rise
        self._weight *= math.exp(np.clip((self._rise - self._limit) / self._limit, -0.5, 0.5))
        slope = learned + self._weight * forgotten
        self._mean = BETAS[0] * self._mean + (1 - BETAS[0]) * slope
        self._square = BETAS[1] * self._square + (1 - BETAS[1]) * slope**2
        mean, square = self._mean / (1 - BETAS[0] ** self._taken), self._square / (1 - BETAS[1] ** self._taken)
        rate = RATES[0] + share * (RATES[1] - RATES[0])
        self.alphas = np.clip(self.alphas - rate * mean / (np.sqrt(square) + 1e-12), 0.0, 1.0)


def _slopes(changes: Changes, loss: Callable[[Sequence[int]], Tensor], rows: Sequence[int]) -> tuple[float, np.ndarray]:
    """The loss on these rows, and its slope for each alpha."""
    changes.clear()
    with torch.enable_grad():
        value = loss(rows)
        value.backward()
    return value.item(), np.asarray(changes.slopes())


class _Batches:
    """Positions of documents in mini-batches of about `batch` tokens, each of them once before any comes again."""

    def __init__(self, tokens: Sequence[int], batch: int, seed: int) -> None:
        self._tokens, self._batch, self._left = tokens, batch, []
        self._random = np.random.default_rng(seed)

    def next(self) -> list[int]:
        """The positions of the next mini-batch."""
        taken: list[int] = []
        left = self._batch
        while len(taken) < len(self._tokens):
            self._left = self._left or self._random.permutation(len(self._tokens)).tolist()
            length = self._tokens[self._left[-1]]
            # as near to the size as whole documents come, and one at least
            if taken and length > 2 * left:
                break
            left -= length
            taken.append(self._left.pop())
        return taken
