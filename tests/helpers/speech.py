"""Tiny speech models of transformers' audio-text-to-text family, and seconds of made-up sound."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import (
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

from helpers.tiny import tiny_tokenizer

RATE = 8000
MODELS = ("qwen2_audio", "granite_speech", "voxtral")
WORDS = ("yes", "no", "good", "bad")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "eos_token_id": 2,
}
EARS = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "max_source_positions": 25,
}


def tone(word: str, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A sound of its own for each of WORDS."""
    pitch = 200 * 2 ** WORDS.index(word)
    return np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate).astype(np.float32) / 2


def wav(samples: np.ndarray, rate: int = RATE) -> dict[str, Any]:
    """As `datasets.Audio(decode=False)` has it."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def write_recordings(folder: Path, count: int = 8) -> list[dict[str, str]]:
    """Files of .wav and .flac in `folder`, at two rates; rows with their names and transcripts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        word, rate = WORDS[number % len(WORDS)], (RATE, 2 * RATE)[number % 2]
        name = f"{number}.{('wav', 'flac')[number // 2 % 2]}"
        soundfile.write(folder / name, tone(word, 0.4 + 0.05 * number, rate), rate)
        rows.append({"audio": name, "text": f" {word}"})
    return rows


def tokenizer_with(audio_token: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]})
    return tokenizer


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with larger weights than transformers begins with: one that knows something and can be taught."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    return model.eval()


def speech_model(kind: str) -> tuple[PreTrainedModel, Any, str]:
    """A random model of one of MODELS, its processor and a prompt for it.

    Granite's own processor needs torchaudio and Voxtral's mistral-common: theirs are played by stand-ins that make
    the same inputs.
    """
    torch.manual_seed(0)
    tokenizer = tokenizer_with("<|AUDIO|>")
    token = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    text = LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)})
    if kind == "qwen2_audio":
        extractor = WhisperFeatureExtractor(16, RATE, hop_length=320, chunk_length=2, n_fft=256)
        config = Qwen2AudioConfig(audio_config=EARS, text_config=text, audio_token_index=token)
        processor = Qwen2AudioProcessor(extractor, tokenizer)
        return sharpened(Qwen2AudioForConditionalGeneration(config)), processor, "Say: <|AUDIO|>"
    if kind == "granite_speech":
        encoder = {"input_dim": 8, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 5}
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = GraniteSpeechConfig(
            encoder_config={**encoder, "context_size": 50, "max_pos_emb": 64},
            projector_config={**small, "encoder_hidden_size": 16, "model_type": "blip_2_qformer"},
            text_config=text,
            audio_token_index=token,
            has_lora_adapter=False,
        )
        return sharpened(GraniteSpeechForConditionalGeneration(config)), GraniteLike(tokenizer), "Say: <|AUDIO|>"
    audio = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_mel_bins": 16,
        "max_source_positions": 48,
    }
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=token)
    return sharpened(VoxtralForConditionalGeneration(config)), VoxtralLike(tokenizer, token), "en"


def save_speech(folder: Path, kind: str = "qwen2_audio") -> Path:
    """`speech_model` and its processor, as files in `folder`."""
    for each in speech_model(kind)[:2]:
        each.save_pretrained(folder)
    return folder


class GraniteLike:
    """Makes the inputs that GraniteSpeechProcessor makes, of samples instead of mel spectra."""

    audio_token, frame, window, queries = "<|AUDIO|>", 160, 15, 3

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.audio_processor = tokenizer, SimpleNamespace(sampling_rate=RATE)

    def __call__(self, text: list[str], audio: list[np.ndarray], padding: bool, return_tensors: str) -> dict[str, Any]:
        frames = [len(each) // self.frame for each in audio]
        features = torch.zeros(len(audio), max(frames), 8)
        for row, (sound, count) in enumerate(zip(audio, frames, strict=True)):
            cut = torch.from_numpy(sound[: count * self.frame]).reshape(count, 8, -1)
            features[row, :count] = cut.abs().mean(-1)
        sizes = [-(-count // self.window) * self.queries for count in frames]
        text = [each.replace(self.audio_token, self.audio_token * n) for each, n in zip(text, sizes, strict=True)]
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        tokens = self.tokenizer(text, padding=padding, return_tensors=return_tensors)
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "input_features": features,
            "input_features_mask": mask,
        }


class VoxtralLike:
    """Makes the inputs that VoxtralProcessor.apply_transcription_request makes."""

    audio_token = "<|AUDIO|>"

    def __init__(self, tokenizer: Any, token: int) -> None:
        self.tokenizer, self.token = tokenizer, token
        self.feature_extractor = WhisperFeatureExtractor(16, RATE, hop_length=320, chunk_length=1, n_fft=256)

    def apply_transcription_request(
        self, audio: list[np.ndarray], model_id: str, language: str, sampling_rate: int, format: list[str]
    ) -> dict[str, torch.Tensor]:
        """A prompt of its own around a fixed number of placeholders."""
        made = [np.resize(each, (96, 16)).T for each in audio]
        ids = torch.tensor([[3, *[self.token] * 12, 4]] * len(audio))
        features = torch.from_numpy(np.stack(made))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}
