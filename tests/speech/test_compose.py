"""A speech model made of an encoder and a text model."""

import pytest
import torch

from helpers.speech import speech_model
from helpers.tiny import tiny_model, tiny_tokenizer
from kappatune_plugin import KappaTuneError
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.speech.compose import compose


@pytest.mark.parametrize(("kind", "encoder"), [("qwen2_audio", "audio_tower"), ("granite_speech", "encoder")])
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
