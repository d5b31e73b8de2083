"""Fused experts in 4 bits: found, ranked, trained, saved and merged as what they stand for."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from helpers.quantize import needs_bitsandbytes
from helpers.tiny import tiny_model
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.weights.fused_experts import dequantize_experts, experts_quantization, quantize_experts
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.quantized import expert_block
from kappatune_plugin.weights.units import find_units, packed_parameters, unit_matrix

KINDS = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def coarse(kind: str, dtype: torch.dtype = torch.float32, config: BitsAndBytesConfig = NF4) -> nn.Module:
    model = tiny_model(kind, dtype)
    quantize_experts(model, config)
    return model.requires_grad_(False)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_units_under_the_names_they_have_unquantized(kind):
    original, packed = tiny_model(kind), coarse(kind)
    units = find_units(packed, quantized=True)
    expected = [(unit.name, unit.shape, unit.index, unit.groups) for unit in find_units(original)]
    assert [(unit.name, unit.shape, unit.index, unit.groups) for unit in units] == expected
    # what a module reads, and multiplies with, is what is ranked
    dense = coarse(kind)
    dequantize_experts(dense)
    source = ModelSource(packed)
    for unit, whole in zip(units, find_units(dense), strict=True):
        assert torch.equal(source.load(unit), unit_matrix(dense, whole)) and whole.name == unit.name
    assert source.base_hashes() == ModelSource(dense).base_hashes() != ModelSource(original).base_hashes()
    with pytest.raises(KappaTuneError, match="is stored as nf4"):
        find_units(packed)


@needs_bitsandbytes
def test_scans_rank_them_dequantized_or_by_the_unquantized_weights(tmp_path):
    original, packed = tiny_model("olmoe"), coarse("olmoe")
    dense = coarse("olmoe")
    dequantize_experts(dense)
    report, expected = scan(packed, progress=False, cache=False), scan(dense, progress=False, cache=False)
    assert report.units == expected.units and "nf4, dequantized" in report.dtype
    original.save_pretrained(tmp_path)
    by_original = scan(packed, progress=False, scan_from=tmp_path, cache=False)
    assert by_original.units == scan(original, progress=False, cache=False).units != report.units


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 48, 96), (2, 1, 3)])
def test_one_expert_is_dequantized_without_the_others(shape, double):
    """Blocks of 64 values that share a scale may reach over two experts, and the last one ends early."""
    from bitsandbytes.functional import dequantize_blockwise

    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    assert quantize_experts(module, config).parameters == 1 and experts_quantization(module) == config
    packed, whole = packed_parameters(module)["experts"], module.experts
    assert whole.dtype == torch.bfloat16 and whole.shape == shape
    for expert in range(shape[0]):
        for rows in (slice(None), slice(0, None, 2)):
            index = (expert, rows, slice(None))
            assert torch.equal(expert_block(packed, index), whole[index])
    codes = torch.stack([packed.data >> 4, packed.data & 15], -1).flatten().long()
    state = packed.quant_state
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    values = state.code[codes] * scales.float().repeat_interleave(64)[: len(codes)]
    assert torch.equal(values[: whole.numel()].view(shape).bfloat16(), whole)


@needs_bitsandbytes
def test_what_is_quantized_and_what_it_takes():
    model = tiny_model("olmoe", torch.bfloat16)
    outside = {name: value.clone() for name, value in model.named_parameters() if ".experts." not in name}
    found = quantize_experts(model, NF4)
    values = sum(
        each.quant_state.shape.numel() for module in model.modules() for each in packed_parameters(module).values()
    )
    # half a byte a value, and a byte for the scale of each 64 of them
    assert (found.parameters, found.before) == (4, 2 * values)
    assert values / 2 + values / 64 <= found.after < values / 2 + values / 64 + 1000
    assert "4 fused experts' parameters are quantized to 4 bits" in str(found)
    kept = {name: value for name, value in model.named_parameters() if ".experts." not in name}
    assert kept.keys() == outside.keys() and all(torch.equal(value, outside[name]) for name, value in kept.items())
    assert quantize_experts(model, NF4).parameters == 0


@needs_bitsandbytes
def test_what_is_not_quantized_is_said():
    model = tiny_model("olmoe")
    found = quantize_experts(model, BitsAndBytesConfig(load_in_8bit=True))
    assert found.left == 4 and "stay unquantized" in str(found) and experts_quantization(model) is None
    with pytest.raises(KappaTuneError, match="wasn't loaded with a quantization_config"):
        quantize_experts(model)
    with pytest.raises(
        KappaTuneError, match="can't quantize the experts model.layers.0.*torch.float64.*quantize_experts"
    ):
        quantize_experts(tiny_model("olmoe", torch.float64), NF4)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.nn", None)
    with pytest.raises(KappaTuneError, match="bitsandbytes can't quantize experts: .*pip install -U bitsandbytes"):
        quantize_experts(tiny_model("olmoe"), {"load_in_4bit": True})


def test_experts_divided_over_ranks_are_refused(monkeypatch):
    model = tiny_model("olmoe")
    monkeypatch.setattr("kappatune_plugin.distributed.shards.shards_with_fsdp", lambda: True)
    with pytest.raises(KappaTuneError, match="can't be divided over ranks .ZeRO-3, FSDP2.: use DDP or ZeRO-2"):
        quantize_experts(model, NF4)
    assert experts_quantization(model) is None
