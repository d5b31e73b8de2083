"""Token ids and a model in, `Texts` out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.logits import logits_from, padded
from kappatune_plugin.forgetting.measures import blocks, completion_ids
from kappatune_plugin.interpolation.texts import Texts

# token ids, and the position of the first one whose prediction counts
Piece = tuple[list[int], int]


def texts(model: nn.Module, documents: Sequence[Sequence[Piece]], batch_size: int = 8) -> Texts:
    """The losses of `documents`, each in one piece or several, under `model` as it is when they are asked for."""

    def nats(rows: Sequence[int]) -> Tensor:
        pieces = [(place, piece) for place, row in enumerate(rows) for piece in documents[row]]
        # of like lengths together: padding is read too
        pieces.sort(key=lambda pair: len(pair[1][0]))
        found = torch.zeros(len(rows), device=model.device)
        for first in range(0, len(pieces), batch_size):
            places, batch = zip(*pieces[first : first + batch_size], strict=True)
            losses = _piece_nats(model, batch)
            found = found.index_add(0, torch.tensor(places, device=found.device), losses)
        return found

    predicted = [sum(len(ids) - start for ids, start in pieces) for pieces in documents]
    return Texts(nats, predicted, [sum(len(ids) for ids, _ in pieces) for pieces in documents])


def control_documents(tokenizer: Any, content: Sequence[str], max_length: int, truncate: bool) -> list[list[Piece]]:
    """Each text in pieces of at most `max_length` tokens (the first one only, with `truncate`); short texts are out."""
    documents = []
    for text in content:
        try:
            documents.append([(piece, 1) for piece in blocks(tokenizer, [text], max_length, truncate)])
        except KappaTuneError:
            # a text without two tokens in a row predicts nothing
            continue
    return documents


def row_documents(tokenizer: Any, pairs: Sequence[tuple[str, str]], end_token: bool = True) -> list[list[Piece]]:
    """(prompt, completion) as TRL trains on it: the completion counts, with the end token behind it.

    An empty prompt is a text of which every token but the first counts.
    """
    end = tokenizer.eos_token_id
    documents = []
    for prompt, completion in pairs:
        if prompt:
            before, after = completion_ids(tokenizer, prompt, completion)
            ids, first = before + after, len(before)
        else:
            ids, first = tokenizer(completion)["input_ids"], 1
        if end_token and end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        if len(ids) > first:
            documents.append([(ids, first)])
    return documents


def _piece_nats(model: nn.Module, batch: Sequence[Piece]) -> Tensor:
    """Summed nats of each piece's tokens that count, shape (pieces,)."""
    ids, mask = padded([piece for piece, _ in batch], model.device)
    labels = ids.masked_fill(~mask, IGNORED)
    for row, (_, start) in enumerate(batch):
        labels[row, :start] = IGNORED
    return labelled_nats(model, ids, mask, labels)


def labelled_nats(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row of token ids, summed over its labels but IGNORED ones, shape (rows,); some label counts."""
    # a label is predicted from the token before it
    first = int((labels[:, 1:] != IGNORED).any(0).nonzero()[0])
    return summed_nats(logits_from(model, ids, mask, first), labels[:, first:])


def summed_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row, summed over its labels that aren't IGNORED, shape (rows,), float32.

    Args:
        logits: shape (rows, tokens, vocabulary), each the prediction of the token after it.
        labels: token ids, shape (rows, tokens).
    """
    counts, labels = labels[:, 1:] != IGNORED, labels[:, 1:]
    # a prompt's logits are never copied, and cross_entropy takes several times as long on a CPU
    counted = logits[:, :-1][counts].float()
    losses = counted.logsumexp(-1) - counted.gather(-1, labels[counts][:, None]).squeeze(-1)
    return losses.new_zeros(len(labels)).index_add(0, counts.nonzero()[:, 0], losses)
