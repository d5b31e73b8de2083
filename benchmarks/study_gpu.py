"""The comparison of benchmarks/study.py on a larger pretrained mixture of experts, OLMoE-1B-7B in bfloat16 on one GPU.

Two tasks by their hub ids, irony in tweets (the paper's) and sentiment of film reviews, with WikiText-2 as the control.
Nobody has run it in full yet: the tests run it on a tiny mixture of experts on a CPU. By arithmetic full fine-tuning
needs most memory (6.9 billion parameters at 8 bytes, and the base beside it while KL is measured: about 70 GB); leave
it out of --methods on a smaller card. Killed and started again it goes on where it was.

    python benchmarks/study_gpu.py --results docs/results        # then python benchmarks/results.py
    python benchmarks/study_gpu.py --tasks irony --model PATH --data.train '{path: rows.jsonl}' --max_steps 100

Any key of the recipe (recipes/olmoe_sarcasm.yaml) may follow, as in `kappatune compare`; it then holds for every task.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from study import EVERY_METHOD, REPOSITORY, publish

from kappatune_plugin.study.session import Asked, compare_session

MODEL = "allenai/OLMoE-1B-7B-0924"
RECIPE = REPOSITORY / "recipes" / "olmoe_sarcasm.yaml"
STEPS = 300
TASKS = {
    "irony": {
        "data.train": {"path": "cardiffnlp/tweet_eval", "name": "irony", "split": "train"},
        "data.test": {"path": "cardiffnlp/tweet_eval", "name": "irony", "split": "test[:300]"},
    },
    "sst2": {
        "data.train": {"path": "stanfordnlp/sst2", "split": "train[:3000]"},
        "data.test": {"path": "stanfordnlp/sst2", "split": "validation[:300]"},
        "data.prompt": "Review: {sentence}\nSentiment:",
        "data.labels": {0: "negative", 1: "positive"},
    },
}


def overrides(task: str, model: str, given: Sequence[str]) -> list[str]:
    """A task's changes of the recipe as command-line words; the `given` ones take precedence."""
    changes = {"model_name_or_path": model, "max_steps": STEPS, **TASKS[task]}
    words = []
    for key, value in changes.items():
        if f"--{key}" not in given:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return [*words, *given]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a hub id or a folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", default=EVERY_METHOD)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rates", default="3e-5,1e-4")
    parser.add_argument("--widen", type=int, default=2)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--smooth", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/study-gpu"))
    parser.add_argument("--results", type=Path, default=None, help="a folder to copy each task's JSON file to")
    args, given = parser.parse_known_args(words)
    for task in args.tasks:
        folder = args.output / task
        changed = overrides(task, args.model, given)
        asked = Asked(RECIPE, changed, args.seeds, args.learning_rates, args.every, args.smooth, output_dir=folder)
        compare_session(replace(asked, widen=args.widen), args.methods)
        if args.results is not None:
            local = {Path(args.model): "model"} if Path(args.model).exists() else {}
            publish(folder / "compare.json", args.results / f"olmoe-{task}.json", {**local, args.output: "study"})


if __name__ == "__main__":
    main()
