"""Fused experts in 4 bits: transformers quantizes linear layers only, and the experts of a layer are one parameter.

bitsandbytes keeps such a parameter packed and dequantizes it when its module runs, by a parametrization of torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kappatune_plugin.distributed import shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.quantized import dequantized_experts, quantization_of
from kappatune_plugin.weights.units import holds_experts, packed_parameters

# key of a base's quantization, as adapters note it, under which that of its fused experts stands
EXPERTS = "experts"
OPT_OUT = "`quantize_experts: false` in the recipe's block kappatune leaves experts as they are"


@dataclass(frozen=True)
class QuantizedExperts:
    """What `quantize_experts` did.

    Attributes:
        parameters: how many fused parameters it quantized.
        before, after: the bytes that they took before, and take now.
        left: how many fused parameters it left as they are, since bitsandbytes has no 8-bit form for them.
    """

    parameters: int
    before: int
    after: int
    left: int = 0

    def __str__(self) -> str:
        if self.left:
            return f"{self.left} fused experts' parameters stay unquantized: bitsandbytes has 4 bits for them, not 8."
        sizes = f"{_short(self.before)} before, {_short(self.after)} now"
        return f"{self.parameters} fused experts' parameters are quantized to 4 bits: {sizes}."


def _short(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def quantize_experts(model: nn.Module, config: Any = None) -> QuantizedExperts:
    """Quantize the fused experts of `model` in place to 4 bits, before an adapter is attached.

    They are dequantized one parameter at a time, while their module runs. Those that are quantized already stay.

    Args:
        model: on the device where it is trained.
        config: transformers' BitsAndBytesConfig; default: the one that the model was loaded with. Of it count
            `load_in_4bit`, `bnb_4bit_quant_type` and `bnb_4bit_use_double_quant`.

    Raises:
        KappaTuneError: there is no such config, bitsandbytes is missing or can't quantize them here, or the model is
            divided over ranks.
    """
    settings = _settings(quantization_of(model) if config is None else config)
    fused = list(_fused(model))
    if not settings.get("load_in_4bit"):
        return QuantizedExperts(0, 0, 0, left=len(fused))
    if shards.shards_with_fsdp() or any(shards.is_partitioned(each) for each in model.parameters()):
        raise KappaTuneError(
            f"Experts in 4 bits can't be divided over ranks (ZeRO-3, FSDP2): use DDP or ZeRO-2; {OPT_OUT}."
        )
    before = after = 0
    for name, module, attribute in fused:
        before += getattr(module, attribute).nbytes
        packed = _quantize(name, module, attribute, settings)
        after += packed.nbytes + _state_bytes(packed.quant_state)
    return QuantizedExperts(len(fused), before, after)


def _settings(config: Any) -> Mapping[str, Any]:
    if config is None:
        raise KappaTuneError(
            "The model wasn't loaded with a quantization_config, so none is known for its experts. Give one: "
            "quantize_experts(model, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'))."
        )
    return config if isinstance(config, Mapping) else config.to_dict()


def _fused(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The name, owner and attribute of each parameter that holds a layer's experts, unquantized."""
    for owner, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            name = f"{owner}.{attribute}" if owner else attribute
            whole = shards.layout(parameter)
            if whole.ndim == 3 and not attribute.endswith("bias") and holds_experts(module, name):
                yield name, module, attribute


def _quantize(name: str, module: nn.Module, attribute: str, settings: Mapping[str, Any]) -> nn.Parameter:
    try:
        from bitsandbytes.nn import Params4bit
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise KappaTuneError(
            f"bitsandbytes can't quantize experts: {error}. Install a newer one (`pip install -U bitsandbytes`); "
            f"{OPT_OUT}."
        ) from error
    old = module._parameters[attribute]
    double, kind = settings.get("bnb_4bit_use_double_quant", False), settings.get("bnb_4bit_quant_type", "fp4")
    try:
        replace_parameter_4bit(module, attribute, compress_statistics=double, quant_type=kind)
    except (ValueError, RuntimeError) as error:
        # a dtype, or a device, that it has no kernel for
        raise KappaTuneError(
            f"bitsandbytes can't quantize the experts {name} ({old.dtype}, {tuple(old.shape)}, on {old.device}): "
            f"{error}. Load the model in bfloat16, float16 or float32; {OPT_OUT}."
        ) from error
    stored = module.parametrizations[attribute]
    # of the class of quantized linear layers, which moves its scales along and is counted as what it stands for
    stored.original = Params4bit(
        stored.original.data,
        quant_state=stored[0].quant_state,
        compress_statistics=double,
        quant_type=kind,
        bnb_quantized=True,
    )
    stored[0].forward = dequantized_experts
    if getattr(old, "_is_hf_initialized", False):
        stored.original._is_hf_initialized = True
    return stored.original


def _state_bytes(state: Any) -> int:
    """What the scales of a packed parameter take; a code of 16 values is the same for all."""
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


def experts_quantization(model: nn.Module) -> dict[str, Any] | None:
    """How the fused experts of `model` are quantized, in the words of BitsAndBytesConfig; None if they aren't."""
    for module in model.modules():
        for packed in packed_parameters(module).values():
            state = packed.quant_state
            return {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": state.quant_type,
                "bnb_4bit_use_double_quant": bool(state.nested),
            }
    return None


def dequantize_experts(model: nn.Module) -> None:
    """Let the experts of `model` be unquantized, with the values that their modules compute with now."""
    for module in list(model.modules()):
        make_dense(module)


def make_dense(module: nn.Module) -> None:
    """Replace the packed parameters of `module` by what it reads there, frozen."""
    values = {name: getattr(module, name).detach().clone() for name in packed_parameters(module)}
    if not values:
        return
    # torch's own removal takes the property from the class, which copies of this module have too
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, each in values.items():
        setattr(module, name, nn.Parameter(each, requires_grad=False))
