"""Checkpoints that hold all experts of a layer in one tensor themselves: where the docs say that a unit is, it is."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.loops import TOKENS, train
from helpers.tiny import tiny_tokenizer
from helpers.tiny_configs import tiny_config
from kappatune_plugin import KappaTuneConfig, scan
from kappatune_plugin.export.merge import merge_adapter
from kappatune_plugin.weights.fingerprint import base_hash
from kappatune_plugin.weights.units import find_units, unit_matrix

ALL, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)


def _places(experts: str, gate_up: str, down: str, gate: tuple, up: tuple) -> dict[str, tuple[str, tuple]]:
    return {
        f"{experts}.3.gate_proj.weight": (gate_up, (3, *gate)),
        f"{experts}.3.up_proj.weight": (gate_up, (3, *up)),
        f"{experts}.3.down_proj.weight": (down, (3,)),
    }


def _of_transformers(experts: str, gate: tuple, up: tuple) -> dict[str, tuple[str, tuple]]:
    return _places(experts, f"{experts}.gate_up_proj", f"{experts}.down_proj", gate, up)


def _halves(size: int) -> tuple[tuple, tuple]:
    return (ALL, slice(0, size)), (ALL, slice(size, None))


GRANITE = "model.layers.1.block_sparse_moe"
# model type -> unit name -> (key in the files, place in that tensor)
PLACES = {
    "gpt_oss": _of_transformers("model.layers.1.mlp.experts", (ALL, EVEN), (ALL, ODD)),
    "llama4_text": _of_transformers("model.layers.1.feed_forward.experts", *_halves(48)),
    "granitemoe": _places(
        f"{GRANITE}.experts",
        f"{GRANITE}.input_linear.weight",
        f"{GRANITE}.output_linear.weight",
        (slice(0, 48),),
        (slice(48, None),),
    ),
    "jetmoe": {
        f"model.layers.1.{owner}.3.weight": (f"model.layers.1.{owner}.weight", (3,))
        for owner in ("mlp.input_linear", "mlp.output_linear", "self_attention.experts.input_linear")
    },
    "qwen3_vl_moe": _of_transformers("model.language_model.layers.1.mlp.experts", (slice(0, 24),), (slice(24, None),)),
}
pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="layouts of transformers 5")


def _saved(model_type: str, folder: Path) -> nn.Module:
    auto = transformers.AutoModelForImageTextToText if "_vl_" in model_type else transformers.AutoModelForCausalLM
    config = tiny_config(model_type)
    if "_vl_" in model_type:
        # transformers tells the layout by the shape, which a square one doesn't
        config.text_config.moe_intermediate_size = 24
    auto.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("model_type", PLACES)
def test_units_are_where_the_docs_say(model_type, tmp_path):
    model = _saved(model_type, tmp_path / "base")
    files, units = load_file(tmp_path / "base" / "model.safetensors"), {unit.name: unit for unit in find_units(model)}
    for name, (key, place) in PLACES[model_type].items():
        assert name not in files and torch.equal(unit_matrix(model, units[name]), files[key][place]), name


def test_files_with_inputs_before_outputs(tmp_path):
    """transformers 5 reads Qwen3-VL-MoE in both layouts, and saves it in one."""
    model, path = _saved("qwen3_vl_moe", tmp_path), tmp_path / "model.safetensors"
    stored = load_file(path)
    turned = {key: value.mT.contiguous() if ".experts." in key else value for key, value in stored.items()}
    save_file(turned, path, metadata={"format": "pt"})
    units, found = find_units(model), scan(tmp_path, progress=False)
    assert found.base["hash"] == base_hash(model) and {row.name for row in found.units} <= {unit.name for unit in units}
    n, name = 24, "model.language_model.layers.1.mlp.experts.3"
    expected = turned["model.language_model.layers.1.mlp.experts.gate_up_proj"][3]
    for projection, part in (("gate_proj", expected[:, :n].T), ("up_proj", expected[:, n:].T)):
        unit = next(unit for unit in units if unit.name == f"{name}.{projection}.weight")
        assert torch.equal(unit_matrix(model, unit), part)


@pytest.mark.parametrize("model_type", PLACES)
def test_merged_checkpoints_have_the_files_own_keys(model_type, tmp_path):
    chosen = list(PLACES[model_type])
    model = get_peft_model(_saved(model_type, tmp_path / "base"), KappaTuneConfig(k="100%", include=chosen))
    train(model, 2, input_ids=TOKENS, labels=TOKENS)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "merged"))
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    trained = {layer.unit.name: layer.active.weight.detach() for layer in model.base_model.layers()}
    assert set(trained) == set(chosen)
    for name, (key, place) in PLACES[model_type].items():
        assert torch.equal(after[key][place], trained[name]), name
        before[key][place] = after[key][place]
    assert all(torch.equal(before[key], after[key]) for key in before)
