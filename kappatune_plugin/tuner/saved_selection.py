"""The selection that a checkpoint was trained with: kept in it, and compared when it is resumed."""

import json
from collections.abc import Iterable
from pathlib import Path

from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.tuner.adapter_folder import ADAPTER_CONFIG

# in the place of the adapter, in a checkpoint that FSDP2 divides over files (SHARDED_STATE_DICT)
SELECTION, SHARDS = "selection.json", "pytorch_model_fsdp_0"


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
        "made with (selection.json beside it), or start anew without resume_from_checkpoint. An adapter whose own "
        "files disagree was damaged or edited: copy it again."
    )
