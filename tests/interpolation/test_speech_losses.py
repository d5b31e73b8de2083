"""The losses of transcripts, recording by recording, and how often recordings are read for them."""

from collections import Counter

import pytest
import torch

from helpers.speech import MODELS, WORDS, play_torchaudio, speech_model, tone, wav
from kappatune_plugin.interpolation import speech_losses
from kappatune_plugin.interpolation.speech_losses import speech_texts
from kappatune_plugin.speech.collator import IGNORED, SpeechCollator

LENGTHS = (0.5, 0.9, 0.5, 0.7, 0.7)
ROWS = [
    {"recording": wav(tone(WORDS[number % 4], seconds)), "transcript": " " + " ".join(WORDS[: number % 3 + 1])}
    for number, seconds in enumerate(LENGTHS)
]


class Counting(SpeechCollator):
    """Counts how often each recording is read."""

    def __call__(self, rows):
        seen.update(row["transcript"] for row in rows)
        return super().__call__(rows)


seen: Counter = Counter()


def by_hand(model, collator, row) -> float:
    """Summed nats of one transcript, read alone."""
    batch = collator([row])
    with torch.no_grad():
        scores = model(**batch).logits[0, :-1].log_softmax(-1)
    return -sum(
        float(scores[place, label]) for place, label in enumerate(batch["labels"][0, 1:].tolist()) if label != IGNORED
    )


@pytest.mark.parametrize("kept", ["all", "two", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_of_each_recording_alone_and_it_is_read_once(kind, kept, monkeypatch):
    play_torchaudio(monkeypatch)
    model, processor, prompt = speech_model(kind)
    collator = Counting.build(processor, prompt)
    expected = [by_hand(model, collator, row) for row in ROWS]
    sizes = [sum(value.nbytes for value in collator([row]).values()) for row in ROWS]
    limit = {"all": sum(sizes), "two": sum(sizes[:2]), "none": 0}[kept]
    monkeypatch.setattr(speech_losses, "KEPT", limit)
    seen.clear()
    texts = speech_texts(model, collator, ROWS, batch_size=2)
    for places in ([0, 1, 2, 3, 4], [3, 1, 0], [4, 3], [2]):
        found = texts.nats(places)
        assert found.requires_grad
        assert found.tolist() == pytest.approx([expected[place] for place in places], rel=1e-4)
    assert texts.take([4, 2]).measured().tolist() == pytest.approx([expected[4], expected[2]], rel=1e-4)
    # the rows are read 5 times to count their tokens, and 13 times more where nothing is kept
    assert sum(seen.values()) == {"all": 5, "two": 5 + 9, "none": 5 + 13}[kept]
    labels = [collator([row])["labels"][0] for row in ROWS]
    assert texts.tokens == [int((each != IGNORED).sum()) for each in labels]
    assert texts.lengths == [len(each) for each in labels]
