"""A plain PyTorch loop that knows nothing of this package, and what a model says after it."""

import torch
from torch import Tensor, nn

from helpers.reference import random_batches
from kappatune_plugin import Selection, scan, select

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


def steps(model: nn.Module, batches: list[list[Tensor]], optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The losses of a step of AdamW for each list of micro-batches."""
    model.train()
    if optimizer is None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    losses = []
    for micro_batches in batches:
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def mixed_selection(model: nn.Module, order: str = "random", k: int = 7, **kwargs) -> Selection:
    return select(scan(model, progress=False, **kwargs), k=k, order=order, seed=3)


@torch.no_grad()
def logits(model: nn.Module, **batch: Tensor) -> Tensor:
    return model.eval()(**(batch or {"input_ids": TOKENS})).logits
