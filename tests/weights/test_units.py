"""Units: names and values against what `save_pretrained` writes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.tiny import CONFIGS, MOE_KINDS, tiny_model
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.fingerprint import base_hash, is_in_layers
from kappatune_plugin.weights.patterns import DEFAULT_EXCLUDE, filter_units
from kappatune_plugin.weights.units import find_units, unit_matrix

# what each architecture's config above has: attention, dense MLP, experts, routers, embeddings and head
EXPECTED_COUNTS = {
    "llama": 2 * 7 + 2,
    "gemma3": 2 * 7 + 1,
    "gpt2": 2 * 4 + 2,
    "bert": 2 * 6 + 3 + 1,
    "olmoe": 2 * (4 + 8 * 3 + 1) + 2,
    "mixtral": 2 * (4 + 8 * 3 + 1) + 2,
    "qwen3_moe": 2 * (4 + 8 * 3 + 1) + 2,
    "deepseek_v2": 2 * 4 + 3 + (8 * 3 + 1 + 3) + 2,
    "deepseek_v3": 2 * 5 + 3 + (8 * 3 + 1 + 3) + 2,
    "gpt_oss": 2 * (4 + 8 * 3 + 1) + 2,
}


def saved_tensors(model: nn.Module, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_matrix_once(kind):
    units = find_units(tiny_model(kind))
    assert len(units) == len({unit.name for unit in units}) == EXPECTED_COUNTS[kind]


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gpt_oss"])
def test_names_shapes_and_values_are_the_checkpoints(kind, tmp_path):
    model = tiny_model(kind)
    saved = saved_tensors(model, tmp_path)
    units = find_units(model)
    assert {unit.name for unit in units} == {name for name, tensor in saved.items() if tensor.ndim == 2}
    for unit in units:
        assert unit.shape == saved[unit.name].shape
        assert torch.equal(unit_matrix(model, unit), saved[unit.name])


def test_gpt_oss_is_transposed_and_interleaved(tmp_path):
    model = tiny_model("gpt_oss")
    saved = saved_tensors(model, tmp_path)
    units = {unit.name: unit for unit in find_units(model)}
    fused = saved["model.layers.1.mlp.experts.gate_up_proj"]
    prefix = "model.layers.1.mlp.experts.5"
    assert torch.equal(unit_matrix(model, units[f"{prefix}.gate_proj.weight"]), fused[5, :, 0::2])
    assert torch.equal(unit_matrix(model, units[f"{prefix}.up_proj.weight"]), fused[5, :, 1::2])
    down = saved["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(unit_matrix(model, units[f"{prefix}.down_proj.weight"]), down[5])
    assert not [name for name in units if "bias" in name]


class SeparateExperts(nn.Module):
    """A layer of experts as transformers 4 holds them, under its names."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            expert = nn.Module()
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.detach().clone())
                expert.add_module(name, linear)
            self.experts.append(expert)


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_fused_and_separate_experts_are_the_same_units(kind):
    model = tiny_model(kind)
    layer = model.model.layers[1]
    if isinstance(layer.mlp.experts, nn.ModuleList):
        pytest.skip("transformers 4 has no fused ones of this architecture")
    fused = {unit.name: unit_matrix(model, unit) for unit in find_units(model) if ".experts." in unit.name}
    fused = {name.removeprefix("model.layers.1.mlp."): value for name, value in fused.items() if ".layers.1." in name}
    separate_model = SeparateExperts(layer.mlp.experts)
    separate = {unit.name: unit_matrix(separate_model, unit) for unit in find_units(separate_model)}
    assert set(separate) == set(fused)
    assert all(torch.equal(separate[name], fused[name]) for name in fused)


def test_transposed_experts_without_transformers_marks():
    """Both storage orders are told from the shapes where the module says nothing."""

    class Experts(nn.Module):
        def __init__(self, gate_up: tuple, down: tuple) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(gate_up))
            self.down_proj = nn.Parameter(torch.randn(down))

    straight, transposed = Experts((4, 12, 8), (4, 8, 6)), Experts((4, 8, 12), (4, 6, 8))
    shapes = [{unit.name: unit.shape for unit in find_units(module)} for module in (straight, transposed)]
    assert shapes[0]["3.up_proj.weight"] == (6, 8) and shapes[1]["3.up_proj.weight"] == (8, 6)
    up = next(unit for unit in find_units(transposed) if unit.name == "3.up_proj.weight")
    assert torch.equal(unit_matrix(transposed, up), transposed.gate_up_proj[3, :, 6:])


def test_convolutions_are_flattened_and_vectors_are_not_units():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 5, 4),
            "transposed": nn.ConvTranspose1d(3, 5, 4),
            "score": nn.Linear(7, 1),
            "norm": nn.LayerNorm(4),
        }
    )
    units = {unit.name: unit for unit in find_units(model)}
    assert {name: unit.shape for name, unit in units.items()} == {"conv.weight": (5, 48), "transposed.weight": (5, 12)}
    assert torch.equal(unit_matrix(model, units["conv.weight"]), model["conv"].weight.flatten(1))
    expected = model["transposed"].weight.transpose(0, 1).flatten(1)
    assert torch.equal(unit_matrix(model, units["transposed.weight"]), expected)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_tied_weights_are_one_unit_of_both_groups(kind):
    tied = [unit for unit in find_units(tiny_model(kind)) if {"embedding", "head"} <= unit.groups]
    assert len(tied) == 1


@pytest.mark.parametrize("kind", MOE_KINDS)
def test_groups(kind):
    units = find_units(tiny_model(kind))
    routers = [unit.name for unit in units if "router" in unit.groups]
    layers = 1 if kind.startswith("deepseek") else 2
    assert len(routers) == layers and all(name.endswith(("gate.weight", "router.weight")) for name in routers)
    assert [unit.name for unit in units if "embedding" in unit.groups] == ["model.embed_tokens.weight"]
    assert [unit.name for unit in units if "head" in unit.groups] == ["lm_head.weight"]


def test_dense_models_have_no_routers():
    assert not [
        unit for kind in ("llama", "gpt2", "bert") for unit in find_units(tiny_model(kind)) if "router" in unit.groups
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_base_hash_is_of_the_weights_not_of_their_dtype(kind):
    model = tiny_model(kind)
    assert base_hash(model) == base_hash(tiny_model(kind, dtype=torch.bfloat16))
    unit = [unit for unit in find_units(model) if is_in_layers(unit)][-1]
    with torch.no_grad():
        unit_matrix(model, unit)[0, 0] += 1.0
    assert base_hash(model) != base_hash(tiny_model(kind))


def test_filter_keeps_and_gives_reasons():
    units = find_units(tiny_model("olmoe"))
    kept, left_out = filter_units(units, exclude=(*DEFAULT_EXCLUDE, "router", "*.self_attn.*"))
    assert {unit.name.split(".")[3] for unit in kept} == {"mlp"} and len(kept) == 48
    assert left_out["lm_head.weight"] == "excluded by 'head'"
    assert left_out["model.layers.0.mlp.gate.weight"] == "excluded by 'router'"
    assert left_out["model.layers.1.self_attn.q_proj.weight"] == "excluded by '*.self_attn.*'"
    assert len(kept) + len(left_out) == len(units)
    kept, left_out = filter_units(units, include=["*.experts.3.*"])
    assert {unit.name.split(".")[5] for unit in kept} == {"3"} and set(left_out.values()) == {"not in include"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("nrom", "Did you mean 'norm'?"),
        ("q_proj", "write '*q_proj*'"),
        ("*qproj*", "*q_proj*"),
        ("model.layers.7.*", "Near names"),
    ],
)
def test_patterns_that_match_nothing_are_errors(pattern, expected):
    units = find_units(tiny_model("olmoe"))
    for key in ("include", "exclude"):
        with pytest.raises(KappaTuneError, match="matches none of the 60 weights") as error:
            filter_units(units, **{key: [pattern]})
        assert expected in str(error.value) and str(error.value).startswith(key)


def test_all_wrong_patterns_are_named_at_once():
    with pytest.raises(KappaTuneError) as error:
        filter_units(find_units(tiny_model("llama")), include=["*qproj*"], exclude=["nrom", "norm"])
    assert "*qproj*" in str(error.value) and "nrom" in str(error.value)


def test_patterns_of_weights_that_are_never_units_may_be_excluded():
    model = tiny_model("llama")
    names = [name for name, _ in model.named_parameters()]
    kept, _ = filter_units(find_units(model), exclude=["*layernorm*", "head", "embedding"], parameters=names)
    assert len(kept) == 14


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_an_error(dtype):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(KappaTuneError, match=r"stored as (torch\.uint8|float8_e4m3fn): load the model in bfloat16"):
        find_units(model)
