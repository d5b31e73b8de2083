"""A speech model made of an encoder and a text model."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor

from helpers.speech import save_speech, speech_model
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.speech.compose import compose, main
from kappatune_plugin.weights.load_model import load_model

KINDS = [("qwen2_audio", "audio_tower"), ("granite_speech", "encoder"), ("audioflamingo3", "audio_tower")]


@pytest.mark.parametrize(("kind", "encoder"), KINDS)
def test_text_and_ears_are_what_they_were(kind, encoder):
    speech, processor, prompt = speech_model(kind)
    tokenizer = tiny_tokenizer()
    text = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    model, processor = compose(speech, processor, text, tokenizer)
    ids = torch.arange(3, 33).reshape(3, 10)
    with torch.no_grad():
        heard = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(heard[..., : len(tokenizer) - 3], text(input_ids=ids).logits[..., : len(tokenizer) - 3])
    ears, before = (getattr(each.model, encoder).state_dict() for each in (model, speech))
    assert all(torch.equal(ears[name], before[name]) for name in before)
    row = {"recording": {"array": torch.randn(4000).numpy(), "sampling_rate": 8000}, "transcript": " yes"}
    loss = model(**SpeechCollator.build(processor, prompt)([row])).loss
    assert 0 < loss.item() < 50


def test_a_text_model_has_no_ears():
    text = tiny_model("llama")
    with pytest.raises(KappaTuneError, match="LlamaForCausalLM has no encoder or audio_tower"):
        compose(text, None, text, None)


def test_a_processor_that_knows_only_its_own_words_is_refused():
    processor = SimpleNamespace(apply_transcription_request=lambda audio, model_id, language: None)
    with pytest.raises(KappaTuneError, match="writes prompts in its own tokenizer's tokens"):
        compose(SimpleNamespace(model=SimpleNamespace(audio_tower=None)), processor, None, None)


def test_two_folders_become_one(tmp_path, monkeypatch):
    speech, text, tokenizer = save_speech(tmp_path / "speech"), tmp_path / "text", tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(text)
    tokenizer.save_pretrained(text)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["compose", *map(str, words)])
        main()

    run(speech, text, tmp_path / "both")
    both, parts = load_model(str(tmp_path / "both")), [load_model(str(each)) for each in (speech, text)]
    for found, part in zip(
        (both.model.audio_tower, both.model.language_model.layers),
        (parts[0].model.audio_tower, parts[1].model.layers),
        strict=True,
    ):
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in found.state_dict().items())
    SpeechCollator.build(AutoProcessor.from_pretrained(tmp_path / "both"), "<|AUDIO|>")
    for words, said in (
        ((speech, text, tmp_path / "both"), "Error: '.*both' isn't empty: give another folder, or delete it"),
        ((speech, tmp_path / "nowhere", tmp_path / "new"), "Error: Can't load '.*nowhere': "),
        ((text, text, tmp_path / "new"), "Error: LlamaForCausalLM has no encoder or audio_tower"),
    ):
        with pytest.raises(SystemExit, match=said):
            run(*words)
    assert not (tmp_path / "new").exists()
