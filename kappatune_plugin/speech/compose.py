"""A speech model of transformers made of an encoder and a text model that didn't know one another.

    python -m kappatune_plugin.speech.compose SPEECH_MODEL TEXT_MODEL FOLDER

The encoder and the processor's ears are those of the speech model, the text model and its words are the other's, and
the projector between them is new: what stage 1 trains.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.speech.collator import writes_prompt

ENCODERS = ("encoder", "audio_tower")


def compose(speech: Any, speech_processor: Any, text: Any, tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """The composed model and its processor.

    Args:
        speech: a model of transformers' audio-text-to-text family; its encoder is taken.
        text: a causal language model; all of its weights are taken.
        tokenizer: of `text`; gets the special tokens of the speech model's recordings.
        seed: of the new projector.

    Raises:
        KappaTuneError: a speech model whose encoder isn't known, or whose processor knows only its own tokenizer.
    """
    if writes_prompt(speech_processor):
        raise KappaTuneError(
            f"{type(speech_processor).__name__} writes prompts in its own tokenizer's tokens, so it can't go with "
            "another text model. Give another speech model, such as Qwen/Qwen2-Audio-7B."
        )
    name = next((each for each in ENCODERS if hasattr(speech.model, each)), None)
    if name is None:
        raise KappaTuneError(f"{type(speech).__name__} has no {' or '.join(ENCODERS)}: give another speech model.")
    processor = copy.copy(speech_processor)
    tokens = [getattr(processor, f"audio_{part}token", None) for part in ("", "bos_", "eos_")]
    tokenizer.add_special_tokens({"additional_special_tokens": [each for each in tokens if each is not None]})
    processor.tokenizer = tokenizer
    processor.audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
    config = copy.deepcopy(speech.config)
    config.text_config = copy.deepcopy(text.config)
    config.audio_token_id, config.has_lora_adapter = processor.audio_token_id, False
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    torch.manual_seed(seed)
    model = type(speech)._from_config(config, dtype=text.dtype)
    getattr(model.model, name).load_state_dict(getattr(speech.model, name).state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    if len(tokenizer) > config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config = copy.deepcopy(text.generation_config)
    return model, processor


def main() -> None:
    """Compose two models of the hub, or of folders, and save them as one; what goes wrong ends it with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech_model")
    parser.add_argument("text_model")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.folder.is_dir() and any(args.folder.iterdir()):
        sys.exit(f"Error: '{args.folder}' isn't empty: give another folder, or delete it.")
    try:
        parts = compose(*_loaded(_speech_model, args.speech_model), *_loaded(_text_model, args.text_model))
    except KappaTuneError as error:
        sys.exit(f"Error: {error}")
    for each in parts:
        each.save_pretrained(args.folder)


def _loaded(load: Callable[[str], tuple[Any, Any]], name: str) -> tuple[Any, Any]:
    try:
        return load(name)
    except (OSError, ValueError, ImportError) as error:
        raise KappaTuneError(f"Can't load '{name}': {error}") from error


def _speech_model(name: str) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    if not hasattr(transformers, architecture):
        raise KappaTuneError(f"'{name}' is no model of transformers: its config names {architecture or 'none'}.")
    return getattr(transformers, architecture).from_pretrained(name, dtype="auto"), AutoProcessor.from_pretrained(name)


def _text_model(name: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    main()
