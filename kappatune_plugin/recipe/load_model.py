"""The base model and the tokenizer that a recipe names."""

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer
from trl import get_quantization_config
from trl.trainer.utils import create_model_from_path

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.recipe import Recipe
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

    Raises:
        KappaTuneError: it can't be loaded.
    """
    name, options = trained or recipe.model_args.model_name_or_path, model_init_kwargs(recipe)
    if trained is not None:
        del options["revision"]
    try:
        return create_model_from_path(name, **options)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        # TypeError: model_init_kwargs that no model has
        raise cannot_load(name, error) from error


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
        KappaTuneError: the recipe's `model_init_kwargs` are no mapping.
    """
    args, model = recipe.training_args, recipe.model_args
    if not isinstance(args.model_init_kwargs, dict | None):
        raise KappaTuneError(f"model_init_kwargs: {args.model_init_kwargs!r} is not a mapping.")
    if wrong := [key for key in args.model_init_kwargs or {} if not isinstance(key, str)]:
        raise KappaTuneError(f"model_init_kwargs: has the key {wrong[0]!r}; keys are names. Delete it.")
    quantization = get_quantization_config(model)
    return {
        **({"quantization_config": quantization} if quantization else {}),
        "revision": model.model_revision,
        "trust_remote_code": _trusts_remote_code(recipe),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
