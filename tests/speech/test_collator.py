"""Batches of speech models: what has a label, and what does not."""

import pytest
import torch
from datasets import Dataset

from helpers.speech import MODELS, RATE, speech_model, tone, wav
from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech.collator import IGNORED, SpeechCollator
from kappatune_plugin.speech.word_errors import transcribe

ROWS = [
    {"recording": wav(tone("yes", 0.5)), "transcript": " yes"},
    {"recording": wav(tone("no", 0.9, 2 * RATE), 2 * RATE), "transcript": " no good bad"},
]


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_transcript_and_its_end_have_labels(kind):
    model, processor, prompt = speech_model(kind)
    collator = SpeechCollator.build(processor, prompt)
    batch = collator(ROWS)
    tokenizer = processor.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    asked = tokenizer("Say: ")["input_ids"] if kind != "voxtral" else [3]
    for row, ids, labels, mask in zip(ROWS, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        ids, labels, mask = ids.tolist(), labels.tolist(), mask.tolist()
        completion = [*tokenizer(row["transcript"])["input_ids"], tokenizer.eos_token_id]
        heard = ids.count(placeholder)
        before = asked + [placeholder] * heard + ([4] if kind == "voxtral" else [])
        padding = len(ids) - len(before) - len(completion)
        assert heard > 1 and ids[: len(ids) - padding] == before + completion
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
    model, collator = model.eval(), SpeechCollator.build(processor, prompt)
    alone = [transcribe(model, collator, [row], max_new_tokens=4)[0] for row in ROWS]
    assert transcribe(model, collator, Dataset.from_list(ROWS), batch_size=2, max_new_tokens=4) == alone
    if kind == "qwen2_audio":
        # by hand: the most likely token again and again
        ids = collator.prompts(ROWS[:1])
        inputs, written = dict(ids), []
        for _ in range(4):
            written.append(model(**inputs).logits[0, -1].argmax().item())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([written[-1:]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        end = processor.tokenizer.eos_token_id
        written = written[: written.index(end)] if end in written else written
        assert alone[0] == processor.tokenizer.decode(written, skip_special_tokens=True).strip()


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
