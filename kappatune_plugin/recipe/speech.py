"""A recipe with the block `audio:`: what can't go beside it, and its recordings, collator and test."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import AutoProcessor

from kappatune_plugin.data.rows import load_all_rows
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.speech.recordings import speech_rows
from kappatune_plugin.speech.word_errors import SpeechTask, normalizer


def recordings(recipe: Recipe, part: str) -> Dataset:
    """The checked rows of `data.train`, `data.validation` or `data.test`: recording and transcript.

    Raises:
        KappaTuneError: rows that can't be loaded, or something wrong with one of them.
    """
    spec: Any = recipe.data[part]
    return speech_rows(load_all_rows(spec, f"data.{part}", recipe.folder), recipe.audio, f"data.{part}", recipe.folder)


def collator_of(recipe: Recipe, processor: Any = None) -> SpeechCollator:
    """What makes batches of the recipe's recordings, by the model's own processor.

    Raises:
        KappaTuneError: a model without a processor of recordings, or a prompt or rate that isn't its.
    """
    name = recipe.model_args.model_name_or_path
    if processor is None:
        options: Mapping[str, Any] = {"revision": recipe.model_args.model_revision}
        try:
            processor = AutoProcessor.from_pretrained(name, **options)
        except (OSError, ValueError, ImportError) as error:
            raise KappaTuneError(f"Can't load the processor of '{name}': {error}") from error
    return SpeechCollator.build(processor, recipe.audio.prompt, recipe.audio.sampling_rate, name)


def speech_task(recipe: Recipe, test: Dataset | None) -> SpeechTask | None:
    """What word errors are counted on; None without the block `audio` or test rows. Raises what `collator_of` does."""
    if recipe.audio is None or test is None:
        return None
    batch_size = recipe.forgetting.batch_size if recipe.forgetting else 8
    settings = normalizer(recipe.audio.normalizer), batch_size, recipe.audio.max_new_tokens
    return SpeechTask(collator_of(recipe), test, *settings)
