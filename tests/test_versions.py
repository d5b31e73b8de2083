"""The same units and the same selection whichever version of transformers holds the experts.

transformers 4 keeps each expert in modules of its own, transformers 5 a layer's experts in two parameters. Both are
compared with the checkpoint's files here, so with each other.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kappatune_plugin import scan, select
from kappatune_plugin.weights.units import find_units, unit_matrix

sys.path.insert(0, str(Path(__file__).parent / "toolkits"))

import matrix

MODEL = Path(__file__).parents[1] / "recipes" / "quickstart" / "model"
K = 75


def checkpoint() -> dict[str, torch.Tensor]:
    """The weight matrices of the quickstart's model, 16 experts in each of 4 layers, as its file holds them."""
    return {name: tensor for name, tensor in load_file(MODEL / "model.safetensors").items() if tensor.ndim == 2}


def test_units_are_the_checkpoints_tensors():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    expected = checkpoint()
    units = {unit.name: unit for unit in find_units(model)}
    assert units.keys() == expected.keys() and len(units) > 16 * 4 * 3
    assert all(torch.equal(unit_matrix(model, unit), expected[name]) for name, unit in units.items())


def test_the_selection_is_that_of_the_checkpoint():
    expected = {}
    for name, tensor in checkpoint().items():
        if not name.startswith(("model.embed_tokens", "lm_head")):
            sigma = np.linalg.svd(tensor.double().numpy(), compute_uv=False)
            expected[name] = sigma[0] / sigma[-1]
    lowest = sorted(expected, key=expected.__getitem__)[:K]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    for source in (model, str(MODEL)):
        selection = select(scan(source, progress=False), k=K)
        assert [row.name for row in selection.units] == lowest
        assert all(abs(row.kappa / expected[row.name] - 1) < 1e-3 for row in selection.units)


def test_readmes_table_is_what_was_recorded():
    readme = matrix.README.read_text(encoding="utf-8")
    assert readme.count(matrix.BEGIN) == 1 and matrix.updated(readme, matrix.load()) == readme


def test_the_table_has_a_row_for_each_run():
    runs = [
        {"name": "a-old", "ran": "A: sft.", "python": "3.11.7", "versions": {"trl": "0.24.0"}, "tests": {"passed": 3}},
        {"name": "b", "ran": "B: all.", "python": "3.12.1", "versions": {"axolotl": "0.19.0"}, "tests": None},
    ]
    text = matrix.updated(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter", runs)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old\n" not in text
    assert "| a-old | 3.11.7 |  |  | 0.24.0 |  |  |  |  |  | 3 passed |" in text
    assert "| axolotl 0.19.0 |  |" in text and "- A: sft.\n- B: all." in text
