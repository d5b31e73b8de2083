"""The rows of the task that a run doesn't train on, by which it chooses how much of what it trained is kept."""

from typing import Any

import numpy as np
from datasets import Dataset

from kappatune_plugin.distributed.ranks import switched_on
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.recipe.load_rows import formatted_rows
from kappatune_plugin.recipe.recipe import Recipe

OFF, SHARE, FEWEST = "off", 10, 4
NO_DIAL = "write `interpolate: off` in the block forgetting"


def interpolates(recipe: Recipe) -> bool:
    """Whether a run ends by scaling back what it trained: with `forgetting.max_delta`, unless `k: auto` keeps to it."""
    config = recipe.forgetting
    if config is None or config.max_delta is None or config.interpolate == OFF:
        return False
    return config.interpolate is not None or recipe.auto is None


def hold_out(recipe: Recipe, train: Dataset) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those held out: data.validation, or a tenth of `train`; None if none are needed.

    Raises:
        KappaTuneError: too few rows, no control, or weights divided over ranks.
    """
    if not interpolates(recipe):
        return train, None
    args = recipe.training_args
    if args.deepspeed or args.fsdp or switched_on("ACCELERATE_USE_DEEPSPEED") or switched_on("ACCELERATE_USE_FSDP"):
        raise KappaTuneError(
            "forgetting.max_delta: scaling back what was trained needs whole weights in each process, and DeepSpeed or "
            f"FSDP may divide them. Train with {NO_DIAL.replace('write', 'writing')}, then run `kappatune interpolate`."
        )
    if not recipe.forgetting.controls():
        raise KappaTuneError(
            f"forgetting.max_delta: there is no control to keep a limit on: add `control: self`, or {NO_DIAL}."
        )
    held = validation_rows(recipe)
    return (train, held) if held is not None else a_tenth(train)


def validation_rows(recipe: Recipe) -> Dataset | None:
    """The rows of data.validation, in a format of TRL's; None without them."""
    return formatted_rows(recipe, "validation") if (recipe.data or {}).get("validation") else None


def a_tenth(train: Dataset) -> tuple[Dataset, Dataset]:
    """All but a tenth of the rows, and that tenth: always the same for the same number of rows.

    Raises:
        KappaTuneError: rows that are streamed, or too few.
    """
    count = len(train) if hasattr(train, "__len__") else 0
    held = sorted(np.random.default_rng(0).permutation(count)[: count // SHARE].tolist())
    if len(held) < FEWEST:
        found = f"a tenth of the {count} training rows is {len(held)}" if count else "the training rows are streamed"
        raise KappaTuneError(
            f"forgetting.max_delta: rows held out from training choose how much is kept, {FEWEST} at least, and "
            f"{found}. Give data.validation, or {NO_DIAL}."
        )
    out = set(held)
    return train.select([row for row in range(count) if row not in out]), train.select(held)


def texts_of(rows: Dataset, tokenizer: Any) -> tuple[list[tuple[str, str]], bool]:
    """(prompt, completion) of rows in a format of TRL's, and whether an end token is still to be added.

    A row of plain text or of messages has an empty prompt: all of it counts.

    Raises:
        KappaTuneError: rows in another format.
    """
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns:
        if isinstance(rows[0]["prompt"], str):
            return [(row["prompt"], row["completion"]) for row in rows], True
        return [_divided(row["prompt"], row["completion"], tokenizer) for row in rows], False
    if "messages" in columns:
        return [("", tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows], False
    if "text" in columns:
        return [("", row["text"]) for row in rows], True
    raise KappaTuneError(
        f"The rows held out have the columns {', '.join(sorted(columns))}; expected prompt and completion, messages, "
        f"or text. Give such rows as data.validation, or {NO_DIAL}."
    )


def _divided(prompt: list[dict[str, Any]], completion: list[dict[str, Any]], tokenizer: Any) -> tuple[str, str]:
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return start, tokenizer.apply_chat_template([*prompt, *completion], tokenize=False).removeprefix(start)
