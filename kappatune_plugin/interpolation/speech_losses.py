"""Recordings and a speech model in, `Texts` out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.interpolation.texts import Texts
from kappatune_plugin.interpolation.token_losses import summed_nats
from kappatune_plugin.speech.collator import SpeechCollator

# bytes of what the processor made that stay in memory: of 30 seconds of sound Whisper's takes 1.5 MB
KEPT = 2 * 2**30


def speech_texts(
    model: nn.Module, collator: SpeechCollator, rows: Sequence[Mapping[str, Any]], batch_size: int = 8
) -> Texts:
    """The losses of the transcripts of `rows`, as `collator` labels them, under `model` as it is when asked.

    Recordings are read once, the first KEPT bytes of them: the dial goes over its rows again and again.

    Raises:
        KappaTuneError: a recording that can't be read.
    """
    predicted, read, kept, size = [], [], [], 0
    for row in rows:
        made = collator([row])
        predicted.append(int((made["labels"] != IGNORED).sum()))
        read.append(made["labels"].shape[1])
        size += sum(value.nbytes for value in made.values())
        if size <= KEPT:
            kept.append(made)
    padding = {"input_ids": collator.padding, "attention_mask": 0, "labels": IGNORED}

    def nats(places: Sequence[int]) -> Tensor:
        found = []
        each = (kept[place] if place < len(kept) else collator([rows[place]]) for place in places)
        for batch in _batches(each, batch_size, padding):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop("labels")
            found.append(summed_nats(model(**batch).logits, labels))
        return torch.cat(found)

    return Texts(nats, predicted, read)


def _batches(each: Iterable[dict[str, Tensor]], size: int, padding: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Batches of neighbours whose sounds have the same shape: how a processor pads others is its own affair."""

    def shapes(made: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name, value.shape[1:]) for name, value in made.items() if name not in padding]

    for _, alike in groupby(each, shapes):
        while part := list(islice(alike, size)):
            columns = {name: [made[name] for made in part] for name in part[0]}
            yield {
                name: pad_sequence([value[0] for value in values], batch_first=True, padding_value=padding[name])
                if name in padding
                else torch.cat(values)
                for name, values in columns.items()
            }
