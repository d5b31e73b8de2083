"""Recordings and a speech model in, `Texts` out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.interpolation.texts import Texts
from kappatune_plugin.speech.collator import SpeechCollator


def speech_texts(
    model: nn.Module, collator: SpeechCollator, rows: Sequence[Mapping[str, Any]], batch_size: int = 8
) -> Texts:
    """The losses of the transcripts of `rows`, as `collator` labels them, under `model` as it is when asked.

    Raises:
        KappaTuneError: a recording that can't be read.
    """

    def nats(places: Sequence[int]) -> Tensor:
        found = []
        for start in range(0, len(places), batch_size):
            batch = collator([rows[place] for place in places[start : start + batch_size]])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float().transpose(1, 2)
            found.append(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(-1))
        return torch.cat(found)

    predicted, read = [], []
    for row in rows:
        labels = collator([row])["labels"][0]
        predicted.append(int((labels != IGNORED).sum()))
        read.append(len(labels))
    return Texts(nats, predicted, read)
