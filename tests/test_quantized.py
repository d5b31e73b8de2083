"""Quantized weights are ranked as what they stand for, or by the weights they were made of."""

import importlib.util

import pytest
import torch
from torch import nn

from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.condition import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.quantized import dequantized
from kappatune_plugin.scan import scan
from kappatune_plugin.selection import select
from kappatune_plugin.units import find_units
from tiny import tiny_model

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


def model() -> nn.Module:
    return tiny_model("llama", hidden_size=64, intermediate_size=96)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_weights_are_ranked_as_what_they_stand_for(kind):
    original, coarse = model(), quantize(model(), kind)
    report, expected = scan(coarse, progress=False), scan(original, progress=False)
    assert [(row.name, row.shape) for row in report.units] == [(row.name, row.shape) for row in expected.units]
    assert report.dtype == f"{kind}, dequantized"
    layer = coarse.model.layers[0].mlp.up_proj
    # what the layer multiplies with: the identity in, the weight out
    with torch.no_grad():
        weight = layer(torch.eye(64)).mT
    row = next(row for row in report.units if row.name == "model.layers.0.mlp.up_proj.weight")
    tolerance = 0.02 if kind == "int8" else 1e-3
    assert row.kappa == pytest.approx(condition_number(weight.float()).value, rel=tolerance)
    for one, other in zip(report.units, expected.units, strict=True):
        # the smallest singular value of a square matrix is at the mercy of the rounding
        assert one.kappa != other.kappa and (one.kappa == pytest.approx(other.kappa, rel=0.3) or len({*one.shape}) == 1)
    assert report.base["hash"] != expected.base["hash"]


@needs_bitsandbytes
def test_int8_is_row_scaled_and_the_same_before_and_after_it_ran():
    coarse = quantize(model(), "int8")
    layer, weight = coarse.model.layers[1].mlp.down_proj, model().model.layers[1].mlp.down_proj.weight
    before = dequantized(layer, "weight")
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    assert before.shape == (64, 96) and (before - weight).abs().max() <= 0.51 * scale.max()
    assert torch.allclose(before, (weight / scale).round() * scale, atol=scale.max().item() * 1.01)
    first = scan(coarse, progress=False)
    coarse(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(dequantized(layer, "weight"), before) and scan(coarse, progress=False, cache=False) == first


@needs_bitsandbytes
def test_scan_from_ranks_by_the_unquantized_weights(tmp_path):
    original, coarse = model(), quantize(model(), "nf4")
    original.save_pretrained(tmp_path / "whole")
    report = scan(coarse, progress=False, scan_from=tmp_path / "whole")
    assert report.units == scan(original, progress=False).units and report.dtype == "float32 of whole"
    assert report.base == scan(coarse, progress=False).base
    partial = scan(coarse, progress=False, scan_from=tmp_path / "whole", k=3)
    assert select(partial, k=3).units == select(report, k=3).units
    other = tiny_model("llama", hidden_size=64, intermediate_size=80)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(KappaTuneError, match="'other' lacks 6 of the 16 .* such as model.layers.0.mlp.gate_proj"):
        scan(coarse, progress=False, scan_from=tmp_path / "other")


@needs_bitsandbytes
def test_training_on_a_quantized_base_is_refused():
    from peft import get_peft_model

    with pytest.raises(KappaTuneError, match="can't be trained in place"):
        get_peft_model(quantize(model(), "nf4"), KappaTuneConfig(k=2))


def test_float8_layers_in_memory():
    plain = nn.ModuleList([nn.Linear(40, 24, bias=False)])
    scales = torch.rand(2, 3) + 0.5
    coarse = nn.ModuleList([nn.Linear(40, 24, bias=False)])
    layer = coarse[0]
    layer.weight = nn.Parameter((8 * plain[0].weight.data).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    layer.block_size = (16, 16)
    plain[0].weight.data = layer.weight.float() * scales.repeat_interleave(16, 0)[:24].repeat_interleave(16, 1)[:, :40]
    report = scan(coarse, progress=False)
    assert report.units == scan(plain, progress=False).units and report.dtype == "float8_e4m3fn, dequantized"
    with pytest.raises(KappaTuneError, match="float8_e4m3fn"):
        find_units(coarse)
    layer.weight_scale_inv = None
    with pytest.raises(KappaTuneError, match="without scales.*weight_scale_inv or weight_scale.*scan_from"):
        scan(coarse, progress=False)


def test_config_takes_scan_from(saved_olmoe):
    from peft import get_peft_model

    base = tiny_model("olmoe", vocab_size=300)
    tuned = get_peft_model(base, KappaTuneConfig(k=3, scan_from=str(saved_olmoe)))
    report = tuned.base_model.reports["default"]
    assert report.dtype.startswith("float32 of ") and len(tuned.base_model.selections["default"].units) == 3
    assert tuned.peft_config["default"].to_dict()["scan_from"] is None
    with pytest.raises(KappaTuneError, match="report and scan_from are both given"):
        KappaTuneConfig(report="a.json", scan_from="b")
    with pytest.raises(KappaTuneError, match="scan_from: 3"):
        KappaTuneConfig(scan_from=3)
