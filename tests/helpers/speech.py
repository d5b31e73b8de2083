"""Tiny speech models of transformers' audio-text-to-text family, and seconds of made-up sound."""

import atexit
import importlib.util
import io
import json
import shutil
from base64 import b64encode
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    LlamaConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank
from transformers.models.granite_speech import feature_extraction_granite_speech as granite

from helpers.tiny import tiny_tokenizer

HAS_MISTRAL = importlib.util.find_spec("mistral_common") is not None
RATE = 8000
MODELS = (
    "qwen2_audio",
    "granite_speech",
    "audioflamingo3",
    pytest.param("voxtral", marks=pytest.mark.skipif(not HAS_MISTRAL, reason="mistral-common isn't installed")),
)
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
    """A random model of one of MODELS, its own processor and a prompt for it.

    Granite's processor needs torchaudio, or `play_torchaudio`.
    """
    torch.manual_seed(0)
    model, processor, prompt = globals()[f"_{kind}"]()
    return sharpened(model), processor, prompt


def _parts(audio_token: str) -> tuple[Any, int, LlamaConfig]:
    """A tokenizer, the id in it of a recording's placeholder, and the config of a text model with its words."""
    tokenizer = tokenizer_with(audio_token)
    text = LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)})
    return tokenizer, tokenizer.convert_tokens_to_ids(audio_token), text


def _qwen2_audio() -> tuple[PreTrainedModel, Any, str]:
    tokenizer, token, text = _parts("<|AUDIO|>")
    extractor = WhisperFeatureExtractor(16, RATE, hop_length=320, chunk_length=2, n_fft=256)
    config = Qwen2AudioConfig(audio_config=EARS, text_config=text, audio_token_index=token)
    return Qwen2AudioForConditionalGeneration(config), Qwen2AudioProcessor(extractor, tokenizer), "Say: <|AUDIO|>"


def _granite_speech() -> tuple[PreTrainedModel, Any, str]:
    tokenizer, token, text = _parts("<|audio|>")
    # as it is by default: transformers forgets other sizes when it saves one. Two spectra of 80 numbers are a frame
    extractor = GraniteSpeechFeatureExtractor()
    encoder = {"input_dim": 2 * 80, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 5}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = GraniteSpeechConfig(
        encoder_config={**encoder, "context_size": 50, "max_pos_emb": 64},
        projector_config={**small, "encoder_hidden_size": 16, "model_type": "blip_2_qformer"},
        text_config=text,
        audio_token_index=token,
        has_lora_adapter=False,
    )
    return GraniteSpeechForConditionalGeneration(config), GraniteSpeechProcessor(extractor, tokenizer), "Say: <|audio|>"


def _audioflamingo3() -> tuple[PreTrainedModel, Any, str]:
    tokenizer, token, text = _parts("<sound>")
    extractor = WhisperFeatureExtractor(16, RATE, hop_length=320, chunk_length=2, n_fft=256)
    config = AudioFlamingo3Config(audio_config=EARS, text_config=text, audio_token_id=token)
    processor = AudioFlamingo3Processor(extractor, tokenizer)
    return AudioFlamingo3ForConditionalGeneration(config), processor, "Say: <sound>"


def _voxtral() -> tuple[PreTrainedModel, Any, str]:
    """30 seconds at a time and 16000 samples a second are fixed in its processor."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokenizer = MistralCommonBackend(_tekken())
    # 4 frames are one token
    four = {"num_mel_bins": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VoxtralConfig(
        audio_config={**four, "intermediate_size": 4 * 16},
        text_config=LlamaConfig(**{**TEXT, "vocab_size": tokenizer.vocab_size}),
        audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]"),
    )
    return VoxtralForConditionalGeneration(config), VoxtralProcessor(WhisperFeatureExtractor(16), tokenizer), "en"


@cache
def _tekken() -> Path:
    """The file of a tokenizer of bytes as Voxtral has it: special tokens have the places that its processor knows."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    special = {place: f"<SPECIAL_{place}>" for place in range(40)}
    special |= {token["rank"]: token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    special |= {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 296, "default_num_special_tokens": 40}
    spectra = {"num_mel_bins": 16, "hop_length": 160, "window_size": 400}
    content = {
        "config": {"pattern": r"\w+|\W+", "version": "v7", **sizes},
        "vocab": [
            {"rank": byte, "token_bytes": b64encode(bytes([byte])).decode(), "token_str": None} for byte in range(256)
        ],
        "special_tokens": [
            {"rank": place, "token_str": special[place], "is_control": True} for place in sorted(special)
        ],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": spectra,
            "chunk_length_s": 30.0,
        },
    }
    path = Path(mkdtemp(prefix="kappatune-tests-")) / "tekken.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    atexit.register(shutil.rmtree, path.parent)
    return path


class MelSpectrogram(nn.Module):
    """torchaudio's, as Granite's feature extractor uses it; its wheels don't load beside a torch for CPUs."""

    def __init__(self, sample_rate: int, n_fft: int, win_length: int, hop_length: int, n_mels: int) -> None:
        super().__init__()
        self.settings = {"n_fft": n_fft, "hop_length": hop_length, "win_length": win_length}
        self.settings["window"] = torch.hann_window(win_length)
        filters = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate)
        self.filters = torch.from_numpy(filters).float()

    def forward(self, samples: Tensor) -> Tensor:
        """(rows, samples) in, (rows, mels, frames) out."""
        return self.filters.T @ torch.stft(samples, **self.settings, return_complex=True).abs() ** 2


def play_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Granite's feature extractor run where torchaudio isn't."""
    if importlib.util.find_spec("torchaudio") is None:
        played = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
        monkeypatch.setattr(granite, "torchaudio", played, raising=False)
        monkeypatch.setattr(granite, "requires_backends", lambda *given: None)


def save_speech(folder: Path, kind: str = "qwen2_audio") -> Path:
    """`speech_model` and its processor, as files in `folder`."""
    for each in speech_model(kind)[:2]:
        each.save_pretrained(folder)
    return folder
