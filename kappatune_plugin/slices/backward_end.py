"""Where backward ends: at the earliest matrix that is trained, also under gradient checkpointing.

transformers and TRL have what embeddings put out require a gradient where checkpointing is on, since its re-entrant
kind needs it. Backward would then run all frozen layers below what is trained once more, and go through them, for a
gradient that nobody takes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kappatune_plugin.distributed import shards
from kappatune_plugin.weights.units import embedding_modules


def end_backward_early(model: nn.Module) -> list[RemovableHandle]:
    """Take those gradients from frozen embeddings, under non-reentrant checkpointing, until the handles are removed."""
    # evaluation doesn't pay for the walk
    if not torch.is_grad_enabled():
        return []
    modules = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
    functions = [getattr(each, "_gradient_checkpointing_func", None) for each in modules]
    reentrant = {getattr(each, "keywords", {}).get("use_reentrant") for each in functions if each is not None}
    if reentrant != {False}:
        return []
    found = [embedding_modules(each)[0] for each in model.modules() if isinstance(each, PreTrainedModel)]
    here = {each for each in found if each is not None and not any(map(shards.is_partitioned, each.parameters()))}
    # anew for each forward, so that it is the last of their hooks
    return [each.register_forward_hook(_without_gradient) for each in here]


def _without_gradient(module: nn.Module, args: Any, output: Any) -> None:
    """What an embedding puts out has a graph, and isn't a leaf, if the embedding is trained."""
    if isinstance(output, Tensor) and output.is_leaf:
        output.requires_grad_(False)
