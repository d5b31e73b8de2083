"""What the versions of other packages mean for this one."""

from importlib.metadata import version


def newer_tokenizer(error: Exception) -> str | None:
    """What to do if `error` says that a tokenizer is of transformers 5 and this is transformers 4; else None."""
    if "TokenizersBackend" not in str(error) or not version("transformers").startswith("4."):
        return None
    return (
        f"transformers 5 saved it and transformers {version('transformers')} is installed, which doesn't know that "
        'class. Write "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, or install '
        "transformers 5."
    )
