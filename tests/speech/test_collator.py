"""Batches of speech models: what has a label, and what does not."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from helpers.speech import MODELS, RATE, speech_model, tone, wav
from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech import collator
from kappatune_plugin.speech.collator import IGNORED, SpeechCollator
from kappatune_plugin.speech.word_errors import transcribe

ROWS = [
    {"recording": wav(tone("yes", 0.5)), "transcript": " yes"},
    {"recording": wav(tone("no", 0.9, 2 * RATE), 2 * RATE), "transcript": " no good bad"},
]
# by hand, of 0.5 and 0.9 seconds. Qwen2-Audio and Audio Flamingo: 25 spectra a second, of two begun 1 frame, of two
# whole frames 1 token; Granite: 50 frames a second, of each 15 begun 3 tokens; Voxtral: 12.5 a second, of 30 seconds
PLACEHOLDERS = {
    "qwen2_audio": {" yes": 3, " no good bad": 6},
    "audioflamingo3": {" yes": 3, " no good bad": 6},
    "granite_speech": {" yes": 6, " no good bad": 9},
    "voxtral": {" yes": 375, " no good bad": 375},
}


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_transcript_and_its_end_have_labels(kind):
    model, processor, prompt = speech_model(kind)
    batch = SpeechCollator.build(processor, prompt)(ROWS)
    tokenizer = processor.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids(processor.audio_token)
    if kind == "voxtral":
        # <s> [INST] [BEGIN_AUDIO] recording [/INST] lang:en [TRANSCRIBE], letters after 40 special tokens
        asked, after = [1, 3, 25], [4, *(40 + letter for letter in b"lang:en"), 34]
    else:
        asked, after = tokenizer("Say: ")["input_ids"], []
    for row, ids, labels, mask in zip(ROWS, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        ids, labels, mask = ids.tolist(), labels.tolist(), mask.tolist()
        completion = [*tokenizer(row["transcript"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        heard = PLACEHOLDERS[kind][row["transcript"]]
        before = asked + [placeholder] * heard + after
        padding = len(ids) - len(before) - len(completion)
        assert padding >= 0 and ids[: len(ids) - padding] == before + completion
        assert labels == [IGNORED] * len(before) + completion + [IGNORED] * padding
        assert mask == [1] * (len(ids) - padding) + [0] * padding
    found = model(**batch)
    # by hand: the mean over labels of what is predicted before each
    scores = found.logits[:, :-1].log_softmax(-1)
    places = (batch["labels"][:, 1:] != IGNORED).nonzero().tolist()
    nats = [-scores[row, place, batch["labels"][row, place + 1]] for row, place in places]
    assert found.loss.item() == pytest.approx(torch.stack(nats).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_transcribed_as_each_recording_alone(kind):
    model, processor, prompt = speech_model(kind)
    listen = SpeechCollator.build(processor, prompt)
    alone = [transcribe(model, listen, [row], max_new_tokens=4)[0] for row in ROWS]
    assert transcribe(model, listen, Dataset.from_list(ROWS), batch_size=2, max_new_tokens=4) == alone
    if kind == "qwen2_audio":
        # by hand: the most likely token again and again
        ids = listen.prompts(ROWS[:1])
        inputs, written = dict(ids), []
        for _ in range(4):
            written.append(model(**inputs).logits[0, -1].argmax().item())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([written[-1:]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        end = processor.tokenizer.eos_token_id
        written = written[: written.index(end)] if end in written else written
        assert alone[0] == processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_a_processor_without_its_package_says_which(monkeypatch):
    processor = SimpleNamespace(
        feature_extractor=SimpleNamespace(sampling_rate=RATE),
        apply_transcription_request=lambda audio, model_id, language: None,
    )
    monkeypatch.setattr(collator, "find_spec", lambda package: None)
    with pytest.raises(KappaTuneError, match="by mistral-common, which isn't installed: pip install mistral-common"):
        SpeechCollator.build(processor, "en")


def test_what_does_not_fit_the_processor_is_said():
    _, processor, _ = speech_model("qwen2_audio")
    with pytest.raises(KappaTuneError, match=r"has no <\|AUDIO\|>, the place of the recording"):
        SpeechCollator.build(processor, "What was said?")
    with pytest.raises(KappaTuneError, match="has 2 <"):
        SpeechCollator.build(processor, "<|AUDIO|><|AUDIO|>")
    with pytest.raises(KappaTuneError, match="sampling_rate: 16000 is given, and the model's processor expects 8000"):
        SpeechCollator.build(processor, "<|AUDIO|>", 16000)
    with pytest.raises(KappaTuneError, match="takes no recordings"):
        SpeechCollator.build(processor.tokenizer, "<|AUDIO|>")
    processor.tokenizer.eos_token = None
    with pytest.raises(KappaTuneError, match="no end token"):
        SpeechCollator.build(processor, "<|AUDIO|>")
