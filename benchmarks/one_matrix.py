"""Does kappa say anything that shape and type don't? SmolLM2's matrices trained one at a time, briefly.

Each of a sample of matrices, the same number of each type, learns the same rows of a task in a copy of the base, at a
rate by which all learn the same to first order. What it learned is the fall of the loss on held-out rows, what it
forgot the rise on WikiText-2; the end token has no part. A line a matrix; killed and started again it goes on where it
was.

    python benchmarks/one_matrix.py --model FOLDER [--data DATA] [--task irony] [--each 12]
    python benchmarks/results.py

SmolLM2-135M-Instruct: about 25 minutes of one CPU core, reckoned from the time of two matrices.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dial import TASKS, load, wikitext
from promise import trained
from records import Records
from study import REPOSITORY
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kappatune_plugin import scan
from kappatune_plugin.forgetting.measures import measuring
from kappatune_plugin.interpolation.texts import Texts, rise
from kappatune_plugin.interpolation.token_losses import control_documents, row_documents, texts
from kappatune_plugin.scanning.gain import GAIN, GainConfig, gain_over_forgetting
from kappatune_plugin.selection.criteria import RANKS
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.selection.report import UnitReport
from kappatune_plugin.weights.units import find_units

STEPS, BATCH, HELD_OUT, SEED = 8, 8, 48, 0
PARAGRAPHS, TOKENS = 48, 64
# what all steps together would lower the loss by if it fell as steeply all the way (nats a token), and how far a step
# may move a weight at most, as a share of its matrix's root mean square
FALL, FURTHEST = 4.0, 0.1
GAIN_MEASURED = GainConfig(examples=32, samples=16, max_length=96)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results" / "one-matrix.jsonl")
    parser.add_argument("--task", default="irony", choices=TASKS)
    parser.add_argument("--each", type=int, default=12, help="matrices of each type")
    parser.add_argument("--most", type=int, default=None, help="end after so many, to try it")
    args = parser.parse_args(words)
    # half the time of the defaults on a CPU
    torch.set_float32_matmul_precision("medium")
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    tokenizer, records = AutoTokenizer.from_pretrained(args.model), Records(args.results)
    units = sampled(scan(base, progress=False).units, args.each)[: args.most]
    left = [unit for unit in units if not records.has({"matrix": unit.name})]
    if left:
        bench = Bench.of(base, tokenizer, args.data, args.task)
        rates, gains = first_order_rates(bench), gain_over_forgetting(base, tokenizer, bench.pairs, GAIN_MEASURED)
        for unit in tqdm(left, desc="Matrices"):
            measured = run(bench, unit.name, rates[unit.name])
            records.add({"matrix": unit.name}, [rounded({**known(unit, gains[unit.name]), **measured})])


@dataclass
class Bench:
    """What all matrices have in common.

    Attributes:
        base: the model before training.
        pairs: (prompt, label) to learn; learned: the same as token ids.
        held, control: documents that say what was learned and forgotten; before: their losses under the base.
    """

    base: nn.Module
    pairs: list[tuple[str, str]]
    learned: list[Any]
    held: list[Any]
    control: list[Any]
    before: list[Any]

    @classmethod
    def of(cls, base: nn.Module, tokenizer: Any, data: Path, task: str) -> "Bench":
        """The rows and texts of a task of benchmarks/dial.py."""
        prompt, *words = TASKS[task]
        rows = random.Random(SEED).sample(load(data / "tasks", task)[0], HELD_OUT + STEPS * BATCH)
        pairs = [(prompt.format(text), words[label]) for text, label in rows]
        documents = row_documents(tokenizer, pairs, end_token=False)
        control = control_documents(tokenizer, wikitext(data, PARAGRAPHS, SEED), TOKENS, True)
        bench = cls(base, pairs[HELD_OUT:], documents[HELD_OUT:], documents[:HELD_OUT], control, [])
        bench.before = [each.measured() for each in bench.measured_on(base)]
        return bench

    def measured_on(self, model: nn.Module) -> tuple[Texts, Texts]:
        """The held-out rows and the control, as `model` is measured on them."""
        return texts(model, self.held, BATCH), texts(model, self.control, BATCH)


def sampled(units: Sequence[UnitReport], each: int) -> list[UnitReport]:
    """So many matrices of each type, drawn by the seed; one of each type, then another of each, and so on."""
    kinds: dict[str, list[UnitReport]] = {}
    for unit in units:
        if unit.status == "ok":
            kinds.setdefault(layer_and_type(unit.name)[1], []).append(unit)
    dealt = random.Random(SEED)
    drawn = [dealt.sample(found, min(each, len(found))) for found in kinds.values()]
    return [found[place] for place in range(each) for found in drawn if place < len(found)]


def first_order_rates(bench: Bench) -> dict[str, float]:
    """Matrix -> the rate at which STEPS steps of Adam, each against the gradient's sign, would lower the loss by FALL.

    The gradient is the mean one over all rows to learn; a step moves no weight further than FURTHEST says.
    """
    model, units = bench.base, find_units(bench.base)
    model.requires_grad_(False)
    for unit in units:
        model.get_parameter(unit.parameter).requires_grad_(True)
    learned = texts(model, bench.learned, BATCH)
    for first in range(0, len(learned), BATCH):
        (learned.loss(range(first, min(first + BATCH, len(learned)))) * BATCH / len(learned)).backward()
    rates = {}
    for unit in units:
        weight = model.get_parameter(unit.parameter)
        steepest = FALL / (STEPS * weight.grad.abs().sum().item())
        rates[unit.name] = min(steepest, FURTHEST * weight.detach().square().mean().sqrt().item())
    model.zero_grad(set_to_none=True)
    return rates


def run(bench: Bench, name: str, rate: float) -> dict[str, float]:
    """Train one matrix; what it learned and forgot, in nats a token."""
    unit = next(unit for unit in find_units(bench.base) if unit.name == name)
    weight = bench.base.requires_grad_(False).get_parameter(unit.parameter).requires_grad_(True)
    model = trained(bench.base, None, rate, bench.learned, SEED, STEPS, BATCH)
    moved = (model.get_parameter(unit.parameter) - weight).detach().norm() / weight.detach().norm()
    with measuring(model):
        changed = [
            rise(before, each.measured(), each.tokens).mean
            for before, each in zip(bench.before, bench.measured_on(model), strict=True)
        ]
    return {"rate": rate, "moved": moved.item(), "learned": -changed[0], "rise": changed[1]}


def known(unit: UnitReport, gain: float) -> dict[str, Any]:
    """What is known of a matrix before it is trained: its type, shape, and the values to rank by."""
    scored = UnitReport(**{**asdict(unit), "scores": {GAIN: gain}})
    ranks = ("kappa", "kappa_over_null", "log_volume", GAIN)
    return {
        "type": layer_and_type(unit.name)[1],
        "shape": list(unit.shape),
        **{rank: RANKS[rank](scored) for rank in ranks},
    }


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the digits that mean something."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in record.items()}


if __name__ == "__main__":
    main()
