"""The selection that a checkpoint was trained with: kept in it, and compared when it is resumed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.tuner.adapter_folder import ADAPTER_CONFIG
from kappatune_plugin.tuner.config import FULL, LORA
from kappatune_plugin.tuner.values import VALUES, renamed
from kappatune_plugin.weights.units import OWN

# in the place of the adapter, in a checkpoint that FSDP2 divides over files (SHARDED_STATE_DICT)
SELECTION, REPORT, SHARDS = "selection.json", "kappa_report.json", "pytorch_model_fsdp_0"
MARK = f".{VALUES}."


def keep_selection(folder: Path, selection: Selection) -> None:
    """Write `selection` into a checkpoint that holds no adapter, as FSDP2's divided ones; on the first rank."""
    if ranks.rank() == 0 and folder.is_dir() and not (folder / ADAPTER_CONFIG).is_file():
        selection.save(folder / SELECTION)


def check_selection(folder: Path, units: Iterable[str]) -> None:
    """Refuse the checkpoint in `folder` if its selection isn't `units`.

    Raises:
        KappaTuneError: names what differs.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        selection = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("selection")
        names = [row["name"] for row in selection["units"]] if selection else None
    else:
        path = folder / SELECTION
        names = [row.name for row in Selection.load(path).units] if path.is_file() else None
    there, here = set(names or ()), set(units)
    if names is not None and there != here:
        raise other_selection(there - here, here - there)


def other_selection(there: Iterable[str], here: Iterable[str]) -> KappaTuneError:
    """The error for a checkpoint that trains what this run doesn't (`there`), or not what this run trains (`here`)."""
    there, here = sorted(there), sorted(here)
    return KappaTuneError(
        f"The checkpoint trains another selection than this run: {len(there)} weights only in the checkpoint "
        f"({', '.join(there[:3])}), {len(here)} only here ({', '.join(here[:3])}). To resume, use the settings it was "
        "made with (selection.json beside it), or start anew without resume_from_checkpoint."
    )


def named_as_here(state_dict: Mapping[str, Any], model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """`state_dict` with other names of the units that `model` trains replaced by those of here.

    Other names are those by earlier versions, and by transformers 4 and 5 where the other one runs now.
    """
    named = renamed(state_dict)
    here = {_place(f"{prefix}{name}") for name, _ in model.named_parameters() if MARK in name}
    places = _other_places({_place(key) for key in named if MARK in key}, here)
    return {f"{places.get(_place(key), _place(key))}{key[len(_place(key)) :]}": value for key, value in named.items()}


def check_loaded_keys(tuner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a tuner's state dict is loaded: refuse another selection, and values without fingerprints.

    PEFT would load what fits and ignore the rest. Names are replaced in `state_dict`, see `named_as_here`.
    """
    named = named_as_here(state_dict, tuner, prefix)
    state_dict.clear()
    state_dict.update(named)
    found = {key for key in state_dict if key.startswith(prefix) and MARK in key and not key.endswith(".base")}
    own = {f"{prefix}{name}" for name, _ in tuner.named_parameters() if MARK in name}
    kinds = [{key.rpartition(".")[2] for key in keys} for keys in (found, own)]
    if found and not kinds[0] & kinds[1]:
        words = (FULL if "weight" in kind else LORA for kind in kinds)
        raise KappaTuneError("The values were trained with adapter: {}, and this model's adapter is {}.".format(*words))
    adapters = {_adapter(key) for key in found & own}
    expected = {key for key in own if _adapter(key) in adapters}
    if found - own or expected - found:
        there, here = (sorted(map(_place, keys)) for keys in (found - own, expected - found))
        raise KappaTuneError(
            f"The values to load are those of another selection: {len(there)} weights only among them "
            f"({', '.join(there[:3])}), {len(here)} only in the adapter's selection ({', '.join(here[:3])}). Load them "
            "into the adapter that they were saved with; to resume, use the settings that the run began with. Where an "
            "adapter's own files disagree, one was damaged or edited: copy it again."
        )
    # FSDP2 leaves fingerprints out of what it loads into a model that is nowhere yet
    nowhere = any(value.is_meta for name, value in tuner.named_parameters() if MARK not in name)
    unsigned = {key for key in found if f"{key.rpartition('.')[0]}.base" not in state_dict}
    if unsigned and not nowhere:
        raise KappaTuneError(
            f"The adapter doesn't say which base it was trained on: {len(unsigned)} weights, such as "
            f"{_place(min(unsigned))}, have no fingerprint beside them ({VALUES}.base). Its file was edited or is not "
            "whole: copy it again."
        )


def _place(key: str) -> str:
    return key.partition(MARK)[0]


def _adapter(key: str) -> str:
    return key.partition(MARK)[2].rpartition(".")[0]


def _other_places(there: set[str], here: set[str]) -> dict[str, str]:
    """A checkpoint's place of a unit -> its place in this model, where only the versions of transformers differ.

    Experts are modules in transformers 4 and fused in 5, under modules of other names too: layer, expert and projection
    say which unit it is. Whether it holds the same base is checked when its values are taken over.
    """
    mine = {_numbers_and_word(place): place for place in here - there}
    return {place: mine[found] for place in there - here if (found := _numbers_and_word(place)) in mine}


def _numbers_and_word(place: str) -> tuple[str, ...]:
    """("3", "17", "gate_proj") for `layers.3.experts.17.gate_proj.*` and `layers.3.experts.kappatuned_17_gate_proj`."""
    owner, _, unit = place.rpartition(f".{OWN}")
    expert, _, projection = unit.partition("_")
    parts = [*owner.split("."), *([expert, projection] if expert.isdigit() else [])]
    return (*(each for each in parts if each.isdigit()), parts[-1])
