"""What a model knows, in numbers: loss, KL to its base, accuracy, recall. Token ids in, floats out.

Everything is per token over right-padded batches with the padding masked, and leaves the model's mode and the random
state as they were.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.data.examples import ChoiceExample
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.logits import logits_from, padded

Pair = tuple[list[int], list[int]]
# what the bar of a measurement says in front of its name; None for no bar
_shown: ContextVar[str | None] = ContextVar("shown", default=None)


@contextmanager
def shown_as(title: str | None) -> Iterator[None]:
    """Measurements in the context show a bar with the time left: "base: wikitext, 200 texts". None shows none."""
    token = _shown.set(title)
    try:
        yield
    finally:
        _shown.reset(token)


def bar(total: int, name: str) -> tqdm:
    """The bar of one measurement of `total` texts, on standard error, gone when it is done."""
    title = _shown.get()
    return tqdm(total=total, desc=f"{title}: {name}", unit="text", leave=False, disable=title is None)


@dataclass(frozen=True)
class TokenLoss:
    """Mean next-token loss in nats, and over how many predicted tokens."""

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random state are as before.

    The load-balancing loss that TRL turns on for a mixture of experts is off: transformers can't compute it while it
    generates from padded prompts.
    """
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    balancing = getattr(config, "output_router_logits", False)
    device = getattr(model, "device", torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        model.eval()
        if balancing:
            config.output_router_logits = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        if balancing:
            config.output_router_logits = balancing
        for module, training in modes.items():
            module.training = training


def base_of(model: nn.Module) -> Any:
    """A context in which `model` is its base: without the adapter of a PEFT model, as it is otherwise."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


@contextmanager
def base_in_place(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """`model` with the base's values while the context lasts; nothing is copied."""

    def swap() -> None:
        for trained, original in zip(model.parameters(), base.parameters(), strict=True):
            trained.data, original.data = original.data, trained.data

    base.to(next(model.parameters()).device)
    swap()
    try:
        yield
    finally:
        swap()


def blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, truncate: bool = False
) -> list[list[int]]:
    """Token ids of each text in pieces of at most `max_length`; pieces that predict nothing are dropped.

    Where the tokenizer begins a text with a start token, every piece begins with it: a model that leans on it (Gemma)
    would be measured out of its element in all others.

    Args:
        truncate: keep only the first piece of each text, as PEFT's MetaMathQA benchmark does.

    Raises:
        KappaTuneError: nothing is left.
    """
    pieces = []
    for text in texts:
        ids = tokenizer(text, truncation=truncate, max_length=max_length if truncate else None, verbose=False).input_ids
        first = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
        step = max_length - len(first)
        pieces += [first + ids[start : start + step] for start in range(len(first), len(ids), step)]
    pieces = [piece for piece in pieces if len(piece) >= 2]
    if not pieces:
        raise KappaTuneError(f"The {len(texts)} control texts have no two tokens in a row. Give texts of some length.")
    return pieces


def completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Pair:
    """(prompt ids, completion ids), divided as TRL divides its prompt-completion data.

    The text is tokenized whole; the completion starts where that departs from the tokenized prompt.

    Raises:
        KappaTuneError: the completion adds no token.
    """
    alone, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
    start = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    # a model that adds an end token adds it to both
    if start == len(whole):
        raise KappaTuneError(f"The completion {completion!r} after {prompt!r} adds no token.")
    if start == 0:
        raise KappaTuneError(
            f"The completion {completion!r} has no token before it to be predicted from: give a prompt."
        )
    return whole[:start], whole[start:]


def token_loss(model: nn.Module, pieces: Sequence[Sequence[int]], batch_size: int = 8, name: str = "loss") -> TokenLoss:
    """Mean loss of every token but the first of each piece: all nats over all tokens, not a mean of means.

    As PEFT's MetaMathQA benchmark (method_comparison/MetaMathQA, `calculate_mean_per_token_loss`) defines it since its
    corrections: the logits at a token against the token after it, no padding, every token alike; `base_of` measures the
    base without the adapter. Two differences are of rounding only: padding is on the right here, and the logarithm of
    the softmax is taken in float32 whatever the model's dtype.
    """
    nats, tokens = 0.0, 0
    with measuring(model):
        for batch in batches(pieces, batch_size, name):
            losses, mask = token_losses(model, batch)
            nats += losses[mask].double().sum().item()
            tokens += int(mask.sum())
    return TokenLoss(nats / tokens, tokens)


def kl_to_base(
    model: nn.Module,
    pieces: Sequence[Sequence[int]],
    batch_size: int = 8,
    starts: Sequence[int] | None = None,
    name: str = "KL to the base",
) -> float:
    """Mean over tokens of KL(base || model) of the next-token distribution, in nats.

    The forward direction, as RL's Razor (arXiv 2509.04259) predicts forgetting by it. 0 for a model without adapter.

    Args:
        starts: of each piece the position of its first token whose prediction counts; default: 1, its second token.
    """
    total, tokens = 0.0, 0
    rows = list(zip(pieces, starts or [1] * len(pieces), strict=True))
    with measuring(model):
        for batch in batches(rows, batch_size, name):
            ids = [piece for piece, _ in batch]
            tuned, mask = _logits(model, ids)
            with base_of(model):
                base, _ = _logits(model, ids)
            base, tuned = base.log_softmax(-1), tuned.log_softmax(-1)
            divergence = (base.exp() * (base - tuned)).sum(-1)
            for row, (_, start) in enumerate(batch):
                mask[row, : start - 1] = False
            total += divergence[mask].double().sum().item()
            tokens += int(mask.sum())
    return total / tokens


def completion_kl(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> float:
    """Mean over the completions' tokens of KL(base || model), given the prompt and the right tokens before, in nats.

    For a completion of one token that is RL's Razor's divergence on the new task, E_x KL(base(y|x) || model(y|x)); for
    longer ones it follows the right completion where that averages over the base's own.

    Raises:
        KappaTuneError: no pairs.
    """
    if not pairs:
        raise KappaTuneError("There are no test examples to measure the task's KL on.")
    divided = [completion_ids(tokenizer, *pair) for pair in pairs]
    pieces = [prompt + completion for prompt, completion in divided]
    return kl_to_base(model, pieces, batch_size, [len(prompt) for prompt, _ in divided], "task, KL to the base")


def label_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    batch_size: int = 8,
    name: str = "task",
) -> float:
    """`label_scores`, the share alone."""
    return label_scores(model, tokenizer, examples, batch_size, name)[0]


def label_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    batch_size: int = 8,
    name: str = "task",
) -> tuple[float, float]:
    """How well the right choices are known: the share of examples whose right choice has the highest log-likelihood
    after the prompt, and the loss of the right choices in nats a token, without an end token; NaN if one is NaN.

    The likelihood is the sum over a choice's tokens, not divided by their number: it is the probability of that label.

    Raises:
        KappaTuneError: no examples, or one without two choices.
    """
    if not examples:
        raise KappaTuneError("There are no test examples to measure the task's accuracy on.")
    pairs = []
    for example in examples:
        if len(example.choices) < 2:
            raise KappaTuneError(f"An example has {len(example.choices)} choices, two at least: {example.prompt!r}.")
        pairs += [completion_ids(tokenizer, example.prompt, choice) for choice in example.choices]
    found = [nats for nats, _ in _completion_losses(model, pairs, batch_size, name)]
    if any(map(math.isnan, found)):
        # nothing is less than NaN: the first choice would win
        return math.nan, math.nan
    scores = iter(zip(found, (len(choice) for _, choice in pairs), strict=True))
    right, nats, tokens = 0, 0.0, 0
    for example in examples:
        choices = [next(scores) for _ in example.choices]
        losses = [loss for loss, _ in choices]
        right += losses.index(min(losses)) == example.answer
        nats, tokens = nats + choices[example.answer][0], tokens + choices[example.answer][1]
    return right / len(examples), nats / tokens


def completion_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> float:
    """Mean nats a token of the completions, given their prompts: the measure of a task without labels.

    Raises:
        KappaTuneError: no pairs.
    """
    if not pairs:
        raise KappaTuneError("There are no test examples to measure the task's loss on.")
    divided = [completion_ids(tokenizer, *pair) for pair in pairs]
    nats = sum(nats for nats, _ in _completion_losses(model, divided, batch_size, "task"))
    return nats / sum(len(completion) for _, completion in divided)


def exact_recall(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> float:
    """Share of (prompt, completion) pairs whose completion is what greedy decoding gives; NaN if a loss is NaN.

    Each token of the completion has to be the most likely one after the right ones before it. By induction those are
    the tokens that greedy decoding would have produced, so no generation is needed.

    Raises:
        KappaTuneError: no pairs.
    """
    if not pairs:
        raise KappaTuneError("There are no facts to recall.")
    found = _completion_losses(model, [completion_ids(tokenizer, *pair) for pair in pairs], batch_size, "recall")
    if any(math.isnan(nats) for nats, _ in found):
        return math.nan
    return sum(greedy for _, greedy in found) / len(pairs)


def sample_base(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: int, max_length: int, seed: int, batch_size: int = 8
) -> list[list[int]]:
    """Token ids that the base model wrote from its start token at temperature 1: control text without a data set.

    Ids, not text, so that what is measured is exactly what was sampled.

    Raises:
        KappaTuneError: the tokenizer has no token to start from.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise KappaTuneError("control: self needs a start or end token, and this tokenizer has none: give a data set.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pieces = []
    with measuring(model), base_of(model), bar(samples, "texts that it writes") as shown:
        torch.manual_seed(seed)
        while len(pieces) < samples:
            shown.update(len(pieces) - shown.n)
            prompt = torch.full((min(batch_size, samples - len(pieces)), 1), start, device=model.device)
            written = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                # a text needs a token to predict
                min_new_tokens=2,
                max_new_tokens=max_length - 1,
                pad_token_id=padding,
            )
            pieces += [_until_end(row, tokenizer.eos_token_id) for row in written.tolist()]
    return pieces


def _until_end(row: list[int], end: int | None) -> list[int]:
    """A sampled row up to its end token, without the padding behind."""
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


def batches(rows: Sequence[Any], batch_size: int, name: str) -> Iterator[Sequence[Any]]:
    """`rows` in parts of `batch_size`, behind a `bar`."""
    with bar(len(rows), name) as shown:
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]
            shown.update(len(rows[start : start + batch_size]))


def _logits(model: nn.Module, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Next-token logits (batch, length - 1, vocabulary) in float32, and where a real token follows."""
    ids, mask = padded(batch, model.device)
    return logits_from(model, ids, mask, 0)[:, :-1].float(), mask[:, 1:]


def token_losses(model: nn.Module, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Loss of each following token (batch, length - 1), and where there is one."""
    logits, mask = _logits(model, batch)
    following = padded(batch, model.device)[0][:, 1:]
    return logits.logsumexp(-1) - logits.gather(-1, following.unsqueeze(-1)).squeeze(-1), mask


def _completion_losses(model: nn.Module, pairs: Sequence[Pair], batch_size: int, name: str) -> list[tuple[float, bool]]:
    """For each pair the summed loss of its completion in nats, and whether greedy decoding gives it."""
    # nothing follows the last token, so answers of one token to one prompt are read from the same row
    asked: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, completion) in enumerate(pairs):
        asked.setdefault((*prompt, *completion[:-1]), []).append(place)
    found = [(math.nan, False)] * len(pairs)
    with measuring(model):
        # of like lengths together: padding is read too
        for batch in batches(sorted(asked, key=len), batch_size, name):
            first = min(len(pairs[place][0]) for ids in batch for place in asked[ids]) - 1
            logits = logits_from(model, *padded(batch, model.device), first)
            for row, ids in zip(logits, batch, strict=True):
                for place in asked[ids]:
                    prompt, completion = pairs[place]
                    found[place] = _loss_of(row[len(prompt) - 1 - first : len(ids) - first], completion)
    return found


def _loss_of(logits: Tensor, completion: list[int]) -> tuple[float, bool]:
    predicted, target = logits.float(), torch.tensor(completion, device=logits.device)
    nats = nn.functional.cross_entropy(predicted, target, reduction="none").double().sum().item()
    return nats, bool((predicted.argmax(-1) == target).all())
