"""Scans of checkpoints on disk: the report of the model in memory, without the model."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from helpers.tiny import CONFIGS, tiny_model
from kappatune_plugin import compat as versions
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.weights import safetensors_files as tensor_files
from kappatune_plugin.weights.checkpoint_source import SafetensorsSource
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.open_source import open_source, same_on_disk
from kappatune_plugin.weights.quantized import dequantize_float8

FILE = "model.safetensors"


def quiet(model: object, **settings) -> KappaReport:
    return scan(model, exclude=(), progress=False, **settings)


def rewrite(folder: Path, change) -> None:
    """Replace the tensors in a folder's file by what `change` makes of them."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    save_file(change(tensors), folder / FILE)


def assert_same(folder: Path, model: torch.nn.Module) -> None:
    assert isinstance(open_source(folder), SafetensorsSource)
    from_files, from_memory = quiet(folder), quiet(model)
    assert from_files.units == from_memory.units and from_files.dtype == from_memory.dtype
    assert from_files.base == {"name": folder.name, "hash": from_memory.base["hash"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_files_give_the_report_of_the_model(tmp_path, kind, dtype):
    """In one file or many; experts one by one (transformers splits them when it saves) or fused (GPT-OSS)."""
    model = tiny_model(kind, dtype)
    model.save_pretrained(tmp_path, max_shard_size="30KB" if dtype == torch.float32 else "1GB")
    assert (tmp_path / FILE).exists() == (dtype != torch.float32)
    assert_same(tmp_path, model)


def test_experts_fused_on_disk(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda _: dict(model.state_dict()))
    assert_same(tmp_path, model)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_names_with_and_without_the_prefix_of_the_base_model(tmp_path, kind):
    model = tiny_model(kind)
    prefix = f"{model.base_model_prefix}."
    model.save_pretrained(tmp_path / "head")
    rewrite(tmp_path / "head", lambda tensors: {name.removeprefix(prefix): each for name, each in tensors.items()})
    assert_same(tmp_path / "head", model)
    base = AutoModel.from_config(model.config)
    base.save_pretrained(tmp_path / "base")
    rewrite(tmp_path / "base", lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert_same(tmp_path / "base", base)


def test_tied_weight_under_its_other_name(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    rename = {"transformer.wte.weight": "lm_head.weight"}
    rewrite(tmp_path, lambda tensors: {rename.get(name, name): tensor for name, tensor in tensors.items()})
    assert_same(tmp_path, model)


def test_float8_with_scales(tmp_path):
    """Blocks as DeepSeek stores them, and one scale a row; the numbers are those of the dequantized model."""
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [16, 20]}
    model.save_pretrained(tmp_path)
    expected = tiny_model("llama")

    def quantize(tensors: dict) -> dict:
        result = {}
        for name, tensor in tensors.items():
            if "proj" not in name:
                result[name] = tensor
                continue
            blocks = [-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 20)] if "q_proj" in name else [len(tensor), 1]
            scales = torch.rand(blocks) + 0.5
            result[name] = (8 * tensor).to(torch.float8_e4m3fn)
            result[name + ("_scale_inv" if "q_proj" in name else "_scale")] = scales
            value = slow_dequantize(result[name], scales, (16, 20) if "q_proj" in name else (1, tensor.shape[1]))
            expected.get_parameter(name).data.copy_(value)
        return result

    rewrite(tmp_path, quantize)
    report = quiet(tmp_path)
    assert report.units == quiet(expected).units and report.base["hash"] == quiet(expected).base["hash"]
    assert report.dtype == "float32, float8_e4m3fn, dequantized"


def slow_dequantize(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    values = weight.float().clone()
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            values[i, j] *= scales[i // block[0], j // block[1]]
    return values


def test_float8_scales_of_a_wrong_shape():
    weight = torch.ones(300, 256).to(torch.float8_e5m2)
    assert torch.equal(dequantize_float8(weight, torch.tensor(3.0)), torch.full((300, 256), 3.0))
    expected = torch.cat([torch.full((128, 256), 1.0), torch.full((128, 256), 2.0), torch.full((44, 256), 3.0)])
    assert torch.equal(dequantize_float8(weight, torch.tensor([[1.0, 1], [2, 2], [3, 3]])), expected)
    with pytest.raises(KappaTuneError, match=r"\(300, 256\) has scales of shape \(4, 2\)"):
        dequantize_float8(weight, torch.ones(4, 2))


def loaded_whole(folder: Path, reason: str) -> KappaReport:
    with pytest.warns(UserWarning, match=f"is loaded whole, since .*{reason}"):
        source = open_source(folder)
    assert isinstance(source, ModelSource)
    with pytest.warns(UserWarning):
        return quiet(folder)


def test_files_that_do_not_tell_are_loaded(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    # the head is stored beside the embedding it is tied to
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert loaded_whole(tmp_path, "stored twice").units == quiet(model).units
    # the format before safetensors
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / FILE).unlink()
    assert loaded_whole(tmp_path, "no safetensors files").units == quiet(model).units


def test_whatever_is_wrong_with_the_files_is_named(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-100])
    shards[1].write_bytes(b"")
    with pytest.raises(KappaTuneError, match=rf"{shards[0].name}: damaged(?s:.*){shards[1].name}: damaged"):
        quiet(tmp_path)
    shards[0].write_bytes(whole)
    shards[1].unlink()
    shards[2].unlink()
    with pytest.raises(KappaTuneError, match=f"2 of its {len(shards)} files are missing: .*{shards[2].name}"):
        quiet(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [')
    with pytest.raises(KappaTuneError, match="not an index"):
        quiet(tmp_path)


def test_file_cut_after_it_was_opened(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    files = tensor_files.TensorFiles([tmp_path / "model.safetensors"])
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(KappaTuneError, match="model.safetensors: damaged or cut off"):
        files.identity()


def test_a_model_whose_folder_is_gone_is_not_looked_for_on_disk(tmp_path):
    with pytest.raises(KappaTuneError, match="Can't look for model.safetensors of the model '.*nowhere"):
        tensor_files.checkpoint_files(str(tmp_path / "nowhere"))
    model = tiny_model("llama")
    model.config._name_or_path = str(tmp_path / "nowhere")
    assert same_on_disk(model, ModelSource(model)) is None
    model.save_pretrained(tmp_path / "nowhere")
    assert isinstance(same_on_disk(model, ModelSource(model)), SafetensorsSource)


def test_file_that_must_not_be_read(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tensor_files, "safe_open", refuse)
    with pytest.raises(KappaTuneError, match="model.safetensors: Permission denied"):
        quiet(tmp_path)


def test_bad_values_are_rows(tmp_path):
    """NaN, zeros, and values below the smallest normal number of their dtype."""
    model = tiny_model("llama", torch.bfloat16)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight[3, 5] = torch.nan
        layer.self_attn.k_proj.weight.zero_()
        layer.self_attn.v_proj.weight.mul_(2.0**-125)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model)
    statuses = {row.name.split(".")[-2]: row.status for row in quiet(tmp_path).units if ".0.self_attn" in row.name}
    assert statuses == {"q_proj": "nonfinite", "k_proj": "zero", "v_proj": "ok", "o_proj": "ok"}


PEAK = """
import sys, time
import torch
from kappatune_plugin import scan

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

torch.set_num_threads(int(sys.argv[3]))
scan(sys.argv[1], progress=False)
with open("/proc/self/clear_refs", "w") as file:
    # the peak starts anew (proc(5))
    file.write("5")
before = status("VmRSS")
times = [time.perf_counter()]
for _ in range(2):
    scan(sys.argv[2], progress=False)
    times.append(time.perf_counter())
print(status("VmHWM") - before, times[1] - times[0], times[2] - times[1])
"""


def made_checkpoint(folder: Path, layers: int, width: int, inner: int) -> int:
    """A Llama in bfloat16, written tensor by tensor; values of its largest tensor."""
    config = tiny_model("llama", hidden_size=32).config
    changed = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_key_value_heads": 4}
    config.update({**changed, "dtype": "bfloat16", "head_dim": width // 4})
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in LlamaForCausalLM(config).state_dict().items()}
    largest = max(math.prod(shape) for shape in shapes.values())
    # random numbers take longer than all the rest: each tensor begins at another place of the same ones
    values, weight_map = torch.randn(largest + 2 * len(shapes)).bfloat16(), {}
    for layer in range(layers + 1):
        here = f".{layer}."
        names = [name for name in shapes if here in name or (layer == layers and ".layers." not in name)]
        shard = f"model-{layer}.safetensors"
        starts = {name: 2 * (len(weight_map) + i) for i, name in enumerate(names)}
        parts = {name: values[start : start + math.prod(shapes[name])] for name, start in starts.items()}
        save_file({name: part.reshape(shapes[name]).clone() for name, part in parts.items()}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return largest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("layers", "width", "inner", "megabytes", "threads"),
    [(6, 320, 8192, 90, 1), pytest.param(14, 1024, 10240, 1000, 2, marks=pytest.mark.slow)],
)
def test_memory_and_time_of_a_disk_scan(tmp_path, layers, width, inner, megabytes, threads):
    """At most four copies of the largest tensor in float64 for each thread, and what is known costs little."""
    # what the libraries allocate once is no part of it: these matrices are large enough for factors
    tiny_model("llama", hidden_size=320, intermediate_size=640).save_pretrained(tmp_path / "tiny")
    largest = made_checkpoint(tmp_path / "large", layers, width, inner)
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 0.9e6 * megabytes
    command = [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "large"), str(threads)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert output.returncode == 0, output.stderr
    peak, first, second = map(float, output.stdout.split())
    allowed = threads * 4 * 8 * largest
    print(f"{size / 1e6:.0f} MB: peak {peak / 1e6:.0f} MB of {allowed / 1e6:.0f}, {first:.2f} s, {second:.2f} s")
    assert peak <= allowed
    assert second <= max(0.1 * first, 0.5) and second <= 1


def test_the_report_does_not_depend_on_the_threads(tmp_path):
    """Matrices so large that a product is divided over threads, where it may be."""
    made_checkpoint(tmp_path, 1, 448, 1024)
    before, reports = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            reports.append(quiet(tmp_path, cache=False))
    finally:
        torch.set_num_threads(before)
    assert reports[0] == reports[1] == reports[2]


def test_weights_that_are_not_those_on_disk_are_an_error(saved_olmoe):
    model = AutoModelForCausalLM.from_pretrained(saved_olmoe, dtype=torch.float32)
    assert isinstance(same_on_disk(model, ModelSource(model)), SafetensorsSource)
    # toolkits initialize rows of tokens anew
    model.model.embed_tokens.weight.data[:50].mul_(2)
    assert same_on_disk(model, ModelSource(model)) is None
    model.model.layers[1].mlp.experts.down_proj.data[3].mul_(2)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with pytest.raises(KappaTuneError, match=f"not those of .* rank 0: 1, such as {name}.*Load the model again"):
        same_on_disk(model, ModelSource(model))
    model.config.name_or_path = ""
    assert same_on_disk(model, ModelSource(model)) is None


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"transformers": "5.6.0", "deepspeed": "0.18.9"}, "deepspeed>=0.19.8 .*5.6.0, 0.18.9.*allgather_sequential"),
        ({"transformers": "5.6.0", "deepspeed": "0.19.8"}, "transformers 5.6.0 and deepspeed 0.19.8 lost weights"),
        ({"transformers": "5.6.0"}, "a newer transformers than 5.6.0"),
    ],
)
def test_what_loads_a_model_whole(installed, said, monkeypatch):
    def version(name: str) -> str:
        if name not in installed:
            raise versions.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", version)
    assert re.search(said, versions.how_to_load_whole())


def test_float8_without_scales_is_refused(tmp_path):
    """transformers would cast them, and what they stand for would be ranked a thousandfold off."""
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KappaTuneError, match="without scales .*can't be told"):
        scan(str(tmp_path), progress=False)


def test_an_index_that_names_no_files_is_refused(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(KappaTuneError, match="names 3 as a file"):
        scan(str(tmp_path), progress=False)


def test_more_layers_than_any_memory_holds_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**400}))
    with pytest.raises(KappaTuneError, match="num_hidden_layers is 10{400}, expected at most 100000"):
        scan(str(tmp_path), progress=False)


def test_matrices_that_the_config_makes_empty_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 0}))
    with pytest.raises(KappaTuneError, match="Can't load a model from"):
        scan(str(tmp_path), progress=False)


def test_layers_that_the_config_does_not_name_are_said(tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.warns(UserWarning, match="hold 1 layers that its config.json doesn't name, such as model.layers.2"):
        assert len(scan(str(tmp_path), progress=False).units) == 14
