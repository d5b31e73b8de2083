"""The block `audio:` of a recipe."""

from typing import Literal

from pydantic import Field

from kappatune_plugin.schema import Block, Whole


class AudioBlock(Block):
    """The block `audio:` of a recipe: where recordings and their transcripts are, and what the model is asked."""

    column: str = Field(
        default="audio",
        min_length=1,
        description="The column of the recordings: of `datasets.Audio`, or of names of files (.wav, .flac, .ogg, "
        ".mp3).",
    )
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="Where the files are that the column names. Default: the recipe's folder.",
    )
    transcript: str = Field(default="text", min_length=1, description="The column of what was said.")
    prompt: str = Field(
        min_length=1,
        description="What the model is given, with its placeholder of the recording where that goes. A model whose "
        "processor has a form of its own for transcription (Voxtral) gets that, and this is the name of the language.",
        examples=['`prompt: "<|audio_bos|><|AUDIO|><|audio_eos|>What was said?"`'],
    )
    sampling_rate: Whole | None = Field(
        default=None,
        ge=1,
        description="What the model's processor expects, checked against it. Recordings at other rates are resampled. "
        "Default: what the processor says.",
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="Refuse longer recordings. Default: no limit but the processor's."
    )
    max_new_tokens: Whole = Field(
        default=128, ge=1, description="At most so many tokens are written for a test recording."
    )
    normalizer: Literal["english", "basic", "none"] = Field(
        default="english",
        description="What is made equal before words are counted: Whisper's English normalizer (also numbers: "
        "'seven two' becomes 72), its basic one (case and punctuation), or nothing.",
    )
