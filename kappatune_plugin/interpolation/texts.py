"""Texts whose loss is measured, and how much that rose: on them, and at most on all texts like them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
# with fewer documents a t interval stands on one or two of them
ENOUGH = 10


@dataclass
class Texts:
    """Documents, as a model is measured on them.

    Attributes:
        nats: positions of documents -> the loss of each, summed over its tokens, shape (documents,); differentiable
            where gradients are on.
        tokens: how many tokens of each document are predicted.
        read: how many tokens of each document are read, prompts too; None for about as many as are predicted.
    """

    nats: Callable[[Sequence[int]], Tensor]
    tokens: Sequence[int]
    read: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, positions: Sequence[int]) -> "Texts":
        """These documents alone."""
        kept = list(positions)
        tokens, read = ([each[place] for place in kept] for each in (self.tokens, self.lengths))
        return Texts(lambda rows: self.nats([kept[row] for row in rows]), tokens, read)

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens of each document are read."""
        return self.tokens if self.read is None else self.read

    def up_to(self, tokens: int) -> "Texts":
        """The first documents, with about so many tokens to read in all; at least two."""
        within = np.searchsorted(np.cumsum(self.lengths), tokens, side="right")
        return self.take(range(min(len(self), max(2, int(within)))))

    def loss(self, rows: Sequence[int] | None = None) -> Tensor:
        """Mean nats a token of all documents, or of these; differentiable where gradients are on."""
        rows = range(len(self)) if rows is None else rows
        return self.nats(rows).sum() / sum(self.tokens[row] for row in rows)

    def measured(self) -> np.ndarray:
        """Summed nats of each document, float64."""
        with torch.no_grad():
            return self.nats(range(len(self))).double().cpu().numpy()


@dataclass(frozen=True)
class Rise:
    """How much a loss rose, in nats a token, estimated from documents.

    Attributes:
        mean: over all tokens of the documents.
        upper: the one-sided 95% upper limit of the mean over all documents like these; the mean itself for one
            document, infinite for a loss that isn't finite.
        documents: how many were measured.
    """

    mean: float
    upper: float
    documents: int

    @property
    def enough(self) -> bool:
        """Whether there were documents enough to promise anything of others."""
        return self.documents >= ENOUGH


def rise(before: np.ndarray, after: np.ndarray, tokens: Sequence[int]) -> Rise:
    """The rise from `before` to `after`, summed nats of the same documents.

    A ratio of two sums over documents, all tokens alike. Its interval is the t interval of the documents' residuals.
    """
    change, tokens, count = after - before, np.asarray(tokens, dtype=float), len(tokens)
    if not np.isfinite(change).all():
        return Rise(np.inf, np.inf, count)
    mean = change.sum() / tokens.sum()
    if count < 2:
        return Rise(float(mean), float(mean), count)
    # scipy takes long to load
    from scipy.stats import t

    residuals = (change - mean * tokens) / tokens.mean()
    error = residuals.std(ddof=1) / np.sqrt(count)
    return Rise(float(mean), float(mean + t.ppf(CONFIDENCE, count - 1) * error), count)


class Control:
    """Texts that are not to be forgotten, paired with what the base's loss on each is.

    Make it while the model is the base.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts, self._before = texts, texts.measured()

    def rise(self) -> Rise:
        """How much the loss of the model as it is now is above the base's."""
        return rise(self._before, self.texts.measured(), self.texts.tokens)

    def differentiable_rise(self, rows: Sequence[int]) -> Tensor:
        """The rise on these documents, in nats a token; differentiable."""
        before = float(self._before[list(rows)].sum()) / sum(self.texts.tokens[row] for row in rows)
        return self.texts.loss(rows) - before
