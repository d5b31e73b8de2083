"""Rows of recordings and transcripts in, batches of a speech model out."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kappatune_plugin.data.examples import IGNORED
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.speech.recordings import RECORDING, TRANSCRIPT, rate_of, read


def writes_prompt(processor: Any) -> bool:
    """Whether `processor` takes no prompt with a placeholder, only the name of a language, as Voxtral's.

    Many have an `apply_transcription_request`; only Voxtral's asks which model the request is for.
    """
    request = getattr(processor, "apply_transcription_request", None)
    return request is not None and "model_id" in inspect.signature(request).parameters


@dataclass
class SpeechCollator:
    """Makes batches for transformers' speech models (audio-text-to-text).

    A row is the prompt with the recording in it, the transcript, and an end token. Only transcript and end token have
    labels: processors leave the prompt, the recording's placeholders and the padding to who calls them.

    Attributes:
        processor: the model's own.
        prompt: with the processor's placeholder; the name of the language for a processor that writes its own prompt
            (Voxtral's).
        sampling_rate: of the samples that the processor expects, per second.
        model_id: told to a processor that writes its own prompt.
    """

    processor: Any
    prompt: str
    sampling_rate: int
    model_id: str = ""

    @classmethod
    def build(
        cls, processor: Any, prompt: str, sampling_rate: int | None = None, model_id: str = ""
    ) -> "SpeechCollator":
        """Check `prompt` and `sampling_rate` against the processor.

        Raises:
            KappaTuneError: another rate, a prompt without its placeholder or with several, no end token, or a processor
                that lacks a package.
        """
        rate = rate_of(processor, sampling_rate)
        if writes_prompt(processor) and find_spec("mistral_common") is None:
            raise KappaTuneError(
                f"{type(processor).__name__} writes its prompts by mistral-common, which isn't installed: "
                "pip install mistral-common"
            )
        if processor.tokenizer.eos_token_id is None:
            raise KappaTuneError("The tokenizer has no end token, so the model can't learn where a transcript ends.")
        if not writes_prompt(processor):
            found = prompt.count(processor.audio_token)
            if found != 1:
                raise KappaTuneError(
                    f"audio.prompt: {prompt!r} has {found or 'no'} {processor.audio_token}, the place of the recording "
                    f'in this model; expected one. Write such as "{processor.audio_token}What was said?".'
                )
        return cls(processor, prompt, rate, model_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch to train on, padded on the right: what the processor makes, and `labels` (rows, length).

        Raises:
            KappaTuneError: a recording that can't be read.
        """
        batch = self.prompts(rows)
        pad, eos = self.padding, self.processor.tokenizer.eos_token_id
        ids, labels = [], []
        prompts = zip(batch.pop("input_ids"), batch.pop("attention_mask"), rows, strict=True)
        for prompt, mask, row in prompts:
            completion = torch.tensor([*self._ids(row[TRANSCRIPT]), eos])
            ids.append(torch.cat([prompt[mask.bool()], completion]))
            labels.append(torch.cat([torch.full_like(prompt[mask.bool()], IGNORED), completion]))
        padded = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(each) for each in ids])
        batch["input_ids"] = padded(ids, batch_first=True, padding_value=pad)
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        batch["labels"] = padded(labels, batch_first=True, padding_value=IGNORED)
        return batch

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Only what the model is given, padded on the left, as for `generate`."""
        sounds = [read(row[RECORDING], self.sampling_rate) for row in rows]
        if writes_prompt(self.processor):
            settings = {"language": self.prompt, "model_id": self.model_id, "sampling_rate": self.sampling_rate}
            made = self.processor.apply_transcription_request(audio=sounds, format=["WAV"] * len(rows), **settings)
        else:
            self.processor.tokenizer.padding_side = "left"
            settings = {"padding": True}
            if hasattr(self.processor, "feature_extractor"):
                # of the text: how far recordings are padded is the processor's affair
                settings = {"text_kwargs": settings, "sampling_rate": self.sampling_rate}
            made = self.processor(text=[self.prompt] * len(rows), audio=sounds, return_tensors="pt", **settings)
        return dict(made)

    @property
    def padding(self) -> int:
        """The token that fills up rows: the tokenizer's, or the end token."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _ids(self, transcript: str) -> list[int]:
        return self.processor.tokenizer(transcript, add_special_tokens=False)["input_ids"]
