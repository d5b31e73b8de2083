"""The end-of-text token in the task's loss: left out of it where the recipe says so, and its share measured.

TRL ends every row with that token. Where the base has never ended such a text, learning to stop can be most of the
loss, and most of what the run forgets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTTrainer

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.forgetting.measures import base_of, measuring, token_losses

# measuring costs about as much as one or two steps
ROWS, TOKENS, BATCH = 32, 8192, 8
Document = tuple[list[int], list[int]]


@dataclass(frozen=True)
class EndTokenShare:
    """How much of the task's loss before training is the end-of-text token.

    Attributes:
        token: as the tokenizer writes it.
        share: of the summed loss, 0 to 1.
        nats: the mean loss of one such token; 0 where the loss has none.
        others: the mean loss of the other tokens; 0 where there are none.
    """

    token: str
    share: float
    nats: float
    others: float


def tokenizer_of(trainer: SFTTrainer) -> Any:
    """The trainer's tokenizer; a processor, of a model that also sees, holds it."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def labels_of(row: Mapping[str, Any], completion_only: bool) -> list[int]:
    """What a prepared row is trained on, token by token: ids, or -100 where the loss leaves one out.

    Today's TRL stores `labels`; older ones keep masks beside the ids, which the collator puts together.
    """
    names = ("assistant_masks", *(["completion_mask"] if completion_only else []))
    masks = [row[name] for name in names if row.get(name) is not None]
    labels = row["input_ids"] if row.get("labels") is None else row["labels"]
    bits = zip(*masks, strict=True) if masks else ((True,) for _ in labels)
    return [label if all(each) else IGNORED for label, each in zip(labels, bits, strict=True)]


def leave_out_end_token(trainer: SFTTrainer) -> None:
    """Take every end-of-text token out of the loss of the trainer's rows, for training and for evaluation."""
    settings = {"end": tokenizer_of(trainer).eos_token_id, "completion_only": trainer.completion_only_loss}
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name)
        if rows is not None:
            setattr(trainer, name, rows.map(_without_end, fn_kwargs=settings))


def _without_end(row: dict[str, Any], end: int, completion_only: bool) -> dict[str, list[int]]:
    return {"labels": [IGNORED if label == end else label for label in labels_of(row, completion_only)]}


class EndTokenCallback(TrainerCallback):
    """Measures, as training begins, what share of the task's loss on the base model is the end-of-text token.

    Attributes:
        found: None until then, and where the rows aren't tokens that it could be measured on.
    """

    def __init__(self, documents: Sequence[Document], end: int | None, token: str | None) -> None:
        self.documents, self.end, self.token = documents, end, token
        self.found: EndTokenShare | None = None

    @classmethod
    def of(cls, trainer: SFTTrainer) -> "EndTokenCallback":
        """One that measures at most 32 of the trainer's rows, evenly spread."""
        tokenizer = tokenizer_of(trainer)
        return cls(list(_some(trainer)), tokenizer.eos_token_id, tokenizer.eos_token)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if not self.documents or self.end is None:
            return
        with measuring(model), base_of(model):
            batches = [self.documents[start : start + BATCH] for start in range(0, len(self.documents), BATCH)]
            measured = [self._losses(model, batch) for batch in batches]
        nats, ends = (torch.cat(each) for each in zip(*measured, strict=True))
        total, of_ends = nats.sum().item(), nats[ends].sum().item()
        means = [each.mean().item() if len(each) else 0.0 for each in (nats[ends], nats[~ends])]
        self.found = EndTokenShare(self.token, of_ends / total if total else 0.0, *means)

    def _losses(self, model: nn.Module, batch: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each token that is learned, and whether it is the end token."""
        losses, _ = token_losses(model, [ids for ids, _ in batch])
        learned = torch.full((len(batch), losses.shape[1]), IGNORED)
        for place, (_, labels) in enumerate(batch):
            learned[place, : len(labels) - 1] = torch.tensor(labels[1:])
        chosen = learned != IGNORED
        return losses.cpu().double()[chosen], learned[chosen] == self.end


def _some(trainer: SFTTrainer) -> Iterator[Document]:
    """Texts with their labels, from rows evenly spread over the trainer's; of streamed rows from the first."""
    rows, left = trainer.train_dataset, TOKENS
    for row in _spread(rows):
        if "input_ids" not in row:
            return
        if left <= 0:
            return
        labels, start = labels_of(row, trainer.completion_only_loss), 0
        for length in row.get("seq_lengths") or [len(labels)]:
            ids, learned = row["input_ids"][start : start + length], labels[start : start + length]
            start, left = start + length, left - length
            if any(label != IGNORED for label in learned[1:]):
                yield ids, learned


def _spread(rows: Dataset) -> Iterator[dict[str, Any]]:
    if isinstance(rows, Dataset):
        rows = rows.select(range(0, len(rows), -(-len(rows) // ROWS)))
    yield from rows.take(ROWS)
