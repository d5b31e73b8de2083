"""The dial on a real model: what is kept of a task within a limit of forgetting, by one scale and by one a matrix.

SmolLM2-135M-Instruct (dequantized from 4 bit, by shared/data/pretrained.sh) learns irony or SST-2 with WikiText-2 as
control, by four methods, alone and beside text that the base wrote. Accuracy and loss are those of test rows, the rise
that of WikiText that neither choice nor verification saw. Killed and started again it goes on where it was; the tables
of docs/dial.md are written from what there is.

    python benchmarks/dial.py --model FOLDER [--data DATA] [--tasks irony sst2] [--limits 0.02 0.05] [--seeds 3]
    python benchmarks/dial.py --model FOLDER --time     # no study: how many training steps the dial takes as long as
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from promise import put, trained
from records import Records
from study import REPOSITORY
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kappatune_plugin import KappaTuneConfig
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.measures import measuring, sample_base
from kappatune_plugin.interpolation.change import Changes
from kappatune_plugin.interpolation.dial import Dialed, DialSettings
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.interpolate import turn_model
from kappatune_plugin.interpolation.texts import Texts, rise
from kappatune_plugin.interpolation.token_losses import control_documents, row_documents, texts
from kappatune_plugin.run.interpolate import STEPS as DIAL_STEPS
from kappatune_plugin.study.summary import interval as summary_interval

TASKS = {
    "irony": ("Tweet: {}\nIs it ironic?", " no", " yes"),
    "sst2": ("Review: {}\nSentiment:", " bad", " good"),
}
TITLES = {"irony": "Irony of tweets", "sst2": "SST-2, the tone of film reviews"}
RUN = ("task", "arm", "replay", "seed")
ARMS = {
    "lowest_mlp": (KappaTuneConfig(task_type="CAUSAL_LM", k=9, include=["mlp"]), 5e-4),
    "lora": (LoraConfig(task_type="CAUSAL_LM", r=26, target_modules="all-linear"), 5e-4),
    "lowest": (KappaTuneConfig(task_type="CAUSAL_LM", k=21), 5e-4),
    "full": (None, 5e-5),
}
STEPS, BATCH, LONGEST = 40, 8, 25
# runs to time the dial by: few steps, that change as much
TIMED_STEPS, FASTER = 10, 4
HELD_OUT, TEST, DOCUMENTS, UNSEEN, TOKENS = 64, 80, 80, 60, 128
# shares of all rows that are text which the base wrote, and how many tokens such a text has
REPLAY, WRITTEN = (0.0, 0.25), 48
START = "<!-- benchmarks/dial.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results" / "dial.jsonl")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs" / "dial.md")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TITLES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--limits", nargs="+", type=float, default=[0.02, 0.05])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    # half the time of the defaults on a CPU: products of matrices in bfloat16, and attention without a fused kernel
    torch.set_float32_matmul_precision("medium")
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.time:
        for arm in args.arms:
            print(how_long(base, tokenizer, args.data, args.tasks[0], arm, args.limits[0]), flush=True)
        return
    records = Records(args.results)
    for replay, seed, task, arm in itertools.product(REPLAY, range(args.seeds), args.tasks, args.arms):
        run = dict(zip(RUN, (task, arm, replay, seed), strict=True))
        if not records.has(run):
            records.add(run, one_run(base, tokenizer, args.data, task, arm, replay, seed, args.limits))
    put(args.docs, START, summary(records.found))


def one_run(
    base: nn.Module, tokenizer: Any, data: Path, task: str, arm: str, replay: float, seed: int, limits: Sequence[float]
) -> list[dict[str, Any]]:
    """Train once, then scale back to each limit in both ways; a record for each, and one for what was trained."""
    run = Run.of(base, tokenizer, data, task, arm, replay, seed)
    changes = run.changes
    with measuring(run.model):
        measured = Measured(run, tokenizer, data, task)
        records = [{"mode": "base", **measured.now(changes, 0.0)}, {"mode": "trained", **measured.now(changes, 1.0)}]
        for limit, per_matrix in itertools.product(limits, (False, True)):
            record: dict[str, Any] = {"limit": limit, "asked": "per_matrix" if per_matrix else "one", "step": run.step}
            try:
                dialed, seconds = run.turned(limit, per_matrix)
                record |= {"mode": dialed.mode, "seconds": seconds, **measured.now()}
                record["alpha"] = float(np.median(list(dialed.alphas.values())))
            except KappaTuneError:
                # no scale above 0 keeps the limit
                record["mode"] = "none"
            records.append(record)
            changes.set(1.0)
    return [
        {key: round(value, 4) if type(value) is float else value for key, value in each.items()} for each in records
    ]


def how_long(base: nn.Module, tokenizer: Any, data: Path, task: str, arm: str, limit: float) -> str:
    """The dial's time in training steps of the same run, as a sentence."""
    run = Run.of(base, tokenizer, data, task, arm, 0.0, 0, TIMED_STEPS, FASTER)
    with measuring(run.model):
        dialed, seconds = run.turned(limit, True)
    return f"{arm}: the dial took as long as {seconds / run.step:.0f} training steps ({dialed.mode})"


@dataclass
class Run:
    """What was trained, and what the dial works with.

    Attributes:
        rows: of the task, those held out first; unseen: paragraphs that the dial doesn't get.
        within: tokens that the dial may read, as in a run.
        step: of training, in seconds of the process's own time: another program beside it doesn't count.
    """

    model: nn.Module
    changes: Changes
    rows: list[Any]
    controls: dict[str, list[Any]]
    unseen: list[str]
    within: int
    step: float
    seed: int

    @classmethod
    def of(
        cls,
        base: nn.Module,
        tokenizer: Any,
        data: Path,
        task: str,
        arm: str,
        replay: float,
        seed: int,
        steps: int = STEPS,
        faster: float = 1.0,
    ) -> "Run":
        """Train a copy of the base, at so many times the arm's rate."""
        prompt, *words = TASKS[task]
        train = random.Random(seed).sample(load(data / "tasks", task)[0], HELD_OUT + STEPS * BATCH)
        rows = row_documents(tokenizer, [(prompt.format(text), words[label]) for text, label in train])
        shown = rows[HELD_OUT : HELD_OUT + steps * BATCH]
        if replay:
            # as `data.replay` does it: as many rows of the task, and so many of the base's own text among them
            count = round(len(shown) * replay / (1 - replay))
            shown = shown + [[(ids, 1)] for ids in sample_base(base, tokenizer, count, WRITTEN, seed, 32)]
            random.Random(seed).shuffle(shown)
        (config, rate), started, steps = ARMS[arm], time.process_time(), len(shown) // BATCH
        model = trained(base, config, faster * rate, shown, seed, steps, BATCH)
        step = (time.process_time() - started) / steps
        changes = changes_of_checkpoint(base, model) if config is None else changes_of_adapter(model)
        paragraphs = wikitext(data, DOCUMENTS + UNSEEN, seed)
        controls = {"wikitext": control_documents(tokenizer, paragraphs[:DOCUMENTS], TOKENS, False)}
        within = int(2 * DIAL_STEPS * BATCH * np.mean([len(ids) for [(ids, _)] in rows]))
        return cls(model, changes, rows, controls, paragraphs[DOCUMENTS:], within, step, seed)

    def turned(self, limit: float, per_matrix: bool) -> tuple[Dialed, float]:
        """Scale back within `limit`; also how many seconds of the process's time it took."""
        started = time.process_time()
        settings = DialSettings(limit, per_matrix, within=self.within, seed=self.seed, quiet=True)
        dialed = turn_model(self.model, self.changes, self.rows[:HELD_OUT], self.controls, settings, BATCH)
        return dialed, time.process_time() - started


def load(folder: Path, task: str, longest: int = LONGEST) -> list[list[tuple[str, int]]]:
    """(text, label) of the rows to train on of at most so many words, and of those to test with."""
    return [[row for row in rows if len(row[0].split()) <= longest] for rows in _rows(folder, task)]


def wikitext(data: Path, count: int, seed: int) -> list[str]:
    """So many long paragraphs of WikiText-2's test part."""
    lines = (data / "text/wikitext-2/raw_test.txt").read_text("utf-8").splitlines()
    return random.Random(seed).sample([line.strip() for line in lines if len(line.split()) > 50], count)


def _rows(folder: Path, task: str) -> list[list[tuple[str, int]]]:
    def labelled(name: str) -> list[tuple[str, int]]:
        lines = (folder / "sent-conv" / name).read_text("latin-1").strip().split("\n")
        return [(line[2:].strip(), int(line[0])) for line in lines]

    if task == "sst2":
        return [labelled("stsa.binary.train"), labelled("stsa.binary.test")]
    parts = [
        [folder / "tweeteval" / "irony" / f"{part}_{kind}.txt" for kind in ("text", "labels")]
        for part in ("train", "test")
    ]
    found = [[file.read_text("utf-8").strip().split("\n") for file in pair] for pair in parts]
    return [[(text.strip(), int(label)) for text, label in zip(*pair, strict=True)] for pair in found]


class Measured:
    """Test rows and unseen control text of one run."""

    def __init__(self, run: Run, tokenizer: Any, data: Path, task: str) -> None:
        prompt, *words = TASKS[task]
        test = random.Random(0).sample(load(data / "tasks", task)[1], TEST)
        choices = [(prompt.format(text), word) for text, _ in test for word in words]
        documents = row_documents(tokenizer, choices)
        self.choices, self.labels = texts(run.model, documents, BATCH), [label for _, label in test]
        self.unseen: Texts = texts(run.model, control_documents(tokenizer, run.unseen, TOKENS, True), BATCH)
        run.changes.set(0.0)
        self.before = self.unseen.measured()

    def now(self, changes: Changes | None = None, alpha: float = 1.0) -> dict[str, float]:
        """Accuracy and loss of the test rows, and the rise of the unseen text, at `alpha` or as the model is."""
        if changes is not None:
            changes.set(alpha)
        nats = self.choices.measured().reshape(len(self.labels), -1)
        tokens = np.asarray(self.choices.tokens).reshape(nats.shape)
        right = np.arange(len(self.labels)), self.labels
        return {
            "accuracy": float((nats.argmin(1) == self.labels).mean()),
            "loss": float(nats[right].sum() / tokens[right].sum()),
            "rise": rise(self.before, self.unseen.measured(), self.unseen.tokens).mean,
        }


def summary(records: Sequence[dict[str, Any]]) -> str:
    """One scale a matrix against one for all, and a table a task, as the page on the dial shows them."""
    limits = sorted({each["limit"] for each in records if "limit" in each})
    lines = [sentence for limit in limits for sentence in compared(records, limit)]
    for task in sorted({each["task"] for each in records}):
        of_task = [each for each in records if each["task"] == task]
        base = next(each["accuracy"] for each in of_task if each["mode"] == "base")
        heads = ["trained", *(f"{limit:g}, {asked}" for limit in limits for asked in ("one", "per matrix"))]
        lines += ["", f"{TITLES[task]}; the base has {percent(base)} right:", ""]
        lines += [f"| | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
        for replay, arm in itertools.product(REPLAY, ARMS):
            runs = [each for each in of_task if (each["arm"], each["replay"]) == (arm, replay)]
            if runs:
                cells = [cell([each for each in runs if column(each) == head]) for head in heads]
                name = f"`{arm}:replay={replay:g}`" if replay else f"`{arm}`"
                lines.append(f"| {name} | {len({each['seed'] for each in runs})} | {' | '.join(cells)} |")
    return "\n".join(lines)


def column(record: dict[str, Any]) -> str:
    """The head of the column that a record belongs to."""
    return f"{record['limit']:g}, {record['asked'].replace('_', ' ')}" if "limit" in record else record["mode"]


def cell(records: Sequence[dict[str, Any]]) -> str:
    """Accuracy, loss and rise over seeds; runs in which no scale above 0 kept the limit are named."""
    kept = [each for each in records if each["mode"] != "none"]
    values = [
        interval([each[name] for each in kept], show)
        for name, show in (("accuracy", percent), ("loss", "{:.2f}".format), ("rise", "{:+.3f}".format))
    ]
    none = len(records) - len(kept)
    return ("; ".join(values) if kept else "") + (f" ({none} of {len(records)}: nothing kept)" if none else "")


def compared(records: Sequence[dict[str, Any]], limit: float) -> list[str]:
    """What a scale a matrix gains on test rows over one for all, run by run."""
    runs: dict[tuple, dict[str, dict[str, Any]]] = {}
    for each in records:
        if each.get("limit") == limit and each["mode"] != "none":
            runs.setdefault(tuple(each[name] for name in RUN), {})[each["asked"]] = each
    pairs = [(found["per_matrix"], found["one"]) for found in runs.values() if len(found) == 2]
    if not pairs:
        return []
    losses, rights = ([one[name] - each[name] for each, one in pairs] for name in ("loss", "accuracy"))
    rises = [[each["rise"] for each in side] for side in zip(*pairs, strict=True)]
    return [
        f"Within {limit:g} nats, over {len(pairs)} runs, one scale a matrix has a loss on test rows lower by "
        f"{interval(losses, '{:.2f}'.format)} nats a token",
        f"than one for all, and {interval([-each for each in rights], points)} points of accuracy; the rise of unseen "
        f"WikiText is {np.mean(rises[0]):+.3f} and {np.mean(rises[1]):+.3f}, above the limit in",
        f"{sum(each > limit for each in rises[0])} and {sum(each > limit for each in rises[1])} runs.",
    ]


def interval(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean, with the half width of its 95% t interval from three values on; "" for none."""
    if not values:
        return ""
    mean, half = summary_interval(values)
    return show(mean) if half is None or len(values) < 3 else f"{show(mean)} ± {show(half).lstrip('+')}"


def percent(share: float) -> str:
    return f"{share:.0%}"


def points(share: float) -> str:
    return f"{100 * share:+.1f}"


if __name__ == "__main__":
    main()
