"""An adapter in, a folder out in the form that somebody else loads."""

import os
from functools import partial
from pathlib import Path

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.card import write_card
from kappatune_plugin.export.card_text import table
from kappatune_plugin.export.lora import LoraExport, write_lora
from kappatune_plugin.export.merge import load_tuned, merge_adapter, source
from kappatune_plugin.export.patch import PATCH, reduce_to_patch
from kappatune_plugin.model_folder import publish, staging
from kappatune_plugin.tuner.adapter_folder import adapter_config

MERGED, PATCHED, LORA, GGUF = "merged", "patch", "lora", "gguf-ready"
FORMS = (MERGED, PATCHED, LORA, GGUF)
# what llama.cpp's converter reads beside the checkpoint
TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json")


def export_adapter(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    form: str = MERGED,
    model: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    rank: int | None = None,
    share: float = 0.99,
) -> LoraExport | None:
    """Write an adapter to `output_dir` in a form that loads without this package, whole or not at all.

    Args:
        adapter: a folder that a run left.
        form: "merged", a plain checkpoint; "patch", the changed tensors and an index that lays them over the base's
            files; "lora", the nearest LoRA adapter; "gguf-ready", a plain checkpoint with what llama.cpp's converter
            reads.
        model: the base; default: the one that the adapter names.
        overwrite: replace the checkpoint in `output_dir`; a folder that holds anything else is refused.
        dtype: of a merged checkpoint; default: that of the base.
        rank: of LoRA's matrices; default: the smallest that keeps `share` of the norm of each change.

    Returns:
        what LoRA lost; None for the other forms, which hold all of it.

    Raises:
        KappaTuneError: what `form` can't carry, no adapter or no base there, or `output_dir` isn't free.
    """
    _check(form, dtype, rank, share)
    adapter, place, settings = Path(adapter), Path(os.path.realpath(output_dir)), {}
    if form == LORA:
        return _lora(adapter, place, model, overwrite, trust_remote_code, rank, share)
    if form == PATCHED:
        config = adapter_config(adapter)
        if getattr(config, "base_quantization", None):
            raise KappaTuneError(
                "The base is quantized: its files hold no tensors to lay a patch over. Use `--as merged`."
            )
        settings["finish"] = partial(reduce_to_patch, base=model or config.base_model_name_or_path, output_dir=place)
    elif form == GGUF:
        settings["more_files"] = TOKENIZER_FILES
    merge_adapter(adapter, output_dir, model, overwrite, trust_remote_code, dtype, **settings)
    return None


def _check(form: str, dtype: str | None, rank: int | None, share: float) -> None:
    if form not in FORMS:
        raise KappaTuneError(f"--as {form} is none of {', '.join(FORMS)}.")
    if dtype is not None and form not in (MERGED, GGUF):
        raise KappaTuneError(f"--dtype is for a whole checkpoint; --as {form} keeps the base's.")
    if not 0 < share <= 1:
        raise KappaTuneError(f"--share is {share}, expected a number above 0, up to 1.")
    if rank is not None and form != LORA:
        raise KappaTuneError(f"--rank is LoRA's; --as {form} has none.")


def _lora(
    adapter: Path,
    place: Path,
    model: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    rank: int | None,
    share: float,
) -> LoraExport:
    config, base, options = source(adapter, place, model, overwrite, trust_remote_code)
    tuned = load_tuned(adapter, base, config, options)
    with staging(place) as folder:
        found = write_lora(tuned, folder, rank, share)
        rows = [[f"`{name}`", f"{error:.2%}"] for name, error in found.errors.items()]
        lost = (
            f"## What LoRA lost\n\nThe nearest LoRA adapter of rank {found.rank} to what was trained. What is missing "
            f"of each change, as a share of its size (Frobenius norm):\n\n{table(['weight', 'missing'], rows)}"
        )
        write_card(folder, {**config.to_dict(), "peft_type": "LORA"}, more=lost, files=adapter, form="lora")
        publish(folder, place)
    return found


def sizes(folder: Path) -> str:
    """How large the weights are that an export wrote, for a person."""
    files = [path for path in sorted(folder.glob("*.safetensors"))]
    total = sum(path.stat().st_size for path in files)
    only = " (the changed tensors alone; the base's files are read where they are)" if (folder / PATCH) in files else ""
    return f"{total / 2**20:,.1f} MiB of weights{only}"
