"""Open a model, a folder or a hub name as a Source of weights."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from kappatune_plugin.compat import how_to_load_whole
from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.weights.checkpoint_source import SafetensorsSource, Unusable
from kappatune_plugin.weights.fingerprint import BaseHashes, fingerprints, holds_other_values
from kappatune_plugin.weights.load_model import empty_model, load_model, model_config
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.safetensors_files import TensorFiles, checkpoint_files
from kappatune_plugin.weights.source import Source
from kappatune_plugin.weights.units import WeightUnit

# "model.layers.3.mlp.up_proj.weight" -> "model.layers", "3"
LAYER = re.compile(r"(.*?)\.(\d+)\.")


def checkpoint_source(path: str, trust_remote_code: bool = False) -> Source:
    """The checkpoint in a folder or of a hub name: its safetensors files if they can be used, else the loaded model.

    Raises:
        KappaTuneError: missing or damaged files, or a model that can't be loaded.
    """
    model_config(path, trust_remote_code)
    try:
        files, model = TensorFiles(_files(path)), _empty(path, trust_remote_code)
        _warn_of_more_layers(path, files.tensors, model)
        return SafetensorsSource(path, files, model)
    except Unusable as reason:
        model = load_model(path, trust_remote_code)
        warnings.warn(f"'{path}' is loaded whole, since {reason}.", stacklevel=2)
        return ModelSource(model)


def _warn_of_more_layers(path: str, stored: Iterable[str], model: nn.Module) -> None:
    """Say it where the files hold layers that config.json doesn't know: transformers leaves them out."""
    known: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        if match := LAYER.match(name):
            known.setdefault(match[1], set()).add(match[2])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    more = {
        f"{match[1]}.{match[2]}"
        for name in stored
        if (match := LAYER.match(name)) and match[2] not in known.get(match[1], {match[2]})
        # a model's own way to say it: layers that predict several tokens, which training doesn't use
        if not any(re.search(pattern, name) for pattern in ignored)
    }
    if more:
        warnings.warn(
            f"The files of '{path}' hold {len(more)} layers that its config.json doesn't name, such as {min(more)}: "
            "they are left out, in training too. Check num_hidden_layers.",
            stacklevel=3,
        )


def same_on_disk(model: nn.Module, source: ModelSource) -> Source | None:
    """The checkpoint that a partitioned model was loaded from, if all ranks find the same weights there; else None.

    Collective. Each rank then reads what it measures from disk, and nothing has to be gathered.

    Raises:
        KappaTuneError: the checkpoint has the same model in the same dtype with other values. Only embeddings and
            heads may differ, since toolkits initialize rows of added tokens.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        found = SafetensorsSource(path, TensorFiles(_files(path)), model) if path else None
    except (KappaTuneError, Unusable):
        # the weights in memory can still be gathered
        found = None
    alike = found is not None and _forms(found) == _forms(source)
    if not all(ranks.exchange(alike)):
        return None
    samples = found.samples()
    if fingerprints(found.units, samples).before == source.base_hashes().before:
        return found
    matrices = [unit for unit in found.units if not unit.groups & {"embedding", "head"}]
    changed = (holds_other_values(model.get_parameter(each.parameter), each, samples[each.name]) for each in matrices)
    everywhere = ranks.exchange([unit.name for unit, other in zip(matrices, changed, strict=True) if other])
    if any(everywhere):
        raise KappaTuneError(_not_loaded(path, everywhere))
    return None


def _not_loaded(path: str, wrong: Sequence[Sequence[str]]) -> str:
    """The error for weights that differ from their checkpoint; `wrong` has each rank's unit names."""
    ranks = [f"rank {rank}: {len(names)}, such as {names[0]}" for rank, names in enumerate(wrong) if names]
    return (
        f"The weights in memory are not those of '{path}', where they were loaded from. Matrices with other values: "
        f"{'; '.join(ranks)}. An adapter trained on them would fit no saved model. {how_to_load_whole()} If you "
        'changed the weights on purpose, save and load them, or set model.config.name_or_path = "" before.'
    )


def _forms(source: Source) -> list[tuple[str, tuple[int, int], str]]:
    """Name, shape and dtype of each unit."""
    return [(unit.name, unit.shape, source.dtype(unit)) for unit in source.units]


def _files(path: str) -> list:
    files = checkpoint_files(path)
    if not files:
        raise Unusable("it has no safetensors files")
    return files


def _empty(path: str, trust_remote_code: bool) -> nn.Module:
    try:
        return empty_model(path, trust_remote_code)
    except Exception as error:
        # transformers and remote code raise anything where a model can't be built without memory
        raise Unusable(f"its architecture can't be built empty ({type(error).__name__}: {error})") from error


class ScanFrom(Source):
    """A model whose units are measured by the values of another checkpoint of it: for a quantized model, the
    unquantized one."""

    def __init__(self, model: Source, values: Source) -> None:
        self.name, self.units, self.parameters, self.contents = model.name, model.units, model.parameters, {}
        self._model, self._values = model, values
        self._theirs = {unit.name: unit for unit in values.units}
        wrong = [unit.name for unit in self.units if unit.name not in self._theirs]
        wrong += [unit.name for unit in self.units if unit.name not in wrong and self._shape(unit) != unit.shape]
        if wrong:
            raise KappaTuneError(
                f"scan_from: '{values.name}' lacks {len(wrong)} of the {len(self.units)} weight matrices of "
                f"'{model.name}', or has them in another shape, such as {wrong[0]}: give the checkpoint it was made of."
            )

    def dtype(self, unit: WeightUnit) -> str:
        return f"{self._values.dtype(self._theirs[unit.name])} of {self._values.name}"

    def load(self, unit: WeightUnit) -> Tensor:
        return self._values.load(self._theirs[unit.name])

    def base_hashes(self) -> BaseHashes:
        return self._model.base_hashes()

    def memory_limit(self) -> int:
        return self._values.memory_limit()

    def _shape(self, unit: WeightUnit) -> tuple[int, int]:
        return self._theirs[unit.name].shape


def open_source(model_or_path: nn.Module | ModelSource | str | os.PathLike, trust_remote_code: bool = False) -> Source:
    """The weights of a model, or of the folder or hub name of one. Collective where several ranks run.

    Raises:
        KappaTuneError: it is neither, or the model can't be loaded.
    """
    if isinstance(model_or_path, nn.Module | ModelSource):
        source = model_or_path if isinstance(model_or_path, ModelSource) else ModelSource(model_or_path)
        return (same_on_disk(source.model, source) or source) if source.divided else source
    if isinstance(model_or_path, str | os.PathLike):
        return checkpoint_source(os.fspath(model_or_path), trust_remote_code)
    kind = type(model_or_path).__name__
    raise KappaTuneError(f"scan needs a model, or the folder or hub name of one; found {kind}.")
