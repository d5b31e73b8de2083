"""`rank_by: gain_over_forgetting`: what training a unit gains on the task, relative to what it makes the model forget.

To first order a gradient step eta * g in unit u alone lowers the task loss by eta * G_u, with G_u = ||dL/dW_u||^2. To
second order it moves the model's own distribution by a KL of eta^2/2 * g' F_u g, with the Fisher information F_u (the
quadratic penalty of elastic weight consolidation, Kirkpatrick et al. 2017, arXiv 1612.00796). With F_u replaced by the
mean of its diagonal, and the KL divided among the units so that the total gain is largest, a unit gains per trained
entry, up to a factor that all units share,

    G_u / tr F_u

EWC measures F on the old task's data. Here it is measured on text that the base model wrote itself: no pre-training
data is needed, and since the samples are the model's own, it is the true Fisher information and not the empirical one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.logits import padded
from kappatune_plugin.forgetting.measures import completion_ids, measuring, sample_base
from kappatune_plugin.schema import Block, Whole
from kappatune_plugin.selection import criteria
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.weights.units import WeightUnit, find_units, unit_block

GAIN = criteria.gain_over_forgetting.__name__
# share of the mean Fisher information per entry that is added to all: an expert that no sampled token reached has none,
# and isn't free to train for that
DAMPING = 1e-3
# token ids, and the position of the first whose prediction counts
Example = tuple[list[int], int]


class GainConfig(Block):
    """How the criteria that take the task's rows are measured: the block `kappatune.gain:` of a recipe.

    Raises:
        KappaTuneError: values that can't be right, a line each.
    """

    examples: Whole = Field(
        default=64, ge=1, description="Examples of the task: the first of the shuffled training rows."
    )
    samples: Whole = Field(default=32, ge=1, description="Texts that the model writes; the experts' ranks need none.")
    max_length: Whole = Field(
        default=256,
        ge=3,
        description="Tokens of both; a longer example is cut at its start, so that its answer stays.",
    )
    batch_size: Whole = Field(default=8, ge=1, description="Of both; the gain is averaged over batches of examples.")
    seed: Whole = Field(default=0, ge=0, description="Of the shuffling and of what the model writes.")


def gain_over_forgetting(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str]],
    config: GainConfig | None = None,
    units: Sequence[WeightUnit] | None = None,
) -> dict[str, float]:
    """Unit name -> G_u / tr F_u, at least 0; the higher, the more is gained for what is forgotten.

    Two short rounds of backward passes; the same seed gives the same numbers. Leaves the model and the random state as
    they were. Besides activations it takes memory for the gradient of one parameter at a time.

    Args:
        model: without an adapter, whole in one process.
        rows: (prompt, completion) to train on, completions with their end token; with an empty prompt the whole text
            is learned.
        units: the units to score; default: all of the model's. Their mean information is the damping (see `ratios`).

    Raises:
        KappaTuneError: no rows, a model with an adapter, a tokenizer without a token to write from, or gradients that
            aren't finite.
    """
    config = config or GainConfig()
    if hasattr(model, "peft_config"):
        raise KappaTuneError("gain_over_forgetting is measured on the base model: before an adapter is attached.")
    units = find_units(model) if units is None else units
    examples = shuffled_examples(tokenizer, rows, config)
    gain = _finite(task_gain(model, units, examples, config.batch_size))
    written = sample_base(model, tokenizer, config.samples, config.max_length, config.seed, config.batch_size)
    information = _finite(fisher_information(model, units, written, config.batch_size))
    return ratios(units, gain, information)


def with_gain(
    report: KappaReport,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: GainConfig | None = None,
    text_field: str = "text",
) -> KappaReport:
    """`report` with the score "gain_over_forgetting" added to each row; arguments as `gain_over_forgetting`.

    Args:
        rows: to train on, in one of TRL's formats: text in columns `prompt` and `completion`, or in `text_field`.

    Raises:
        KappaTuneError: as `gain_over_forgetting`; rows in another format, or a report of another model.
    """
    names = {row.name for row in report.units}
    units = [unit for unit in find_units(model) if unit.name in names]
    missing = sorted(names - {unit.name for unit in units})
    if missing:
        raise KappaTuneError(
            f"{len(missing)} matrices of the kappa report are not in this model, such as {missing[0]}: scan it again."
        )
    pairs = training_pairs(rows, tokenizer.eos_token or "", text_field)
    found = gain_over_forgetting(model, tokenizer, pairs, config, units)
    scored = [replace(row, scores={**row.scores, GAIN: found[row.name]}) for row in report.units]
    return replace(report, units=scored)


def training_pairs(rows: Dataset, end: str, text_field: str = "text") -> list[tuple[str, str]]:
    """The rows as (prompt, completion) with the end token that TRL adds; an empty prompt where all is learned."""
    for before, after in (("prompt", "completion"), (None, text_field)):
        if after not in rows.column_names or (before and before not in rows.column_names):
            continue
        prompts = rows[before] if before else [""] * len(rows)
        found = list(zip(prompts, rows[after], strict=True))
        if all(isinstance(text, str) for pair in found for text in pair):
            return [(prompt, text if end and text.endswith(end) else text + end) for prompt, text in found]
    raise KappaTuneError(
        f"What is ranked by reads training rows of text, in columns prompt and completion or {text_field}; "
        f"these have {', '.join(rows.column_names)}. Make these columns with data.prompt and data.completion."
    )


def ratios(
    units: Sequence[WeightUnit], gain: Mapping[str, float], information: Mapping[str, float]
) -> dict[str, float]:
    """gain / (information + damping) by unit; the damping per entry is `DAMPING` times the mean information."""
    entries = {unit.name: unit.shape[0] * unit.shape[1] for unit in units}
    damping = DAMPING * sum(information.values()) / sum(entries.values())
    below = {name: information[name] + damping * entries[name] for name in entries}
    return {name: gain[name] / below[name] if gain[name] else 0.0 for name in entries}


def task_gain(
    model: nn.Module, units: Sequence[WeightUnit], examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """G_u: the squared norm of the gradient of a batch's mean loss per token, averaged over the batches.

    That is what a training step sees: the squared mean gradient plus its variance over the batch size.
    """
    totals = dict.fromkeys([unit.name for unit in units], 0.0)
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    with _collecting(model, units, totals):
        for batch in batches:
            nats, tokens = _nats(model, batch)
            (nats / tokens).backward()
    return {name: total / len(batches) for name, total in totals.items()}


def fisher_information(
    model: nn.Module, units: Sequence[WeightUnit], written: Sequence[Sequence[int]], batch_size: int
) -> dict[str, float]:
    """tr F_u per token: the mean of ||d log p(token) / dW_u||^2 over text that the model wrote.

    Under the model's own distribution the gradients of different tokens and texts are uncorrelated, with mean zero. So
    the squared norm of a batch's *summed* gradient over its tokens estimates it without bias, whatever the batch size.
    """
    totals = dict.fromkeys([unit.name for unit in units], 0.0)
    count = 0
    with _collecting(model, units, totals):
        for start in range(0, len(written), batch_size):
            nats, tokens = _nats(model, [(list(piece), 1) for piece in written[start : start + batch_size]])
            nats.backward()
            count += tokens
    return {name: total / count for name, total in totals.items()}


def shuffled_examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]], config: GainConfig
) -> list[Example]:
    """The first `config.examples` of the rows, (prompt, completion), shuffled by the seed. KappaTuneError for none."""
    if not rows:
        raise KappaTuneError("A ranking that is measured on rows needs training rows, and there are none.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return [to_example(tokenizer, *rows[index], config.max_length) for index in order[: config.examples]]


def to_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, max_length: int) -> Example:
    """The last `max_length` token ids, and the position at which the completion starts in them."""
    if prompt:
        before, after = completion_ids(tokenizer, prompt, completion)
        ids, start = before + after, len(before)
    else:
        ids, start = tokenizer(completion).input_ids, 1
    if len(ids) < 2:
        raise KappaTuneError(f"The training row {completion!r} has fewer than two tokens.")
    cut = max(0, len(ids) - max_length)
    return ids[cut:], max(1, start - cut)


def _finite(squares: dict[str, float]) -> dict[str, float]:
    broken = [name for name, value in squares.items() if not math.isfinite(value)]
    if broken:
        raise KappaTuneError(
            f"gain_over_forgetting: the gradients of {len(broken)} of {len(squares)} matrices aren't finite, such as "
            f"that of {broken[0]}. Check the base weights, or load them in bfloat16 or float32."
        )
    return squares


def _nats(model: nn.Module, batch: Sequence[Example]) -> tuple[Tensor, int]:
    """The summed loss of the tokens that count, in nats, and their number."""
    ids, mask = padded([ids for ids, _ in batch], model.device)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    starts = torch.tensor([start for _, start in batch], device=ids.device)
    counted = mask[:, 1:] & (positions >= starts[:, None])
    return cross_entropy(logits[counted], ids[:, 1:][counted], reduction="sum"), int(counted.sum())


@contextmanager
def _collecting(model: nn.Module, units: Sequence[WeightUnit], totals: dict[str, float]) -> Iterator[None]:
    """In this block each backward pass adds the squared norm of each unit's gradient to `totals` and frees it."""
    parts: dict[str, list[WeightUnit]] = {}
    for unit in units:
        parts.setdefault(unit.parameter, []).append(unit)
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    hooks: list[Any] = []
    try:
        model.requires_grad_(False).zero_grad(set_to_none=True)
        for name, found in parts.items():
            parameter = model.get_parameter(name).requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_adder(found, totals)))
        with measuring(model), torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _adder(units: Sequence[WeightUnit], totals: dict[str, float]) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        for unit in units:
            totals[unit.name] += unit_block(parameter.grad, unit).float().square().sum().item()
        parameter.grad = None

    return add
