"""What a model says of texts of different lengths: padded token ids in, logits of the positions that count out."""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def logits_from(model: nn.Module, ids: Tensor, mask: Tensor, first: int) -> Tensor:
    """Logits of the token after each from position `first` on, shape (rows, longest - first, vocabulary).

    Where the model can, it computes no others: with a large vocabulary they are most of the work.
    """
    kept = ids.shape[1] - first
    asked = model.get_base_model() if hasattr(model, "get_base_model") else model
    # positions, not their number: a slice isn't contiguous, and torch copies a frozen head once for each of its rows
    few = {"logits_to_keep": torch.arange(-kept, 0)} if "logits_to_keep" in signature(asked.forward).parameters else {}
    # PEFT's prompt methods put virtual tokens before the text and return their logits too
    return model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **few).logits[:, -kept:]


def padded(batch: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (batch, length) padded on the right by 0, and the mask of the real ones."""
    ids = pad_sequence([torch.tensor(piece) for piece in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(piece) for piece in batch], device=device)
    return ids, torch.arange(ids.shape[1], device=device) < lengths[:, None]
