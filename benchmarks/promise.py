"""The promise of `max_delta`, tested as a promise: does the true rise stay within the limit in 95% of runs?

Two small pretrained models learn two tasks by KappaTune, LoRA and full training, with several seeds. Each finished run
is scaled back to each limit by control stories of its own draw, as `kappatune sft` does it, and the rise is then
measured on stories that took no part at all. The same with text that the base wrote in the place of the control
stories: what a promise about such text is worth for real text.

Needs the local copies of benchmarks/study.py. Killed and started again it goes on where it was.

    python benchmarks/promise.py [--data DATA] [--results docs/results/promise.jsonl] [--docs docs/dial.md]
"""

import argparse
import copy
import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from records import Records
from scipy.stats import binomtest
from study import MODELS, REPOSITORY, TASKS, sentences
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.forgetting.measures import measuring, sample_base
from kappatune_plugin.interpolation.dial import DialSettings
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.interpolate import turn_model
from kappatune_plugin.interpolation.texts import rise
from kappatune_plugin.interpolation.token_losses import control_documents, row_documents, texts

# learning rates at which every method forgets several times the limits
METHODS = {"kappatune": 3e-3, "lora": 3e-3, "full": 1e-3}
CONFIGS = {
    "kappatune": KappaTuneConfig(task_type="CAUSAL_LM", k="35%"),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    "full": None,
}
LIMITS, SEEDS = (0.02, 0.05), 3
STEPS, BATCH, HELD_OUT = 80, 16, 64
DOCUMENTS, UNSEEN, TOKENS = 80, 400, 96
START, END = "<!-- benchmarks/promise.py -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results" / "promise.jsonl")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs" / "dial.md")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    records = Records(args.results)
    for model, task in tqdm(list(itertools.product(MODELS, TASKS)), desc="models and tasks"):
        bench = None
        for method, seed in itertools.product(METHODS, range(args.seeds)):
            run = {"model": model, "task": task, "method": method, "seed": seed}
            if records.has(run):
                continue
            bench = bench or Bench(args.data, model, task)
            records.add(run, bench.run(method, seed))
    put(args.docs, START, summary(records.found))


def put(page: Path, start: str, text: str) -> None:
    """Write `text` into the page, between `start` and the next END."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    write_text(page, f"{before}{start}\n{text}\n{END}{rest.partition(END)[2]}")


class Bench:
    """One model and one task."""

    def __init__(self, data: Path, model: str, task: str) -> None:
        folder = data / "models" / MODELS[model]
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        file, words, prompt = TASKS[task]
        with tempfile.TemporaryDirectory() as temporary:
            train, _ = sentences(data / "tasks" / "sent-conv" / file, Path(temporary))
            rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
        self.rows = [(prompt.format(sentence=row["sentence"]), words[row["label"]]) for row in rows]
        found = (data / "text" / "tinystories" / "ts_2m.txt").read_text(encoding="utf-8").split("<|endoftext|>")
        self.stories = [text.strip() for text in found if len(text) > 100]

    def run(self, method: str, seed: int) -> list[dict[str, Any]]:
        """Train once; scale back to each limit by stories, and by text that the base wrote."""
        rows, stories = (random.Random(seed).sample(each, len(each)) for each in (self.rows, self.stories))
        held = row_documents(self.tokenizer, rows[:HELD_OUT])
        learned = row_documents(self.tokenizer, rows[HELD_OUT:])
        model = trained(self.base, CONFIGS[method], METHODS[method], learned, seed, STEPS, BATCH)
        written = sample_base(self.base, self.tokenizer, DOCUMENTS, TOKENS, seed)
        controls = {
            "stories": control_documents(self.tokenizer, stories[:DOCUMENTS], TOKENS, False),
            "self": [[(ids, 1)] for ids in written],
        }
        changes = changes_of_checkpoint(self.base, model) if method == "full" else changes_of_adapter(model)
        with measuring(model):
            unseen = texts(model, control_documents(self.tokenizer, stories[DOCUMENTS:][:UNSEEN], TOKENS, False), 64)
            changes.set(0.0)
            before = unseen.measured()
            changes.set(1.0)
            whole = rise(before, unseen.measured(), unseen.tokens).mean
            records = []
            for control, limit in [*(("stories", limit) for limit in LIMITS), ("self", LIMITS[-1])]:
                record = {"control": control, "limit": limit, "trained": whole}
                try:
                    dialed = turn_model(model, changes, held, {control: controls[control]}, settings(limit, seed), 32)
                    true = rise(before, unseen.measured(), unseen.tokens).mean
                    record |= {"mode": dialed.mode, "upper": dialed.verified[control].upper, "true": true}
                except KappaTuneError:
                    # no scale above 0 keeps the limit: nothing is promised, and nothing is kept
                    record["mode"] = "none"
                records.append(rounded(record))
                changes.set(1.0)
        return records


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the digits that mean something."""
    return {key: round(value, 5) if type(value) is float else value for key, value in record.items()}


def trained(
    base: nn.Module, config: Any, rate: float, rows: Sequence[Any], seed: int, steps: int, batch: int
) -> nn.Module:
    """A copy of `base`, trained whole or with the PEFT method of `config`, on the rows in their order."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if config is not None:
        model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    learned, order = texts(model, rows, batch), itertools.cycle(range(len(rows)))
    for _ in range(steps):
        learned.loss([next(order) for _ in range(batch)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def settings(limit: float, seed: int) -> DialSettings:
    return DialSettings(limit, seed=seed, quiet=True)


def summary(records: Iterable[dict[str, Any]]) -> str:
    """What the records say, as the paragraph of the page on the dial."""
    records = list(records)
    kept = {
        name: [each for each in records if each["control"] == name and "true" in each] for name in ("stories", "self")
    }
    scaled = [each for each in kept["stories"] if each["mode"] != "trained"]
    within = sum(each["true"] <= each["limit"] for each in kept["stories"])
    interval = binomtest(within, len(kept["stories"])).proportion_ci()
    share = sum(each["true"] for each in scaled) / sum(each["limit"] for each in scaled)
    worst = max(each["true"] / each["limit"] for each in kept["stories"])
    self_within = sum(each["true"] <= each["limit"] for each in kept["self"])
    ratios = sorted(each["true"] / each["limit"] for each in kept["self"])
    none = sum(each["mode"] == "none" for each in records)
    runs, count = len(kept["stories"]), len(kept["self"])
    lines = [
        f"Tested as a promise (`python benchmarks/promise.py`): {runs} runs of two small pretrained",
        f"models, two tasks, KappaTune, LoRA and full training, limits of {' and '.join(map(str, LIMITS))} nats, "
        f"{DOCUMENTS} control stories each. On",
        f"stories that took no part the rise was within the limit in {within} of {runs} ({within / runs:.0%}; 95% "
        f"interval {interval.low:.0%} to",
        f"{interval.high:.0%}), at worst {worst:.2f} times the limit; on average {share:.0%} of it was used.",
        f"With `control: self`, the limit that was kept on text of the base held on real stories in {self_within} of "
        f"{count} runs:",
        f"the rise there was {ratios[0]:.2f} to {ratios[-1]:.2f} times the limit, the median {ratios[count // 2]:.2f}.",
    ]
    return "\n".join([*lines, *([f"In {none} cases no scale above 0 kept the limit."] if none else [])])


if __name__ == "__main__":
    main()
