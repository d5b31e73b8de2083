"""How many words a model hears wrong: it writes what was said, and jiwer counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.speech.collator import SpeechCollator
from kappatune_plugin.speech.recordings import INSTALL, TRANSCRIPT


@dataclass(frozen=True)
class WordErrors:
    """Errors over all recordings together, so that long ones count for more.

    Attributes:
        wer: (substitutions + deletions + insertions) / words said; may be above 1.
        cer: the same for characters.
        substitutions, deletions, insertions: of words.
        words: said, in all.
    """

    wer: float
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    words: int


def normalizer(name: str) -> Callable[[str], str]:
    """Whisper's normalizer `name`: "english" or "basic"; for "none" only spaces at the ends are cut.

    The English one is without its list of British spellings, which transformers doesn't bring along.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "english":
        return EnglishTextNormalizer({})
    return BasicTextNormalizer() if name == "basic" else str.strip


def word_errors(said: Sequence[str], heard: Sequence[str], normalize: Callable[[str], str]) -> WordErrors:
    """Count the errors of `heard` against `said`, both normalized.

    Raises:
        KappaTuneError: something said of which normalizing leaves nothing.
    """
    try:
        import jiwer
    except ImportError as error:
        raise KappaTuneError(INSTALL.replace("Recordings are read by soundfile and soxr", "jiwer counts")) from error
    references, hypotheses = [normalize(each) for each in said], [normalize(each) for each in heard]
    if "" in (each.strip() for each in references):
        raw = next(raw for raw, each in zip(said, references, strict=True) if not each.strip())
        raise KappaTuneError(
            f"The transcript {raw!r:.60} has no words once it is normalized. Leave the row out, or choose another "
            "audio.normalizer."
        )
    words = jiwer.process_words(references, hypotheses)
    total = words.hits + words.substitutions + words.deletions
    errors = words.substitutions, words.deletions, words.insertions
    return WordErrors(words.wer, jiwer.cer(references, hypotheses), *errors, total)


def transcribe(
    model: nn.Module,
    collator: SpeechCollator,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
    max_new_tokens: int = 128,
) -> list[str]:
    """What `model` writes for each recording, greedily.

    Call it in evaluation mode without gradients (`forgetting.measures.measuring`).
    """
    written, tokenizer = [], collator.processor.tokenizer
    end = tokenizer.eos_token_id
    for start in range(0, len(rows), batch_size):
        part = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        batch = {name: value.to(model.device) for name, value in collator.prompts(part).items()}
        with torch.no_grad():
            ids = model.generate(
                **batch, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end
            )
        written += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [each.strip() for each in written]


@dataclass
class SpeechTask:
    """Test recordings, and how what is heard in them is measured.

    Attributes:
        rows: as `speech_rows` gives them.
        normalize: see `normalizer`.
        written: what the model wrote in the last measurement.
    """

    collator: SpeechCollator
    rows: Sequence[Mapping[str, Any]]
    normalize: Callable[[str], str]
    batch_size: int = 8
    max_new_tokens: int = 128
    written: list[str] | None = None

    def measure(self, model: nn.Module) -> WordErrors:
        """Have `model` transcribe all recordings and count; in evaluation mode, as `transcribe`."""
        self.written = transcribe(model, self.collator, self.rows, self.batch_size, self.max_new_tokens)
        return word_errors([row[TRANSCRIPT] for row in self.rows], self.written, self.normalize)
