"""What becomes of every matrix of an architecture: trained as full fine-tuning would, or not, and why."""

import copy
import glob
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from helpers.tiny_configs import tiny_config
from kappatune_plugin import KappaTuneConfig, KappaTuneError
from kappatune_plugin.weights.units import OWN, WeightUnit, find_units, unit_block

CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
# a default config beyond this isn't made tiny by the rules
MOST_WEIGHTS = 3_000_000
RATE = 0.5


@dataclass
class Outcome:
    """What the sweep found of one class of one architecture.

    Attributes:
        model_type: the architecture, as `config.model_type` and the Auto classes name it.
        cls: name of the model's class.
        matrices: how many units `find_units` has.
        trained: of those, how many get full fine-tuning's gradient.
        without_gradient: names of units that full fine-tuning gives no gradient on text either.
        fused: how many units are a slice of a tensor in the checkpoint too, which has no key for them.
        other_names: units that the checkpoint splits, joins or leaves out as tied, under their names in memory.
        refused: what KappaTuneError said instead.
        not_built: why no tiny model of it exists here.
        wrong: what went wrong; empty where all is well.
    """

    model_type: str
    cls: str = ""
    matrices: int = 0
    trained: int = 0
    without_gradient: list[str] = field(default_factory=list)
    fused: int = 0
    other_names: list[str] = field(default_factory=list)
    refused: str = ""
    not_built: str = ""
    wrong: list[str] = field(default_factory=list)


def all_architectures() -> Iterator[tuple[str, str]]:
    """(name of the Auto class, model type) of everything to sweep."""
    for auto, types in CLASSES.items():
        for model_type in types:
            yield auto, model_type


def examine(auto: str, model_type: str) -> Outcome:
    """Train every matrix of a tiny model of `model_type` for a step, save it, load it, merge it."""
    outcome = Outcome(model_type)
    try:
        model, batch, gradients = _build(auto, model_type)
    except Exception as error:
        # whatever transformers says to a config that it can't run; the page lists it
        outcome.not_built = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return outcome
    outcome.cls = type(model).__name__
    try:
        _examine_training(model, batch, gradients, outcome)
    except KappaTuneError as error:
        outcome.refused = str(error)
    except Exception as error:
        outcome.wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return outcome


def _build(auto: str, model_type: str) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Tensor | None]]:
    """A tiny model, a batch for it, and full fine-tuning's gradients."""
    config = tiny_config(model_type)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    if auto == "AutoModelForSequenceClassification":
        config.num_labels = 2
    cls = getattr(transformers, auto)
    with torch.device("meta"):
        size = cls.from_config(config).num_parameters()
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size} weights are too many")
    torch.manual_seed(0)
    model = cls.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # a matrix that begins at zero, as some do, hides the gradients of its neighbors
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    tokens = torch.randint(4, 60, (2, 16), generator=generator)
    # encoder-decoder classifiers read the end token, wherever their config has it
    tokens[:, -1] = eos if isinstance(eos := getattr(config, "eos_token_id", None), int) else 2
    batch = {"input_ids": tokens, "labels": tokens}
    if auto == "AutoModelForSequenceClassification":
        batch["labels"] = torch.tensor([0, 1])
    reference = copy.deepcopy(model)
    loss = _loss(reference, batch)
    loss.backward()
    if not torch.isfinite(loss) or all(parameter.grad is None for parameter in reference.parameters()):
        raise ValueError("its loss isn't finite")
    return (
        model,
        batch,
        {name: parameter.grad for name, parameter in reference.named_parameters(remove_duplicate=False)},
    )


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(2)
    return model(**batch).loss


def _examine_training(
    model: PreTrainedModel, batch: dict[str, Tensor], gradients: dict[str, Tensor | None], outcome: Outcome
) -> None:
    base = copy.deepcopy(model)
    units = find_units(model)
    outcome.matrices = len(units)
    every = get_peft_model(copy.deepcopy(base), _config("100%"))
    _loss(every, batch).backward()
    for layer in every.base_model.layers():
        _compare_gradient(layer, gradients[layer.unit.parameter], outcome)
    _check_net(every, outcome)
    with tempfile.TemporaryDirectory() as folder:
        _check_names(base, units, Path(folder) / "base", outcome)
        reached = _config("50%", [glob.escape(name) for name in outcome.without_gradient])
        tuned = get_peft_model(copy.deepcopy(base), reached)
        _step(tuned, batch)
        _check_step(base, tuned, gradients, outcome)
        _check_files(base, tuned, Path(folder), outcome)


def _config(k: str, exclude: Sequence[str] = ()) -> KappaTuneConfig:
    return KappaTuneConfig(k=k, order="random", seed=0, include=["*", "tower", "stack"], exclude=list(exclude))


def _compare_gradient(layer: nn.Module, full: Tensor | None, outcome: Outcome) -> None:
    unit, mine = layer.unit, layer.active.weight.grad
    wanted = None if full is None else unit_block(full, unit)
    if wanted is None or not wanted.any():
        outcome.without_gradient.append(unit.name)
        if mine is not None and mine.any():
            outcome.wrong.append(f"{unit.name}: a gradient where full fine-tuning has none")
    elif mine is None:
        outcome.wrong.append(f"{unit.name}: no gradient where full fine-tuning has one")
    elif not torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
        outcome.wrong.append(f"{unit.name}: another gradient than full fine-tuning's")
    else:
        outcome.trained += 1


def _check_net(every: PeftModel, outcome: Outcome) -> None:
    """A step is refused if and only if a matrix got nothing; experts may have got no token."""
    missed = [layer.unit.name for layer in every.base_model.layers() if layer.active.weight.grad is None]
    missed = [name for name in missed if ".experts." not in name]
    try:
        every.base_model.stepping()
    except KappaTuneError as error:
        if not missed or missed[0] not in str(error):
            outcome.wrong.append(f"refused to step: {error}")
    else:
        outcome.wrong += [f"{name}: stepped without a gradient" for name in missed]


def _step(tuned: PeftModel, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([each for each in tuned.parameters() if each.requires_grad], lr=RATE)
    _loss(tuned, batch).backward()
    optimizer.step()


def _check_step(base: PreTrainedModel, tuned: PeftModel, gradients: dict[str, Tensor | None], outcome: Outcome) -> None:
    """Every parameter is where a step of full fine-tuning on the selected slices alone would have it."""
    wanted = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for unit in (layer.unit for layer in tuned.base_model.layers()):
        if (gradient := gradients[unit.parameter]) is not None:
            unit_block(wanted[unit.parameter], unit).sub_(RATE * unit_block(gradient, unit))
    for name, parameter in tuned.base_model.model.named_parameters():
        if OWN in name or not parameter.numel():
            continue
        step = float((wanted[name] - base.get_parameter(name).detach()).abs().max())
        if not torch.allclose(parameter, wanted[name], rtol=0, atol=1e-4 * step):
            outcome.wrong.append(f"{name}: a step of the selected matrices leaves it elsewhere")


def _check_names(base: PreTrainedModel, units: list[WeightUnit], folder: Path, outcome: Outcome) -> None:
    base.save_pretrained(folder)
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys |= set(opened.keys())
    missing = [unit for unit in units if unit.name not in keys]
    outcome.fused = sum(bool(unit.index) for unit in missing)
    outcome.other_names = [unit.name for unit in missing if not unit.index]


def _check_files(base: PreTrainedModel, tuned: PeftModel, folder: Path, outcome: Outcome) -> None:
    """The saved adapter on the same base, and the merged checkpoint, hold what was trained, bit by bit."""
    tuned.save_pretrained(folder / "adapter")
    wanted = _state(tuned.base_model.model)
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    outcome.wrong += [f"{name} differs after loading" for name in _differing(_state(again.base_model.model), wanted)]
    merged = tuned.merge_and_unload()
    outcome.wrong += [f"{name} differs after merging" for name in _differing(_state(merged), wanted)]
    merged.save_pretrained(folder / "merged")
    # what transformers doesn't bring back of the base itself is none of ours
    control = _differing(_read(base, folder / "base"), _state(base))
    differing = set(_differing(_read(base, folder / "merged"), wanted)) - set(control)
    outcome.wrong += [f"{name} differs in the merged checkpoint" for name in sorted(differing)]


def _read(base: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    return _state(type(base).from_pretrained(folder, dtype=torch.float32, ignore_mismatched_sizes=True))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if OWN not in name}


def _differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name, value in wanted.items() if name not in found or not torch.equal(found[name], value)]
