"""Dequantize weights: bitsandbytes' 4 and 8 bits, and float8."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kappatune_plugin.distributed import shards
from kappatune_plugin.errors import KappaTuneError

# the names of bitsandbytes' parameter classes
FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"
# ending added to a float8 weight's name for the tensor of its scales: DeepSeek's, and that of others
SCALES = ("_scale_inv", "_scale")
# side of the blocks that share a scale, where the config doesn't say (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
FLOAT8_BLOCK = (128, 128)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantized_form(parameter: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """("nf4", "fp4", "int8" or a float8 dtype; the dequantized shape) of a quantized parameter; None if it isn't
    quantized, or in a form that is unknown here."""
    kind = type(parameter).__name__
    if kind == FOUR_BIT and parameter.quant_state is not None:
        return parameter.quant_state.quant_type, tuple(parameter.quant_state.shape)
    if kind == EIGHT_BIT and parameter.dtype == torch.int8:
        return "int8", tuple(parameter.shape)
    if parameter.dtype in FLOAT8 and parameter.ndim == 2:
        return str(parameter.dtype).removeprefix("torch."), tuple(parameter.shape)
    return None


def unusable_form(parameter: Tensor, quantized: bool) -> str | None:
    """How a parameter is stored, if it can't be ranked so; None if it can.

    Tensor classes of other libraries (torchao's, quanto's) say that they are bfloat16, and what is written into them is
    quantized anew.

    Args:
        quantized: whether the forms that `dequantized` knows can be ranked.
    """
    form, whole = quantized_form(parameter), shards.layout(parameter)
    if form is not None:
        return None if quantized else form[0]
    if is_traceable_wrapper_subclass(parameter) and not shards.is_partitioned(parameter):
        return type(parameter).__name__
    return None if whole.is_floating_point() and whole.element_size() > 1 else str(whole.dtype)


def is_scale(name: str) -> bool:
    """Whether a parameter's name is that of a float8 weight's scales."""
    return name.endswith(SCALES)


def dequantized(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of `module`, dequantized, in its original shape; `module` stays as it is.

    4 bits: by bitsandbytes, in the dtype from which it was quantized. int8: LLM.int8() (arXiv 2208.07339) scales rows:
    W = q * scale / 127, (out, in), in float32.

    Raises:
        KappaTuneError: a float8 weight without scales, or with scales that don't fit it.
    """
    parameter = module._parameters[name].detach()
    kind = type(module._parameters[name]).__name__
    if kind == FOUR_BIT:
        from bitsandbytes.functional import dequantize_4bit

        _unpack(module, module._parameters[name].quant_state)
        return dequantize_4bit(module._parameters[name].data, module._parameters[name].quant_state)
    if kind == EIGHT_BIT:
        from bitsandbytes.functional import int8_vectorwise_dequant

        # the layer takes the scales to itself when it runs
        scales = getattr(module._parameters[name], "SCB", None)
        return int8_vectorwise_dequant(parameter.data, module.state.SCB if scales is None else scales)
    found = [getattr(module, name + ending) for ending in SCALES if getattr(module, name + ending, None) is not None]
    if not found:
        expected = " or ".join(name + ending for ending in SCALES)
        raise KappaTuneError(
            f"{name} of a {type(module).__name__} is {parameter.dtype} without scales ({expected}), so it can't be "
            "dequantized. Scan the unquantized checkpoint, or name it with scan_from."
        )
    block = getattr(module, "block_size", None) or FLOAT8_BLOCK
    return dequantize_float8(parameter, found[0].detach(), block)


def dequantized_experts(packed: Tensor) -> Tensor:
    """Fused experts (experts, ., .) that bitsandbytes packed in 4 bits, dequantized."""
    shape = packed.quant_state.shape
    return _values(packed, 0, shape.numel()).view(shape)


def expert_block(packed: Tensor, index: tuple[int | slice, ...]) -> Tensor:
    """`dequantized_experts(packed)[index]`, of which only this expert is dequantized.

    Args:
        index: the expert, and a slice of each other axis.
    """
    shape = packed.quant_state.shape
    size = shape[1:].numel()
    return _values(packed, index[0] * size, (index[0] + 1) * size).view(shape[1:])[index[1:]]


def _values(packed: Tensor, start: int, stop: int) -> Tensor:
    """A range of the flattened values that bitsandbytes packed.

    As one row: where rows aren't whole blocks, bitsandbytes 0.50 reads the wrong scales on CPUs with AVX512.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state, size = packed.quant_state, packed.quant_state.blocksize
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    # a block that shares a scale may begin before the range and end behind it
    first, last = start // size, math.ceil(stop / size)
    low, high = first * size, min(last * size, 2 * packed.numel())
    shape = torch.Size([1, high - low])
    part = QuantState(scales[first:last].float(), shape, state.code, size, state.quant_type, state.dtype)
    values = dequantize_4bit(packed.data.view(-1, 1)[low // 2 : high // 2], part)
    return values.reshape(-1)[start - low : stop - low]


def _unpack(module: nn.Module, state: Any) -> None:
    """Undo bitsandbytes' packing of 4 bit weights for some CPUs; `state_dict` alone would lose the scales."""
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        module.state_dict()
        state.absmax, state.nested = scales, False


def keep_unpacked(model: nn.Module) -> None:
    """Let bitsandbytes run 4 bit weights as they are stored, on CPUs too.

    Its packed layout for evaluation on CPUs with AVX512 would stay when training begins, and gives no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            _unpack(module, module.weight.quant_state)


def dequantize_float8(weight: Tensor, scales: Tensor, block: Sequence[int] = FLOAT8_BLOCK) -> Tensor:
    """`weight`, (rows, columns) in float8, times its scales, in float32.

    Args:
        scales: one number, one a row, or one for each `block` of (rows, columns).

    Raises:
        KappaTuneError: scales of another shape.
    """
    scales = scales.float()
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    for axis, (size, side) in enumerate(zip(weight.shape, block, strict=True)):
        count = scales.shape[axis] if scales.ndim == 2 else 0
        if count == math.ceil(size / side):
            scales = scales.repeat_interleave(side, dim=axis).narrow(axis, 0, size)
        elif count not in (1, size):
            raise KappaTuneError(
                f"A float8 weight of shape {tuple(weight.shape)} has scales of shape {tuple(scales.shape)}: expected "
                f"one, one a row, or one for each block of {tuple(block)}."
            )
    return weight.float() * scales


class WholeLinear(nn.Linear):
    """A linear layer that replaces a quantized one. As there, the input may have another dtype than the weight."""

    def forward(self, values: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        bias = None if bias is None else bias.to(weight.dtype)
        return functional.linear(values.to(weight.dtype), weight, bias).to(values.dtype)


def make_whole(model: nn.Module, name: str) -> None:
    """Replace the quantized linear layer `name` by one that holds the dequantized weight, frozen.

    Raises:
        KappaTuneError: it isn't a linear layer of bitsandbytes.
    """
    old = model.get_submodule(name)
    if type(old._parameters.get("weight")).__name__ not in (FOUR_BIT, EIGHT_BIT) or not isinstance(old, nn.Linear):
        raise KappaTuneError(
            f"{name} is a quantized {type(old).__name__}: of quantized weights only those of bitsandbytes' linear "
            "layers (NF4, FP4, int8) can be trained. Exclude it, or load the model in bfloat16."
        )
    weight = dequantized(old, "weight")
    new = WholeLinear(old.in_features, old.out_features, bias=False, device="meta").train(old.training)
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    new.bias = old.bias
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)


def whole_model(model: nn.Module) -> nn.Module:
    """A transformers model that bitsandbytes quantized, dequantized; any other model as it is."""
    settings = quantization_of(model)
    if not settings or settings.get("quant_method") != "bitsandbytes":
        return model
    # transformers 5.16 takes a dtype given by its name, as in a config read from a file, for a device
    model.config.dtype = model.dtype
    model = model.dequantize()
    # up to 5.16 the conversions of the quantized weights stay, and can't be reversed when the model is saved
    model.__dict__.pop("_weight_conversions", None)
    return model


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization_config` of `model` as a dict, as in its config.json; None if it isn't quantized."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()
