"""What was written, read again: exactly what was trained differs from the base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.layer import KappaTuneLayer
from kappatune_plugin.weights.checkpoint_names import CheckpointNames
from kappatune_plugin.weights.checkpoint_source import DTYPES
from kappatune_plugin.weights.safetensors_files import TensorFiles

SHOWN = 3


@dataclass
class Differences:
    """How a checkpoint differs from its base, by the names of its tensors.

    Attributes:
        changed: tensors that both have, with other values.
        new: those that only the checkpoint has.
        gone: those that only the base has.
        recast: those of another dtype.
    """

    changed: set[str] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    recast: set[str] = field(default_factory=set)


def differences(base: TensorFiles, written: TensorFiles) -> Differences:
    """Compare two checkpoints bit by bit; a tensor that was only cast to another dtype isn't changed."""
    found = Differences(
        new=written.tensors.keys() - base.tensors.keys(), gone=base.tensors.keys() - written.tensors.keys()
    )
    for name in sorted(base.tensors.keys() & written.tensors.keys()):
        before, after = base.read(name), written.read(name)
        if before.dtype != after.dtype:
            found.recast.add(name)
        if before.shape != after.shape or not torch.equal(_bits(before.to(after.dtype)), _bits(after)):
            found.changed.add(name)
    return found


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The same bits as integers: NaN is itself there, and -0.0 isn't 0.0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(whole[values.element_size()])


def changed_in_memory(layers: Collection[KappaTuneLayer], names: CheckpointNames) -> dict[str, tuple[str, bool]]:
    """For each trained matrix, the names its tensor may have in a checkpoint and whether its values are new.

    Returns:
        unit name -> (name where the checkpoint holds the whole parameter, whether it differs from the base)
    """
    found = {}
    for layer in layers:
        before = layer.original.whole(layer.parameter)
        differs = not torch.equal(layer.block.detach().cpu(), before.cpu())
        found[layer.unit.name] = (names.whole(layer.unit.parameter), differs)
    return found


def check_names(folder: Path, saved: Mapping[str, torch.dtype]) -> None:
    """Raise KappaTuneError unless the checkpoint in `folder` holds these tensors in these dtypes, and no others."""
    written = TensorFiles(folder.glob("*.safetensors"))
    dtypes = {
        # from the header where it is a common one: reading a whole checkpoint takes long
        name: getattr(torch, DTYPES[stored.dtype]) if stored.dtype in DTYPES else written.read(name).dtype
        for name, stored in written.tensors.items()
    }
    problems = {
        "missing": saved.keys() - dtypes.keys(),
        "there that the model doesn't have": dtypes.keys() - saved.keys(),
        "of another dtype": {name for name in saved.keys() & dtypes.keys() if saved[name] != dtypes[name]},
    }
    for what, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:SHOWN])
            raise KappaTuneError(f"Read back, {len(names)} tensors are {what}, such as {shown}. {_NOTHING}")


def check_written(
    base: list[Path], folder: Path, trained: dict[str, tuple[str, bool]], beside: Collection[str] = ()
) -> Differences:
    """Compare the checkpoint in `folder` with its base's files.

    Args:
        base: its safetensors files.
        trained: as `changed_in_memory` gives it.
        beside: names of tensors, without ".weight", that may differ too: modules trained whole, added tokens.

    Raises:
        KappaTuneError: a trained matrix has the base's values, or something else differs.
    """
    written = TensorFiles(folder.glob("*.safetensors"))
    found = differences(TensorFiles(base), written)
    expected: set[str] = set()
    for name, (whole, differs) in trained.items():
        key = name if name in written.tensors else whole
        if differs:
            expected.add(key)
        if differs and key in written.tensors and key not in found.changed | found.new:
            raise KappaTuneError(f"Read back, {key} holds the base's values, and it was trained. {_NOTHING}")
    others = {name for name in found.changed - expected if not name.startswith(tuple(beside))}
    if others and expected <= written.tensors.keys():
        shown = ", ".join(sorted(others)[:SHOWN])
        raise KappaTuneError(
            f"Read back, {len(others)} tensors differ that weren't trained, such as {shown}. {_NOTHING}"
        )
    return found


_NOTHING = "Nothing was written: load the base anew, check that it is the one that was trained, and report this."
