"""An adapter and its base in, a plain checkpoint out."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.tuner.adapter_folder import adapter_config, check_adapter, load_adapter
from kappatune_plugin.weights.quantized import whole_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def merge_adapter(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    model: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the base with the adapter's values in it to `output_dir`, as `save_pretrained` does, with the tokenizer.

    A base that was quantized in training is quantized again, and written as what the quantized weights stand for: the
    checkpoint computes what was trained and measured.

    The folder appears under its name when it is complete, or not at all.

    Args:
        adapter: a folder that a run left.
        model: the base; default: the one that the adapter names.
        overwrite: replace an `output_dir` that holds something.

    Raises:
        KappaTuneError: no adapter there, the base can't be loaded or isn't the adapter's, or `output_dir` isn't free.
    """
    adapter, output_dir = Path(adapter), Path(output_dir)
    config = adapter_config(adapter)
    base = model or config.base_model_name_or_path
    if not base:
        raise KappaTuneError(f"'{adapter}' doesn't name its base model. Give it with --model.")
    check_adapter(adapter)
    _check_free(output_dir, [adapter, Path(base)], overwrite)
    options = {"revision": config.revision} if model is None and config.revision else {}
    merged = _merged(adapter, base, config, {"trust_remote_code": trust_remote_code, **options})
    tokenizer = _tokenizer(adapter, base, trust_remote_code)
    temporary = _sibling(output_dir)
    try:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _move(temporary, output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output_dir


def _check_free(output_dir: Path, sources: list[Path], overwrite: bool) -> None:
    for source in sources:
        if output_dir.resolve() == source.resolve():
            raise KappaTuneError(f"output_dir '{output_dir}' is what is merged. Give another folder.")
        # a hub name is no folder, though it reads like one
        if source.exists() and output_dir.resolve() in source.resolve().parents:
            raise KappaTuneError(f"output_dir '{output_dir}' holds '{source}', which is merged. Give another folder.")
    if output_dir.exists() and not output_dir.is_dir():
        raise KappaTuneError(f"output_dir '{output_dir}' is a file. Give a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise KappaTuneError(f"output_dir '{output_dir}' is not empty. Give another folder, or add --overwrite.")


def _merged(adapter: Path, base: str, config: "PeftConfig", options: dict[str, Any]) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    try:
        quantization = _quantization(base, config, options)
        model = whole_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options, **quantization))
    except Exception as error:
        # a damaged base raises SafetensorError, RuntimeError, OSError or ValueError
        raise KappaTuneError(f"Can't load the base model '{base}': {error}\nGive its place with --model.") from error
    tuned = load_adapter(model, adapter)
    try:
        return tuned.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        # values that aren't finite, a method of PEFT that can't be merged
        raise KappaTuneError(f"Can't merge the adapter '{adapter}': {error}") from error


def _quantization(base: str, config: "PeftConfig", options: dict[str, Any]) -> dict[str, Any]:
    """What to give to `from_pretrained` for the base that was quantized when it was loaded for training."""
    from transformers import AutoConfig
    from transformers.quantizers import AutoQuantizationConfig

    noted = getattr(config, "base_quantization", None)
    if not noted or getattr(AutoConfig.from_pretrained(base, **options), "quantization_config", None):
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict(noted)}


def _tokenizer(adapter: Path, base: str, trust_remote_code: bool) -> object:
    from transformers import AutoTokenizer

    where = str(adapter) if (adapter / "tokenizer_config.json").is_file() else base
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        hint = newer_tokenizer(error) or ""
        raise KappaTuneError(f"Can't load the tokenizer from '{where}': {error} {hint}".rstrip()) from error


def _sibling(output_dir: Path) -> Path:
    """A new folder on the same disk, so that moving it is one step."""
    try:
        output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output_dir.absolute().parent, prefix=f".{output_dir.name}."))
    except OSError as error:
        raise KappaTuneError(f"Can't write beside '{output_dir}': {error.strerror}. Choose another folder.") from error
    # mkdtemp makes folders private; a checkpoint is as public as the folder that holds it
    folder.chmod(0o755)
    return folder


def _move(temporary: Path, output_dir: Path) -> None:
    old = None
    if output_dir.is_dir() and any(output_dir.iterdir()):
        old = _sibling(output_dir)
        os.replace(output_dir, old)
    os.replace(temporary, output_dir)
    if old is not None:
        shutil.rmtree(old)
