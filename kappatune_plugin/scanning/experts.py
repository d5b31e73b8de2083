"""`rank_by: expert_share` and `expert_gate`: how much of the task's tokens each expert of a mixture gets.

ESFT (Expert-Specialized Fine-Tuning, arXiv 2407.01906) trains the experts that a task uses most, by the share of its
tokens that their router sends them, or by the mean of their gate scores. Both are read off the routers while the base
model reads some of the rows to train on.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.measures import measuring
from kappatune_plugin.scanning.gain import GainConfig, shuffled_examples, training_pairs
from kappatune_plugin.selection.criteria import expert_gate, expert_share
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.weights.units import WeightUnit, find_units

SHARE, GATE = expert_share.__name__, expert_gate.__name__
EXPERT = re.compile(r"(.*experts)\.(\d+)\.")


def expert_use(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, str]],
    config: GainConfig | None = None,
) -> dict[str, dict[str, float]]:
    """Unit name -> {"expert_share", "expert_gate"} of the expert that the unit is of; other units are left out.

    The share of tokens whose router chooses the expert, and the mean over all tokens of the weight that its output has
    (0 where it isn't chosen), both between 0 and 1. One forward pass a row; all tokens count, the prompt's too.

    Args:
        model: without an adapter, whole in one process.
        rows: (prompt, completion) to train on.
        config: how many rows, how long, and the seed that shuffles them.

    Raises:
        KappaTuneError: no rows, a model without experts, with an adapter, or whose routers don't say what they choose.
    """
    config = config or GainConfig()
    if hasattr(model, "peft_config"):
        raise KappaTuneError(f"{SHARE} is measured on the base model: before an adapter is attached.")
    experts = {unit.name: place for unit in find_units(model) if (place := expert_of(unit))}
    if not experts:
        raise KappaTuneError(
            f"rank_by: {SHARE} and {GATE} rank the experts of a mixture, and {type(model).__name__} has none. Rank by "
            "kappa, or another value that every matrix has."
        )
    counts = _Counts(experts.values(), model)
    examples = shuffled_examples(tokenizer, rows, config)
    with _watching(model, counts.routers, counts.add), measuring(model):
        for ids, _ in examples:
            # one by one: padding is routed too
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    tokens = sum(len(ids) for ids, _ in examples)
    return {
        name: {SHARE: counts.chosen[block][number].item() / tokens, GATE: counts.weight[block][number].item() / tokens}
        for name, (block, number) in experts.items()
    }


def with_expert_use(
    report: KappaReport,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: GainConfig | None = None,
    text_field: str = "text",
) -> KappaReport:
    """`report` with both scores added to the experts' rows; arguments as `expert_use`.

    Args:
        rows: to train on, in one of TRL's formats: text in columns `prompt` and `completion`, or in `text_field`.

    Raises:
        KappaTuneError: as `expert_use`; rows in another format, or a report without experts.
    """
    pairs = training_pairs(rows, tokenizer.eos_token or "", text_field)
    found = expert_use(model, tokenizer, pairs, config)
    scored = [replace(row, scores={**row.scores, **found.get(row.name, {})}) for row in report.units]
    if not any(SHARE in row.scores for row in scored):
        raise KappaTuneError(f"rank_by: {SHARE}: include and exclude leave no matrix of an expert.")
    return replace(report, units=scored)


def expert_of(unit: WeightUnit) -> tuple[str, int] | None:
    """The path of the module that holds all experts of the unit's layer, and its expert's number; None of others."""
    if len(unit.index) == 3 and "stack" not in unit.groups:
        return unit.parameter.rpartition(".")[0], unit.index[0]
    match = EXPERT.match(unit.parameter)
    return (match[1], int(match[2])) if match else None


class _Counts:
    """How often each expert was chosen, and the sum of its weights: path of the experts -> a number for each."""

    def __init__(self, places: Any, model: nn.Module) -> None:
        numbers: dict[str, int] = {}
        for block, number in places:
            numbers[block] = max(number + 1, numbers.get(block, 0))
        self.chosen = {block: torch.zeros(count, dtype=torch.float64) for block, count in numbers.items()}
        self.weight = {block: torch.zeros(count, dtype=torch.float64) for block, count in numbers.items()}
        self.routers = {_router_of(block, model): block for block in numbers}
        self._config = model.config.get_text_config()

    def add(self, block: str, output: Any) -> None:
        """Count what a router gave."""
        chosen, weights = self._choice(block, output)
        chosen = chosen.flatten().cpu()
        self.chosen[block] += torch.bincount(chosen, minlength=len(self.chosen[block]))
        self.weight[block].index_add_(0, chosen, weights.flatten().double().cpu())

    def _choice(self, block: str, output: Any) -> tuple[Tensor, Tensor]:
        """The experts chosen for each token and their weights, shape (tokens, chosen)."""
        tensors = [each for each in output if torch.is_tensor(each)] if isinstance(output, tuple) else [output]
        whole = [each for each in tensors if not each.is_floating_point()]
        weights = [each for each in tensors if each.is_floating_point() and whole and each.shape == whole[0].shape]
        if whole and weights:
            return whole[0], weights[-1]
        top = getattr(self._config, "num_experts_per_tok", None)
        softmax = getattr(self._config, "scoring_func", "softmax") == "softmax"
        if len(tensors) != 1 or top is None or not softmax or tensors[0].shape[-1] != len(self.chosen[block]):
            raise KappaTuneError(
                f"rank_by: {SHARE}: the router of {block} doesn't say which experts it chooses: expected their numbers "
                "and weights, or a score for each expert."
            )
        # transformers 4: a linear layer, with the choice made beside it
        scores, chosen = tensors[0].float().softmax(-1).topk(top)
        normed = getattr(self._config, "norm_topk_prob", True)
        return chosen, scores / scores.sum(-1, keepdim=True) if normed else scores


def _router_of(block: str, model: nn.Module) -> str:
    """The path of the module whose output chooses among the experts in `block`."""
    beside = f"{block.rpartition('.')[0]}."
    routers = {unit.parameter.rpartition(".")[0] for unit in find_units(model) if "router" in unit.groups}
    found = sorted((path for path in routers if path.startswith(beside)), key=len)
    if not found:
        raise KappaTuneError(f"rank_by: {SHARE}: there is no router beside {block}.")
    return found[0]


@contextmanager
def _watching(model: nn.Module, routers: Mapping[str, str], add: Callable[[str, Any], None]) -> Iterator[None]:
    """In this block `add` gets the output of each router, with the path of the experts that it chooses among."""

    def told(block: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: add(block, output)

    hooks = [model.get_submodule(router).register_forward_hook(told(block)) for router, block in routers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
