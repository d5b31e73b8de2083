"""A plain PyTorch loop that knows nothing of this package, and what a model says after it."""

import torch
from torch import Tensor, nn

from helpers.reference import random_batches

TOKENS = random_batches(1)[0][0]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, count: int = 3, optimizer: torch.optim.Optimizer | None = None, **batch: Tensor) -> list:
    """The losses of `count` steps on one batch, by default of a causal language model."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(**(batch or {"input_ids": TOKENS, "labels": TOKENS})).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module, **batch: Tensor) -> Tensor:
    return model.eval()(**(batch or {"input_ids": TOKENS})).logits
