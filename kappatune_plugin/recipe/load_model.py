"""The base model and the tokenizer that a recipe names."""

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer
from trl import get_quantization_config
from trl.trainer.utils import create_model_from_path

from kappatune_plugin.console import console
from kappatune_plugin.distributed import ranks
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.weights.fused_experts import quantize_experts
from kappatune_plugin.weights.load_model import cannot_load


def tokenizer_error(recipe: Recipe) -> ValueError | None:
    """What keeps the tokenizer from loading: TRL up to 0.24 asks for a processor, whose error doesn't say it."""
    try:
        load_tokenizer(recipe)
    except ValueError as error:
        return error
    return None


def load_base(recipe: Recipe, trained: str | None = None) -> nn.Module:
    """The recipe's model, or one that was `trained` from it, as SFTTrainer loads it from its name.

    Where the recipe quantizes it, its fused experts are quantized too, and a line says what they take.

    Raises:
        KappaTuneError: it can't be loaded, or its experts can't be quantized.
    """
    name, options = trained or recipe.model_args.model_name_or_path, model_init_kwargs(recipe)
    if trained is not None:
        del options["revision"]
    try:
        model = create_model_from_path(name, **options)
    except (OSError, ValueError, TypeError, SafetensorError, ImportError) as error:
        # TypeError: model_init_kwargs that no model has; ImportError: quantization without its library
        raise cannot_load(name, error) from error
    if quantizes_experts(recipe):
        found = quantize_experts(model, options["quantization_config"])
        if found.parameters or found.left:
            console(quiet=ranks.rank() > 0).print(str(found), highlight=False, soft_wrap=True)
    return model


def quantizes_experts(recipe: Recipe) -> bool:
    """Whether fused experts are quantized too, if the recipe's model has any."""
    return recipe.quantize_experts and model_init_kwargs(recipe).get("quantization_config") is not None


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer."""
    model = recipe.model_args
    options = {"revision": model.model_revision, "trust_remote_code": _trusts_remote_code(recipe)}
    return AutoTokenizer.from_pretrained(model.model_name_or_path, **options)


def _trusts_remote_code(recipe: Recipe) -> bool:
    """TRL moved this key from ModelConfig to SFTConfig."""
    owners = (recipe.training_args, recipe.model_args)
    return any(getattr(owner, "trust_remote_code", False) for owner in owners)


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """How to load the recipe's model, as trl/scripts/sft.py gives it to `from_pretrained`.

    Raises:
        KappaTuneError: the recipe's `model_init_kwargs` are no mapping, or bitsandbytes is missing.
    """
    args, model = recipe.training_args, recipe.model_args
    if not isinstance(args.model_init_kwargs, dict | None):
        raise KappaTuneError(f"model_init_kwargs: {args.model_init_kwargs!r} is not a mapping.")
    if wrong := [key for key in args.model_init_kwargs or {} if not isinstance(key, str)]:
        raise KappaTuneError(f"model_init_kwargs: has the key {wrong[0]!r}; keys are names. Delete it.")
    try:
        quantization = get_quantization_config(model)
    except ImportError as error:
        raise KappaTuneError(
            f"load_in_4bit and load_in_8bit need bitsandbytes: {error}. Install it: pip install bitsandbytes."
        ) from error
    return {
        **({"quantization_config": quantization} if quantization else {}),
        "revision": model.model_revision,
        "trust_remote_code": _trusts_remote_code(recipe),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
