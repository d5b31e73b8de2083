"""What was made before the package was divided into rooms still loads: fixtures/before_rooms, made by its make.py.

The numbers are of another machine than this, hence the tolerances.
"""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import kappatune_plugin
from kappatune_plugin import KappaReport, KappaTuneConfig, Selection, scan, select
from kappatune_plugin.tuner.values import renamed
from kappatune_plugin.weights.model_source import ModelSource

MADE = Path(__file__).parent / "fixtures" / "before_rooms"
ADAPTER, WEIGHTS = MADE / "adapter", "adapter_model.safetensors"
# TRL 1.9 weighs the routers' loss otherwise, so its last two steps aren't these
AS_MADE = version("trl").startswith("1.16.")
needs_5 = pytest.mark.skipif(
    Version(version("transformers")) < Version("5"),
    reason="transformers 5 made it: 4 holds experts apart, under other names, and can't load the tokenizer",
)


def load_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MADE / "base", dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(load_file(MADE / "logits.safetensors")["input_ids"]).logits


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)


@pytest.mark.parametrize(("kind", "name"), [(KappaReport, "kappa_report.json"), (Selection, "selection.json")])
def test_report_and_selection_load_and_save_to_the_same(kind, name, tmp_path):
    kind.load(ADAPTER / name).save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (ADAPTER / name).read_bytes()


def test_the_same_is_selected():
    made, report = Selection.load(ADAPTER / "selection.json"), KappaReport.load(ADAPTER / "kappa_report.json")
    assert select(report, k="50%").units == made.units
    now = scan(load_base())
    assert [unit.name for unit in select(now, k="50%").units] == [unit.name for unit in made.units]
    # other matrices count for it now; what was written before is still known by the earlier one
    assert now.base["hash"] != report.base["hash"] and report.base["hash"] in ModelSource(load_base()).base_hashes()


@needs_5
def test_adapter_gives_the_same_logits():
    made = load_file(MADE / "logits.safetensors")
    model = PeftModel.from_pretrained(load_base(), str(ADAPTER))
    assert (made["adapter"] - made["base"]).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), made["adapter"], rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), made["base"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), made["adapter"], rtol=0, atol=1e-5)


@needs_5
def test_new_adapter_of_the_selection_trains_the_same_matrices():
    selection = str(ADAPTER / "selection.json")
    model = get_peft_model(load_base(), KappaTuneConfig(task_type="CAUSAL_LM", selection=selection))
    made = PeftModel.from_pretrained(load_base(), str(ADAPTER), is_trainable=True)
    shapes = [
        [(name, value.shape) for name, value in each.named_parameters() if value.requires_grad]
        for each in (model, made)
    ]
    assert shapes[0] == shapes[1] and shapes[0]


@needs_5
def test_resumed_from_the_checkpoint_ends_with_the_same_values(tmp_path):
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    shutil.copy(ADAPTER / "recipe.yaml", tmp_path)
    made, half = (renamed(load_file(folder / WEIGHTS)) for folder in (ADAPTER, ADAPTER / "checkpoint-2"))
    assert not same(made, half)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    words = ["sft", "--config", "recipe.yaml", "--resume_from_checkpoint", "adapter/checkpoint-2"]
    done = subprocess.run(
        [sys.executable, "-m", "kappatune_plugin", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    now = load_file(tmp_path / "adapter" / WEIGHTS)
    assert not same(now, half)
    if AS_MADE:
        assert same(now, made)
    state = json.loads((tmp_path / "adapter" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    forgetting = json.loads((tmp_path / "adapter" / "forgetting.json").read_text())
    assert forgetting["steps"] == json.loads((ADAPTER / "forgetting.json").read_text())["steps"]


def test_no_file_names_a_module_of_ours():
    """A pickle that did would bind the module's place for ever."""
    archives = [path for path in ADAPTER.rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    assert len(archives) == 4
    for path in archives:
        with zipfile.ZipFile(path) as file:
            pickles = [file.read(name) for name in file.namelist() if name.endswith(".pkl")]
        assert pickles and not any(b"kappatune_plugin" in content for content in pickles), path
    assert "kappatune_plugin" not in (ADAPTER / "adapter_config.json").read_text()


def test_public_names_and_paths_are_where_they_were():
    names = "Kappa KappaReport KappaTuneConfig KappaTuneError KappaTuneModel Selection condition_number scan select"
    assert {*names.split(), "__version__"} <= set(kappatune_plugin.__all__)
    assert all(hasattr(kappatune_plugin, name) for name in kappatune_plugin.__all__)
    # axolotl's YAML names it; importing it needs axolotl
    source = Path(importlib.util.find_spec("kappatune_plugin.toolkits.axolotl").origin)
    assert "class KappaTunePlugin" in source.read_text(encoding="utf-8")
    assert importlib.import_module("kappatune_plugin.toolkits.llamafactory")
    assert callable(importlib.import_module("kappatune_plugin.cli").main)
