"""Advice for errors that depend on the versions of other packages."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def newer_tokenizer(error: Exception) -> str | None:
    """What to do if `error` comes from loading a tokenizer of transformers 5 with transformers 4; else None."""
    if "TokenizersBackend" not in str(error) or not version("transformers").startswith("4."):
        return None
    return (
        f"transformers 5 saved it and transformers {version('transformers')} is installed, which doesn't know that "
        'class. Write "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, or install '
        "transformers 5."
    )


def how_to_load_whole() -> str:
    """What to do after loading a model over several ranks lost weights."""
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        return f"Load the model again, with a newer transformers than {version('transformers')}."
    if Version(deepspeed) >= Version("0.19.8"):
        return f"Load the model again; transformers {version('transformers')} and deepspeed {deepspeed} lost weights."
    # before, DeepSpeed waited for the last of several gathers only: https://github.com/deepspeedai/DeepSpeed/pull/8539
    return (
        f"Load the model again with transformers>=5.24 and deepspeed>=0.19.8 (installed: {version('transformers')}, "
        f"{deepspeed}). Without a GPU, ZeRO-3 of deepspeed {deepspeed} loses some now and then, unless "
        "zero_optimization has stage3_allgather_sequential: true."
    )
