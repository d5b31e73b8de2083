"""Models as bitsandbytes quantizes them."""

import importlib.util

import pytest
import torch
from torch import nn

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed"
)


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head, as bitsandbytes and transformers do it."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        size = module.in_features, module.out_features
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, has_fp16_weights=False, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(*size, bias=False, quant_type=kind, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(module.weight.data, quant_type=kind, requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, new)
    return model.to("cpu")
