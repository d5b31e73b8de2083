"""What the versions of other packages mean for this one."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# keys of TRL's YAML that came and went between the versions which this package works with, and what to write today
GONE_KEYS = {
    "warmup_ratio": "give the share as warmup_steps: 0.1",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "delete it, a run writes over what is in output_dir",
    "save_safetensors": "delete it, safetensors is the only format",
    "evaluation_strategy": "it is called eval_strategy",
    "max_seq_length": "it is called max_length",
    "torch_dtype": "it is called dtype",
    "no_cuda": "write use_cpu: true",
}


def gone_key(key: str) -> str | None:
    """What to do about a key that the installed versions of TRL and transformers don't know; None if nobody did."""
    if key not in GONE_KEYS:
        return None
    return f"transformers {version('transformers')} and TRL {version('trl')} don't have it: {GONE_KEYS[key]}"


def newer_tokenizer(error: Exception) -> str | None:
    """What to do if `error` says that a tokenizer is of transformers 5 and this is transformers 4; else None."""
    if "TokenizersBackend" not in str(error) or not version("transformers").startswith("4."):
        return None
    return (
        f"transformers 5 saved it and transformers {version('transformers')} is installed, which doesn't know that "
        'class. Write "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, or install '
        "transformers 5."
    )


def how_to_load_whole() -> str:
    """What to do where loading a model over several ranks lost weights."""
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        return f"Load the model again, with a newer transformers than {version('transformers')}."
    if Version(deepspeed) >= Version("0.19.8"):
        return f"Load the model again; transformers {version('transformers')} and deepspeed {deepspeed} lost weights."
    # it waits for the last of several gathers only: https://github.com/deepspeedai/DeepSpeed/pull/8539
    return (
        f"Load the model again with transformers>=5.24 and deepspeed>=0.19.8 (installed: {version('transformers')}, "
        f"{deepspeed}). Without a GPU, ZeRO-3 of deepspeed {deepspeed} loses some now and then, unless "
        "zero_optimization has stage3_allgather_sequential: true."
    )
