"""An adapter and its base in, a plain checkpoint out."""

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.card import write_card
from kappatune_plugin.export.read_back import changed_in_memory, check_names, check_written
from kappatune_plugin.model_folder import CARD_PICTURES, check_free, publish, staging
from kappatune_plugin.tuner.adapter_folder import ADAPTER, adapter_config, check_adapter, load_adapter
from kappatune_plugin.tuner.values import VALUES
from kappatune_plugin.weights.checkpoint_names import CheckpointNames, dtypes_to_save
from kappatune_plugin.weights.fused_experts import EXPERTS, dequantize_experts, quantize_experts
from kappatune_plugin.weights.load_model import model_class
from kappatune_plugin.weights.quantized import whole_model
from kappatune_plugin.weights.safetensors_files import checkpoint_files
from kappatune_plugin.weights.units import TASK_HEADS, embedding_modules

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# the matrix of a task head that has a row a class
LAST_OF_HEAD = ("classifier.weight", "score.weight", "out_proj.weight")
PEFT_PREFIX = "base_model.model."
TOKENIZER = "tokenizer_config.json"
# of models that see or hear; copied as they are, since reading them takes packages that merging doesn't
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
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
    more_files: Sequence[str] = (),
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the base with the adapter's values in it to `output_dir`, as `save_pretrained` does, with the tokenizer.

    The model is of the class that was trained: a language model, a classifier with its classes' names, a reward model,
    or one that sees, with the files of its processor. Tokens that were added are in it.

    A base that was quantized in training is quantized again, and written dequantized: the checkpoint computes what was
    trained and measured.

    The folder appears under its name when it is complete, or not at all; in a folder that is there already, config.json
    comes last, so that what a kill leaves half done can't be loaded. What was written is read back: exactly the trained
    matrices differ from the base. A warning says if rounding to the checkpoint's dtype changes what was trained.

    Args:
        adapter: a folder that a run left.
        model: the base; default: the one that the adapter names.
        overwrite: replace the checkpoint in `output_dir`; a folder that holds anything else is refused.
        dtype: of the checkpoint, such as "float32"; default: that of the base.
        more_files: names of files of the base to copy too, where it has them.
        finish: called with the folder before it is published.

    Raises:
        KappaTuneError: no adapter there, the base can't be loaded or isn't the adapter's, or `output_dir` isn't free.
    """
    if dtype not in (None, *DTYPES):
        raise KappaTuneError(f"--dtype {dtype} is none of {', '.join(DTYPES)}.")
    # where a link leads: it stays a link
    adapter, output_dir = Path(adapter), Path(os.path.realpath(output_dir))
    config, base, options = source(adapter, output_dir, model, overwrite, trust_remote_code)
    tokenizer = _tokenizer(adapter, base, options)
    tuned = load_tuned(adapter, base, config, options, dtype or "auto")
    trained = trained_matrices(tuned)
    merged = _merged(tuned, adapter, tokenizer)
    with staging(output_dir) as folder:
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for path in filter(None, (_file(name, adapter, base, options) for name in [*PROCESSOR_FILES, *more_files])):
            shutil.copyfile(path, folder / path.name)
        if saved := dtypes_to_save(merged):
            check_names(folder, saved)
        noted = getattr(config, "base_quantization", None)
        files = [] if noted or dtype or trained is None else checkpoint_files(base)
        if files:
            check_written(files, folder, trained, _beside(adapter, merged))
        for name in CARD_PICTURES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        write_card(folder, config.to_dict(), merged=True, files=adapter)
        finish(folder)
        publish(folder, output_dir)
    return output_dir


def source(
    adapter: Path, output_dir: Path, model: str | None, overwrite: bool, trust_remote_code: bool
) -> tuple[PeftConfig, str, dict[str, Any]]:
    """The adapter's config, its base and how that is loaded, for what is to be written to `output_dir`.

    Raises:
        KappaTuneError: no whole adapter there, none that names its base, or `output_dir` isn't free.
    """
    config = adapter_config(adapter)
    base = model or config.base_model_name_or_path
    if not base:
        raise KappaTuneError(f"'{adapter}' doesn't name its base model. Give it with --model.")
    check_adapter(adapter)
    check_free(output_dir, [adapter, Path(base)], overwrite)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if model is None and config.revision:
        options["revision"] = config.revision
    return config, base, options


def load_tuned(adapter: Path, base: str, config: PeftConfig, options: dict[str, Any], dtype: str = "auto") -> PeftModel:
    """The base in the class that was trained, with the adapter on it.

    Raises:
        KappaTuneError: the base can't be loaded, or isn't the adapter's.
    """
    model = _base(adapter, base, config, {**options, "dtype": dtype})
    _add_tokens(model, _shapes(adapter))
    tuned = load_adapter(model, adapter)
    _say_rounding(tuned)
    return tuned


def trained_matrices(tuned: PeftModel) -> dict[str, tuple[str, bool]] | None:
    """As `read_back.changed_in_memory`; None for an adapter of another method."""
    from kappatune_plugin.tuner.model import KappaTuneModel

    if not isinstance(tuned.base_model, KappaTuneModel):
        return None
    return changed_in_memory(tuned.base_model.layers(), CheckpointNames(tuned.base_model.model))


def _beside(adapter: Path, merged: nn.Module) -> list[str]:
    """The checkpoint's names of modules that may differ too: what else the adapter holds, and embeddings it grew."""
    names = [name.removeprefix(PEFT_PREFIX) for name in _shapes(adapter) if VALUES not in name]
    if not names:
        return []
    embeddings = embedding_modules(merged)
    inside = [f"{name}.weight" for name, each in merged.named_modules() if name and each in embeddings]
    checkpoint = CheckpointNames(merged)
    return [checkpoint.whole(name).rpartition(".")[0] for name in [*names, *inside] if "." in name]


def _merged(tuned: PeftModel, adapter: Path, tokenizer: Any) -> PreTrainedModel:
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        # values that aren't finite, a method of PEFT that can't be merged
        raise KappaTuneError(f"Can't merge the adapter '{adapter}': {error}") from error
    text = merged.config.get_text_config()
    if "SequenceClassification" in type(merged).__name__ and getattr(text, "pad_token_id", None) is None:
        # such a model looks for the last token before the padding; a run sets it in memory
        text.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return merged


def _base(adapter: Path, base: str, config: PeftConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The base in the class that was trained, with as many classes, quantized as it was and then dequantized."""
    try:
        settings = AutoConfig.from_pretrained(base, **{key: options[key] for key in options if key != "dtype"})
        labels = _labels(config, settings, _shapes(adapter))
        if labels:
            settings.id2label = dict(enumerate(labels))
            settings.label2id = {label: number for number, label in enumerate(labels)}
        noted = dict(getattr(config, "base_quantization", None) or {})
        experts = noted.pop(EXPERTS, None)
        if noted and not getattr(settings, "quantization_config", None):
            options["quantization_config"] = AutoQuantizationConfig.from_dict(noted)
        loader = _trained_class(config, settings)
        model, info = loader.from_pretrained(base, config=settings, output_loading_info=True, **options)
        if experts:
            quantize_experts(model, experts)
            dequantize_experts(model)
    except KappaTuneError:
        raise
    except Exception as error:
        # a damaged base raises SafetensorError, RuntimeError, OSError or ValueError
        raise KappaTuneError(f"Can't load the base model '{base}': {error}\nGive its place with --model.") from error
    saved = {name.removeprefix(PEFT_PREFIX) for name in _shapes(adapter)}
    random = sorted(name for name in info["missing_keys"] if name not in saved)
    if random:
        warnings.warn(
            f"Neither '{base}' nor the adapter holds {random[0]}"
            f"{f' and {len(random) - 1} more weights' if random[1:] else ''}: they are random numbers in the merged "
            "model, and were others in training. Train again with their modules in modules_to_save.",
            stacklevel=4,
        )
    return whole_model(model)


def _trained_class(config: PeftConfig, settings: PretrainedConfig) -> Any:
    """The class that was trained, by the adapter; else the one that the base's files name."""
    noted = (config.auto_mapping or {}).get("base_model_class", "")
    if hasattr(transformers, noted):
        return getattr(transformers, noted)
    remote = getattr(settings, "auto_map", None) or {}
    task = TASKS.get(config.task_type, "")
    for auto, place in remote.items():
        if auto == task or (noted and str(place).endswith(f".{noted}")):
            return getattr(transformers, auto)
    if task and type(settings) in getattr(transformers, task)._model_mapping:
        return getattr(transformers, task)
    return model_class(settings)


def _labels(config: PeftConfig, settings: PretrainedConfig, shapes: dict[str, tuple[int, ...]]) -> list[str] | None:
    """The names of a classifier's classes where they aren't the base's; PEFT's other methods tell only how many."""
    noted = getattr(config, "labels", None)
    if noted or config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return noted
    heads = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items() if len(shape) == 2}
    names = [name for name in heads if name.startswith(TASK_HEADS) and name.endswith((*LAST_OF_HEAD,))]
    count = heads[names[0]][0] if len(names) == 1 else settings.num_labels
    return None if count == settings.num_labels else [f"LABEL_{number}" for number in range(count)]


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(adapter / ADAPTER, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _add_tokens(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give `model` the rows of tokens that were added in training, where the adapter holds larger embeddings."""
    embeddings = embedding_modules(model)[0]
    if not isinstance(embeddings, nn.Embedding):
        return
    place = f"{PEFT_PREFIX}{next(name for name, module in model.named_modules() if module is embeddings)}."
    width = embeddings.embedding_dim
    saved = [shape[0] for name, shape in shapes.items() if name.startswith(place) and shape[1:] == (width,)]
    if max(saved, default=0) > embeddings.num_embeddings:
        model.resize_token_embeddings(max(saved), mean_resizing=False)


def _tokenizer(adapter: Path, base: str, options: dict[str, Any]) -> Any:
    """The adapter's tokenizer or the base's; None for a base that has none, as models of images."""
    where = str(adapter) if (adapter / TOKENIZER).is_file() else base
    if where == base and _file(TOKENIZER, adapter, base, options) is None and _has_processor(adapter, base, options):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        hint = newer_tokenizer(error) or ""
        raise KappaTuneError(f"Can't load the tokenizer from '{where}': {error} {hint}".rstrip()) from error


def _has_processor(adapter: Path, base: str, options: dict[str, Any]) -> bool:
    return any(_file(name, adapter, base, options) for name in PROCESSOR_FILES)


def _file(name: str, adapter: Path, base: str, options: dict[str, Any]) -> Path | None:
    """A file of the adapter, else of the base's folder or repository; None if neither has it."""
    if (adapter / name).is_file():
        return adapter / name
    if Path(base).is_dir():
        return Path(base, name) if Path(base, name).is_file() else None
    found = cached_file(base, name, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _say_rounding(tuned: PeftModel) -> None:
    """Warn if the base's dtype can't hold what was trained: at small learning rates hardly an update is left."""
    from kappatune_plugin.tuner.model import KappaTuneModel

    if not isinstance(tuned.base_model, KappaTuneModel):
        return
    layers = tuned.base_model.layers()
    update = error = 0.0
    for layer in layers:
        trained = layer.active.whole().double()
        update += (trained - layer.original.whole(layer.parameter).double()).square().sum().item()
        error += (trained - layer.block.double()).square().sum().item()
    share = (error / update) ** 0.5 if update else 0.0
    if share > ROUNDING_SAID:
        kept, written = (str(each.dtype).removeprefix("torch.") for each in (layers[0].leaves[0], layers[0].parameter))
        warnings.warn(
            f"The values were trained in {kept} and the checkpoint is in {written}: rounding changes what was trained "
            f"by {share:.0%} of its size (root mean square). To keep it add --dtype {kept}.",
            stacklevel=3,
        )
