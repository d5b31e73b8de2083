"""An adapter and its base in, a plain checkpoint out."""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import alone, as_umask_says
from kappatune_plugin.tuner.adapter_folder import adapter_config, check_adapter, load_adapter
from kappatune_plugin.weights.quantized import whole_model

# what `save_pretrained` of models, tokenizers and processors leaves
CHECKPOINT_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_|preprocessor_|processor_)?config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|(merges|vocab)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|.*\.jinja|(modeling|configuration|tokenization)_\w+\.py"
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
UNFINISHED = ".unfinished-"
# a rounding that changes the trained update by more than this share of its size is said
ROUNDING_SAID = 0.01


def merge_adapter(
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike,
    model: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dtype: str | None = None,
) -> Path:
    """Write the base with the adapter's values in it to `output_dir`, as `save_pretrained` does, with the tokenizer.

    A base that was quantized in training is quantized again, and written as what the quantized weights stand for: the
    checkpoint computes what was trained and measured.

    The folder appears under its name when it is complete, or not at all; in a folder that is there already, config.json
    comes last, so that what a kill leaves half done can't be loaded. A warning says if rounding to the checkpoint's
    dtype changes what was trained.

    Args:
        adapter: a folder that a run left.
        model: the base; default: the one that the adapter names.
        overwrite: replace the checkpoint in `output_dir`; a folder that holds anything else is refused.
        dtype: of the checkpoint, such as "float32"; default: that of the base.

    Raises:
        KappaTuneError: no adapter there, the base can't be loaded or isn't the adapter's, or `output_dir` isn't free.
    """
    # where a link leads: it stays a link
    adapter, output_dir = Path(adapter), Path(os.path.realpath(output_dir))
    config = adapter_config(adapter)
    base = model or config.base_model_name_or_path
    if not base:
        raise KappaTuneError(f"'{adapter}' doesn't name its base model. Give it with --model.")
    if dtype not in (None, *DTYPES):
        raise KappaTuneError(f"--dtype {dtype} is none of {', '.join(DTYPES)}.")
    check_adapter(adapter)
    _check_free(output_dir, [adapter, Path(base)], overwrite)
    options = {"revision": config.revision} if model is None and config.revision else {}
    merged = _merged(adapter, base, config, {"trust_remote_code": trust_remote_code, **options}, dtype or "auto")
    tokenizer = _tokenizer(adapter, base, trust_remote_code)
    with _staging(output_dir) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _publish(folder, output_dir)
    return output_dir


def _check_free(output_dir: Path, sources: list[Path], overwrite: bool) -> None:
    if os.path.lexists(output_dir) and not output_dir.is_dir():
        raise KappaTuneError(f"output_dir '{output_dir}' is no folder. Give another name.")
    for source in sources:
        if output_dir.resolve() == source.resolve():
            raise KappaTuneError(f"output_dir '{output_dir}' is what is merged. Give another folder.")
        # a hub name is no folder, though it reads like one
        if source.exists() and output_dir.resolve() in source.resolve().parents:
            raise KappaTuneError(f"output_dir '{output_dir}' holds '{source}', which is merged. Give another folder.")
    found = [path.name for path in _files(output_dir)]
    if found and not overwrite:
        raise KappaTuneError(f"output_dir '{output_dir}' is not empty. Give another folder, or add --overwrite.")
    others = [name for name in found if not CHECKPOINT_FILES.fullmatch(name)]
    # a merge that was killed while it put its files there has left the others beside them
    killed = output_dir.is_dir() and any(UNFINISHED in path.name for path in output_dir.iterdir())
    if others or (found and "config.json" not in found and not killed):
        what = f"files of no checkpoint, such as {others[0]}" if others else "no whole checkpoint"
        raise KappaTuneError(f"output_dir '{output_dir}' holds {what}: --overwrite leaves it alone. Give another one.")


def _files(folder: Path) -> list[Path]:
    """What is in a folder, without what a merge that was killed left in it."""
    return sorted(path for path in folder.iterdir() if UNFINISHED not in path.name) if folder.is_dir() else []


def _merged(adapter: Path, base: str, config: PeftConfig, options: dict[str, Any], dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        quantization = _quantization(base, config, options)
        model = whole_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options, **quantization))
    except Exception as error:
        # a damaged base raises SafetensorError, RuntimeError, OSError or ValueError
        raise KappaTuneError(f"Can't load the base model '{base}': {error}\nGive its place with --model.") from error
    tuned = load_adapter(model, adapter)
    _say_rounding(tuned)
    try:
        return tuned.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        # values that aren't finite, a method of PEFT that can't be merged
        raise KappaTuneError(f"Can't merge the adapter '{adapter}': {error}") from error


def _quantization(base: str, config: PeftConfig, options: dict[str, Any]) -> dict[str, Any]:
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


def _say_rounding(tuned: PeftModel) -> None:
    """Warn if the base's dtype can't hold what was trained: at small learning rates hardly an update is left."""
    from kappatune_plugin.tuner.model import KappaTuneModel

    if not isinstance(tuned.base_model, KappaTuneModel):
        return
    layers = tuned.base_model.layers()
    update = error = 0.0
    for layer in layers:
        master = layer.master.detach().double()
        update += (master - layer.original.whole(layer.parameter).double()).square().sum().item()
        error += (master - layer.block.double()).square().sum().item()
    share = (error / update) ** 0.5 if update else 0.0
    if share > ROUNDING_SAID:
        kept, written = (str(each.dtype).removeprefix("torch.") for each in (layers[0].master, layers[0].parameter))
        warnings.warn(
            f"The values were trained in {kept} and the checkpoint is in {written}: rounding changes what was trained "
            f"by {share:.0%} of its size (root mean square). To keep it add --dtype {kept}.",
            stacklevel=3,
        )


@contextmanager
def _staging(output_dir: Path) -> Iterator[Path]:
    """A folder to write to, on the disk of `output_dir`; those that killed merges left there are deleted."""
    parent = output_dir if output_dir.is_dir() else output_dir.parent
    name = f".{output_dir.name}{UNFINISHED}"
    folder = parent / f"{name}{secrets.token_hex(4)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{name}*"):
            # one that another merge is writing stays
            with suppress(KappaTuneError), alone(left, "merge"):
                shutil.rmtree(left)
        (folder / "model").mkdir(parents=True)
        with alone(folder, "merge"):
            yield folder / "model"
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KappaTuneError(f"Can't write '{output_dir}': {reason}. Choose another folder.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output_dir: Path) -> None:
    as_umask_says(folder)
    if not output_dir.is_dir():
        os.replace(folder, output_dir)
        return
    # without its config.json a folder doesn't load, whatever else is in it: neither the old model nor a mixture
    for old in sorted(_files(output_dir), key=lambda path: path.name != "config.json"):
        old.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)
