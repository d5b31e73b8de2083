"""Slow and obvious versions of what the package does fast."""

import torch
from torch import Tensor, nn

from kappatune_plugin.weights.units import WeightUnit, find_units, unit_block


def train_with_full_gradients(
    model: nn.Module,
    names: list[str],
    batches: list[list[Tensor]],
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    checkpointing: dict | None = None,
) -> list[float]:
    """Train `names` by AdamW on copies of their slices, from full gradients of the parameters that hold them.

    Args:
        batches: for each step the token ids (batch, length) of its accumulated micro batches.

    Returns:
        The loss of each micro batch; `model` holds the result.
    """
    units = {unit.name: unit for unit in find_units(model)}
    model.requires_grad_(False).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    copies: list[tuple[WeightUnit, nn.Parameter]] = []
    for name in names:
        parameter = model.get_parameter(units[name].parameter).requires_grad_(True)
        copies.append((units[name], nn.Parameter(unit_block(parameter.detach(), units[name]).float().clone())))
    optimizer = torch.optim.AdamW([copy for _, copy in copies], lr=lr, weight_decay=weight_decay)
    losses = []
    for micro_batches in batches:
        for tokens in micro_batches:
            loss = model(input_ids=tokens, labels=tokens).loss / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        for unit, copy in copies:
            grad = model.get_parameter(unit.parameter).grad
            # a separate expert that saw no token has none
            copy.grad = None if grad is None else unit_block(grad, unit).float().clone()
        optimizer.step()
        with torch.no_grad():
            for unit, copy in copies:
                unit_block(model.get_parameter(unit.parameter), unit).copy_(copy)
        model.zero_grad()
    return losses


def random_batches(steps: int, accumulation: int = 1, vocab_size: int = 64, length: int = 12) -> list[list[Tensor]]:
    """Token ids (2, length), the same at each call."""
    generator = torch.Generator().manual_seed(123)
    return [
        [torch.randint(3, vocab_size, (2, length), generator=generator) for _ in range(accumulation)]
        for _ in range(steps)
    ]
