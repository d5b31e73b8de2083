"""The weight matrices of a model.

A unit is one 2-D weight matrix, which the paper calls a weight tensor: a whole parameter, or one expert's projection
inside a fused expert parameter.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from kappatune_plugin.distributed import shards
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.checkpoint_names import CheckpointNames
from kappatune_plugin.weights.quantized import is_scale, quantized_form, unusable_form

FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj")}
# around the attribute's name, where torch keeps a parameter that is computed when it is read
PACKED = ("parametrizations.", ".original")
# children that the tuner adds to the modules it trains
OWN = "kappatuned_"
# what PEFT's wrappers train whole or by rows, and where they hold the module that they wrap
BESIDE = {"modules_to_save", "trainable_tokens_delta"}
WRAPPED = re.compile(r"\.(original_module|token_adapter\.base_layer)\.")
TASK_HEADS = ("score", "classifier", "qa_outputs")
HEAD_NAMES = ("lm_head", "embed_out", *TASK_HEADS)
ROUTER_NAMES = ("gate", "router")
# classes whose weights are no matrices, or never trained: transformers freezes sinusoids, and PEFT all of a model
NO_UNITS = re.compile("Norm|Sinusoidal")
# names of modules that see or hear, where no config says which one is the language model
TOWER_NAMES = re.compile("(^|[._])(vision|visual|audio|image|img|speech|video)([._]|$)")


@dataclass(frozen=True)
class WeightUnit:
    """One 2-D weight matrix of a model.

    Attributes:
        name: its name in the checkpoint, however the model in memory holds it.
        shape: (rows, columns) as stored; convolutions count as (d_out, everything else).
        parameter: name of the parameter that holds it, as in `model.named_parameters()`.
        index: `parameter[index]` is this unit; empty for a whole parameter.
        groups: the groups "embedding", "head", "router", "tower", "stack" that it belongs to.
        out_axis: the output axis of `parameter[index]` (1 for transposed convolutions only).
    """

    name: str
    shape: tuple[int, int]
    parameter: str
    index: tuple[int | slice, ...] = ()
    groups: frozenset[str] = field(default_factory=frozenset)
    out_axis: int = 0


def find_units(model: nn.Module, quantized: bool = False) -> list[WeightUnit]:
    """Every 2-D weight matrix of `model`, in the model's order; tied weights once, under their first name.

    Never units: vectors (a 1 x n matrix too), norms, biases, and weights that are computed: from others by torch's
    parametrizations, or once from a formula (tables of sinusoidal positions).

    Args:
        quantized: also return quantized weights that `quantized.dequantized` knows, with their dequantized shape.

    Raises:
        KappaTuneError: a weight is quantized in another form, or at all without `quantized`.
    """
    names = CheckpointNames(model)
    inputs, outputs = embedding_modules(model)
    in_tower = _towers(model, inputs)
    units: dict[int, list[WeightUnit]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, ParametrizationList) or NO_UNITS.search(type(module).__name__):
            continue
        if f".{OWN}" in f".{module_name}" or BESIDE & set(module_name.split(".")):
            continue
        packed = packed_parameters(module)
        for short_name, parameter in [*module.named_parameters(recurse=False), *packed.items()]:
            whole = shards.layout(parameter)
            form = quantized_form(parameter)
            if form is not None and quantized:
                whole = torch.empty(form[1], device="meta")
            elif quantized and is_scale(short_name):
                continue
            if whole.ndim < 2 or short_name.endswith("bias"):
                continue
            full_name = f"{module_name}.{short_name}" if module_name else short_name
            stored = unusable_form(parameter, quantized)
            if stored is not None:
                raise KappaTuneError(
                    f"{full_name} is stored as {stored}: load the model in bfloat16, float16 or float32. Of quantized "
                    "weights those of bitsandbytes (NF4, FP4, int8) can be ranked and trained, float8 ones ranked; "
                    "gain_over_forgetting takes none."
                )
            groups = _groups(model, module_name, module, inputs, outputs)
            if "head" not in groups and in_tower(f"{module_name}."):
                groups |= {"tower"}
            if id(parameter) in units:
                units[id(parameter)] = [replace(unit, groups=unit.groups | groups) for unit in units[id(parameter)]]
            else:
                place = full_name if short_name not in packed else packed_name(module_name, short_name)
                units[id(parameter)] = [
                    replace(unit, name=WRAPPED.sub(".", unit.name), parameter=place, groups=unit.groups | groups)
                    for unit in _units_of(module, full_name, whole, names)
                ]
    return [unit for found in units.values() for unit in found if min(unit.shape) > 1]


def packed_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` that bitsandbytes packed by a parametrization, under the names it reads them by."""
    lists = module._modules.get("parametrizations", {})
    found = {name: getattr(each, "original", None) for name, each in lists.items()}
    return {name: each for name, each in found.items() if each is not None and quantized_form(each) is not None}


def packed_name(module: str, attribute: str) -> str:
    """The name in `model.named_parameters()` of what `packed_parameters` gives for `attribute`."""
    return f"{module}.{PACKED[0]}{attribute}{PACKED[1]}".lstrip(".")


def place_of(parameter: str) -> tuple[str, str]:
    """The name of the module that reads a parameter, and the attribute under which it does.

    Args:
        parameter: its name in `model.named_parameters()`.
    """
    owner, packed, attribute = parameter.removesuffix(PACKED[1]).rpartition(PACKED[0])
    if packed:
        return owner.removesuffix("."), attribute
    owner, _, attribute = parameter.rpartition(".")
    return owner, attribute


def is_linear(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter is the weight of a whole linear layer, which PEFT's LoRA can adapt."""
    owner, attribute = place_of(parameter)
    return attribute == "weight" and isinstance(model.get_submodule(owner), nn.Linear | Conv1D)


def unit_block(parameter: Tensor, unit: WeightUnit) -> Tensor:
    """The unit's part of its parameter: a view, in the shape in which the parameter stores it."""
    return parameter[unit.index] if unit.index else parameter


def unit_matrix(model: nn.Module, unit: WeightUnit) -> Tensor:
    """The unit's weight as a matrix of `unit.shape`, in the parameter's dtype: a view where the layout allows."""
    return as_matrix(unit_block(model.get_parameter(unit.parameter).detach(), unit), unit)


def as_matrix(block: Tensor, unit: WeightUnit) -> Tensor:
    """`block`, the unit's part of its parameter as stored there, as a matrix of `unit.shape`."""
    return block.movedim(unit.out_axis, 0).reshape(unit.shape)


def _units_of(module: nn.Module, name: str, parameter: Tensor, names: CheckpointNames) -> Iterator[WeightUnit]:
    """The units inside one parameter of at least two dimensions."""
    if isinstance(module, _ConvNd):
        out_axis = 1 if isinstance(module, _ConvTransposeNd) else 0
        shape = (parameter.shape[out_axis], parameter.numel() // parameter.shape[out_axis])
        yield WeightUnit(names.whole(name), shape, name, out_axis=out_axis)
    elif parameter.ndim == 2:
        yield WeightUnit(names.whole(name), tuple(parameter.shape), name)
    elif parameter.ndim == 3 and holds_experts(module, name):
        yield from _expert_units(module, name, parameter, names)
    elif parameter.ndim == 3 and parameter.shape[0] > 1:
        for position in range(parameter.shape[0]):
            index = (position, slice(None), slice(None))
            yield WeightUnit(f"{name}.{position}", tuple(parameter.shape[1:]), name, index, frozenset({"stack"}))
    else:
        # a table with leading axes of size 1: learned positions or tokens of vision and speech encoders
        shape = (parameter.numel() // parameter.shape[-1], parameter.shape[-1])
        yield WeightUnit(names.whole(name), shape, name, groups=frozenset({"embedding"}))


def holds_experts(module: nn.Module, name: str) -> bool:
    """Whether the 3-D parameter `name`, of `module`, holds one matrix an expert."""
    return hasattr(module, "num_experts") or "expert" in f"{type(module).__name__}.{name}".lower()


def _expert_units(module: nn.Module, name: str, parameter: Tensor, names: CheckpointNames) -> Iterator[WeightUnit]:
    """One unit for each expert and projection of a fused parameter (experts, ., .)."""
    short_name = name.rpartition(".")[2]
    projections, parts = (short_name,), [(slice(None), slice(None))]
    if short_name in FUSED_PROJECTIONS and (axis := _output_axis(module, parameter)) is not None:
        projections = FUSED_PROJECTIONS[short_name]
        half = parameter.shape[axis] // 2
        halves = [slice(0, half), slice(half, 2 * half)]
        # GPT-OSS interleaves gate (even outputs) and up; transformers 4 has no attribute that says so
        if not getattr(module, "is_concatenated", "GptOss" not in type(module).__name__):
            halves = [slice(0, None, 2), slice(1, None, 2)]
        parts = [(part, slice(None)) if axis == 1 else (slice(None), part) for part in halves]
    for expert in range(parameter.shape[0]):
        for unit_name, part in zip(names.expert(name, expert, projections), parts, strict=True):
            index = (expert, *part)
            yield WeightUnit(unit_name, tuple(parameter[index].shape), name, index)


def _output_axis(module: nn.Module, gate_up: Tensor) -> int | None:
    """The axis of gate_up_proj along which gate's outputs and up's lie; None if its shape isn't that of a pair."""
    if hasattr(module, "is_transposed"):
        return 2 if module.is_transposed else 1
    down = getattr(module, "down_proj", None)
    down = shards.layout(down) if isinstance(down, Tensor) else None
    if down is None or down.ndim != 3:
        return None
    if gate_up.shape[1:] == (2 * down.shape[2], down.shape[1]):
        return 1
    return 2 if gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1]) else None


def embedding_modules(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and output embeddings of `model` as it names them itself; None where it has none."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)() if hasattr(model, getter) else None)
        except NotImplementedError:
            # transformers raises it for architectures that have none
            found.append(None)
    return found[0], found[1]


def _towers(model: nn.Module, inputs: nn.Module | None) -> Callable[[str], bool]:
    """Tells of a module's name, with a final dot, whether it lies beside the language model, as encoders of images do.

    A model whose config has a `text_config` holds the language model in modules of that config.
    """
    beside: list[tuple[str, tuple[str, ...]]] = []
    for root, module in model.named_modules():
        text = getattr(getattr(module, "config", None), "text_config", None)
        prefix = f"{root}." if root else ""
        languages = [name for name, each in module.named_modules() if type(getattr(each, "config", None)) is type(text)]
        if text is not None and languages and "" not in languages:
            beside.append((prefix, tuple(f"{prefix}{name}." for name in languages)))
    by_name = isinstance(inputs, nn.Embedding) and not beside
    return lambda name: (
        any(name.startswith(root) and not name.startswith(languages) for root, languages in beside)
        or (by_name and TOWER_NAMES.search(name) is not None)
    )


def _groups(
    model: nn.Module, name: str, module: nn.Module, inputs: nn.Module | None, outputs: nn.Module | None
) -> frozenset[str]:
    groups = set()
    if isinstance(module, nn.Embedding) or (module is inputs and inputs is not None):
        groups.add("embedding")
    if (module is outputs and outputs is not None) or name.partition(".")[0] in HEAD_NAMES:
        groups.add("head")
    if _is_router(model, name, module):
        groups.add("router")
    return frozenset(groups)


def _is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether `module` scores experts: by its class, by its name, or by a gate's name beside experts."""
    parent, _, last = name.rpartition(".")
    if "Router" in type(module).__name__ or last == "router":
        return True
    grandparent, _, parent_last = parent.rpartition(".")
    if parent_last == "router":
        return True
    return last in ROUTER_NAMES and "experts" in model.get_submodule(parent)._modules
