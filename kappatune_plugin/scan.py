"""A model in, the condition number of each of its weight matrices out."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from kappatune_plugin.condition import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.patterns import DEFAULT_EXCLUDE, filter_units
from kappatune_plugin.report import KappaReport, UnitReport
from kappatune_plugin.units import WeightUnit, base_hash, find_units, unit_matrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def scan(
    model_or_path: nn.Module | str | os.PathLike,
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    rtol: float = 1e-3,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> KappaReport:
    """Measure every weight matrix of a model that `include` and `exclude` leave.

    A matrix of NaN, of zeros or without full rank is a row with that status, never an error.

    Args:
        model_or_path: a model, or the folder or hub name of one that transformers can load (in the dtype it was saved
            in, on the CPU).
        include, exclude: groups ("norm", "bias", "embedding", "head", "router") or globs on unit names; an empty
            `include` means all.
        rtol: relative width of the interval of kappa, see `condition_number`.
        progress: show a bar on stderr.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        KappaTuneError: the model can't be loaded, a pattern matches nothing, or no weight matrix is left.
    """
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
    elif isinstance(model_or_path, str | os.PathLike):
        model = _load(os.fspath(model_or_path), trust_remote_code)
    else:
        kind = type(model_or_path).__name__
        raise KappaTuneError(f"scan needs a model, or the folder or hub name of one; found {kind}.")
    units = find_units(model)
    parameters = [name for name, _ in model.named_parameters()]
    kept, left_out = filter_units(units, include, exclude, parameters)
    if not kept:
        raise KappaTuneError(_nothing_left(units, parameters, include, exclude))
    rows = [
        UnitReport.of(unit.name, unit.shape, condition_number(unit_matrix(model, unit), rtol), unit.groups)
        for unit in _with_bar(kept, progress)
    ]
    dtypes = {str(model.get_parameter(unit.parameter).dtype).removeprefix("torch.") for unit in kept}
    base = {"name": _name(model), "hash": base_hash(model)}
    return KappaReport(rows, base, ", ".join(sorted(dtypes)), left_out)


def _with_bar(units: Sequence[WeightUnit], progress: bool) -> Iterator[WeightUnit]:
    """The units, behind a bar that counts the work of an SVD, rows * columns * min(rows, columns)."""
    work = [unit.shape[0] * unit.shape[1] * min(unit.shape) for unit in units]
    with tqdm(total=sum(work), desc="kappa", bar_format=BAR, disable=not progress) as bar:
        for done, (unit, cost) in enumerate(zip(units, work, strict=True), start=1):
            yield unit
            bar.set_description_str(f"kappa of {done}/{len(units)} matrices", refresh=False)
            bar.update(cost)


def _nothing_left(
    units: Sequence[WeightUnit], parameters: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> str:
    if not units:
        return (
            f"The model has no weight matrix to measure: none of its {len(parameters)} parameters is a 2-D weight in "
            "floating point. Quantized weights can't be measured: scan the model they were made from."
        )
    return (
        f"No weight matrix is left: the model has {len(units)}, include {list(include)} and exclude {list(exclude)} "
        "leave none. Widen `include` or shorten `exclude`."
    )


def _name(model: nn.Module) -> str:
    """What the report calls the model: its hub name, the last part of its folder, or its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).resolve().name if Path(name).is_dir() else name


def _load(path: str, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig

    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        loader = _loader(config)
        model, info = loader.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
    except Exception as error:
        # transformers raises anything here: OSError, ValueError, KeyError, SafetensorError, errors of remote code
        raise KappaTuneError(
            f"Can't load a model from '{path}': {type(error).__name__}: {error}\nGive a folder that "
            "`save_pretrained` wrote, or a model's name on the hub."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise KappaTuneError(
            f"'{path}' lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: they would be "
            "random numbers. Load the model yourself and scan that, or mend the checkpoint."
        )
    return model


def _loader(config: "PretrainedConfig") -> Any:
    """The class that the checkpoint was saved from; else the causal language model of its type, else the encoder."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is not None:
        return architecture
    remote = getattr(config, "auto_map", None) or {}
    causal = "AutoModelForCausalLM" in remote or type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModel
