"""An adapter and its base in, a plain checkpoint out."""

import os
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.model_folder import check_free, publish, staging
from kappatune_plugin.tuner.adapter_folder import adapter_config, check_adapter, load_adapter
from kappatune_plugin.weights.quantized import whole_model

DTYPES = ("float32", "bfloat16", "float16", "float64")
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
    check_free(output_dir, [adapter, Path(base)], overwrite)
    options = {"revision": config.revision} if model is None and config.revision else {}
    merged = _merged(adapter, base, config, {"trust_remote_code": trust_remote_code, **options}, dtype or "auto")
    tokenizer = _tokenizer(adapter, base, trust_remote_code)
    with staging(output_dir) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        publish(folder, output_dir)
    return output_dir


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
