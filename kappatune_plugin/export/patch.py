"""The changed tensors alone, with an index that lays them over the base's files."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.read_back import differences
from kappatune_plugin.weights.safetensors_files import TensorFiles, checkpoint_files

INDEX, PATCH = "model.safetensors.index.json", "model-patch.safetensors"


def reduce_to_patch(folder: Path, base: str, output_dir: Path) -> None:
    """Replace the whole checkpoint in `folder` by the tensors that differ from the base's, under the same names.

    transformers loads the files of an index in the order of their names and keeps the later one of two tensors of a
    name: the patch comes after the base's files, whose paths begin with a dot or a slash.

    Args:
        base: the base's folder, or its name on the hub.
        output_dir: where `folder` will be: the paths to the base's files start there, or at the root for the hub's.

    Raises:
        KappaTuneError: the base has no safetensors files.
    """
    files = checkpoint_files(base)
    if not files:
        raise KappaTuneError(
            f"The base '{base}' has no safetensors files for a patch to lie over. Export it with `--as merged`."
        )
    before, written = TensorFiles(files), TensorFiles(folder.glob("*.safetensors"))
    found = differences(before, written)
    changed = {name: written.read(name).clone() for name in sorted(found.changed | found.new)}
    places = {name: _place(stored.path, base, output_dir) for name, stored in before.tensors.items()}
    for path in written.paths:
        path.unlink()
    save_file(changed, folder / PATCH, metadata={"format": "pt"})
    total = sum(stored.size for stored in before.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {**places, **dict.fromkeys(changed, PATCH)}}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _place(file: Path, base: str, output_dir: Path) -> str:
    """Relative where both are folders, which may move together; else absolute, in the hub's cache."""
    return os.path.relpath(file, output_dir) if Path(base).is_dir() else str(file.absolute())
