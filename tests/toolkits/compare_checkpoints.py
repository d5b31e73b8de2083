"""Did exactly the selected matrices change? `python compare_checkpoints.py BASE ADAPTER MERGED`

Compares the tensors in the files of BASE and MERGED with the selection in ADAPTER, and loads MERGED with plain
transformers. Nothing of kappatune_plugin takes part: the names in a selection are those in the files.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def changed_tensors(base: Path, merged: Path) -> tuple[set[str], int]:
    """Names of the tensors whose bits differ, and how many there are in all; asserts equal names, shapes, dtypes."""
    before, after = _tensors(base), _tensors(merged)
    assert before.keys() == after.keys(), f"other names: {sorted(before.keys() ^ after.keys())}"
    for name in before:
        kinds = [(tensor.dtype, tensor.shape) for tensor in (before[name], after[name])]
        assert kinds[0] == kinds[1], f"{name} was {kinds[0]} and is {kinds[1]}"
    return {name for name in before if not torch.equal(before[name], after[name])}, len(before)


def selected_names(adapter: Path) -> set[str]:
    """The names that an adapter says it trains."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return {unit["name"] for unit in config["selection"]["units"]}


def check_loads(base: Path, merged: Path) -> None:
    """MERGED loads whole with plain transformers, and its logits are finite and not those of BASE."""
    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokens = AutoTokenizer.from_pretrained(merged)("the cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(base)(tokens).logits)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def main(base: Path, adapter: Path, merged: Path) -> None:
    changed, total = changed_tensors(base, merged)
    selected = selected_names(adapter)
    assert selected, f"{adapter} selects nothing"
    assert changed == selected, (
        f"changed only: {sorted(changed - selected)}, selected only: {sorted(selected - changed)}"
    )
    check_loads(base, merged)
    assert "kappatune_plugin" not in sys.modules
    print(f"{merged}: the {len(selected)} selected of {total} tensors changed, the others are the same to the bit")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
