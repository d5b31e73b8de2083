"""Answers that the model writes itself, and whether the final one is right: the task metric of GSM8K and its like."""

from collections.abc import Sequence
from decimal import Decimal, DecimalException
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.measures import batches, measuring

# what stands before a final answer; the first of them that a text has counts
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def final_answer(text: str) -> str | float | None:
    """The final answer that `text` gives, a number where it can be read as one; None if no mark announces it.

    As PEFT's MetaMathQA benchmark reads it: what follows the last occurrence of the first of `MARKS` that the text has,
    up to the end of the line, without spaces, full stops, exclamation and question marks, $ and % around it. A number
    is a decimal or a fraction "20/14"; "1,000" is not, and stays text.
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    answer = text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    number = _number(answer)
    return answer if number is None else number


def _number(text: str) -> float | None:
    try:
        above, slash, below = text.partition("/")
        return float(Decimal(above.strip()) / Decimal(below.strip()) if slash else Decimal(text.strip()))
    except (DecimalException, OverflowError, ValueError):
        return None


def answer_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_new_tokens: int = 300,
    max_length: int | None = None,
    batch_size: int = 8,
    written: list[dict[str, Any]] | None = None,
) -> float:
    """Share of (prompt, right answer) pairs where the model's text ends in the right answer's `final_answer`.

    Greedy decoding from the prompt, padded on the left. Only the text that the model wrote is read; the benchmark reads
    the prompt with it.

    Args:
        max_new_tokens: of an answer.
        max_length: of prompt and answer together, in tokens; None for no limit.
        written: gets {"prompt", "right", "written", "correct"} of each pair.

    Raises:
        KappaTuneError: no pairs, or a right answer without a final answer in it.
    """
    if not pairs:
        raise KappaTuneError("There are no test examples to write answers to.")
    expected = [final_answer(right) for _, right in pairs]
    if None in expected:
        right = pairs[expected.index(None)][1]
        raise KappaTuneError(
            f"forgetting.generate: the completion {right!r:.200} has no final answer; one is announced by "
            f"{', '.join(repr(mark) for mark in MARKS)}. Delete `generate` to measure the task by its loss."
        )
    answers = []
    for batch in batches(pairs, batch_size, "task, answers that it writes"):
        prompts = [prompt for prompt, _ in batch]
        answers += write_answers(model, tokenizer, prompts, max_new_tokens, max_length)
    correct = [final_answer(text) == answer for text, answer in zip(answers, expected, strict=True)]
    if written is not None:
        rows = zip(pairs, answers, correct, strict=True)
        written += [
            {"prompt": prompt, "right": right, "written": text, "correct": good} for (prompt, right), text, good in rows
        ]
    return sum(correct) / len(pairs)


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_length: int | None = None,
) -> list[str]:
    """What the model writes after each of `prompts`, by greedy decoding in one batch, without special tokens."""
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    length = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padding = 0 if padding is None else padding
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    room = max_new_tokens if max_length is None else max(1, min(max_new_tokens, max_length - length))
    with measuring(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            # a checkpoint's own settings for sampling would only bring warnings
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=room,
            pad_token_id=padding,
        )
    return tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt to be continued: without the end token that some tokenizers add."""
    ids = tokenizer(prompt).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and prompt else ids
