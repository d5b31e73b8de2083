"""The study of benchmarks/study_real.py on larger models, from the hub and on one GPU: the same methods and limits.

OLMoE-1B-7B, DeepSeek-V2-Lite and Llama-3.2-3B in bfloat16 learn irony in tweets (the paper's task) or the tone of film
reviews, with WikiText-2 and text that the base writes as controls; the other task is asked by its labels. Nobody has
run it in full yet: the tests run it on tiny models of these kinds on a CPU. By arithmetic full fine-tuning needs most
memory (8 bytes a parameter, and the base beside it while KL is measured: about 70 GB with OLMoE, 32 GB with Llama, more
than a card has with DeepSeek, whose settings leave it out). Killed and started again it goes on where it was.

    python benchmarks/study_gpu.py --results docs/results        # then python benchmarks/results.py
    python benchmarks/study_gpu.py --settings olmoe-irony --models FOLDER --data.train '{path: rows.jsonl}'

Any key of the recipe (recipes/olmoe_sarcasm.yaml) may follow, as in `kappatune compare`, and holds for every setting.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study import REPOSITORY, publish
from study_real import ESFT, LIMITS, METHODS, OTHER, words_of

from kappatune_plugin.study.session import Asked, compare_session

MODELS = {
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "deepseek": "deepseek-ai/DeepSeek-V2-Lite",
    "llama32": "meta-llama/Llama-3.2-3B",
}
RECIPE = REPOSITORY / "recipes" / "olmoe_sarcasm.yaml"
RATES, STEPS = "3e-5,1e-4,3e-4", 300
# each task's rows to learn and to test with, the column of its text, its prompt and labels
TASKS = {
    "irony": (
        {"path": "cardiffnlp/tweet_eval", "name": "irony"},
        ("train", "test[:300]"),
        "Tweet: {text}\nSarcasm:",
        ("no", "yes"),
    ),
    "sst2": (
        {"path": "stanfordnlp/sst2"},
        ("train[:3000]", "validation[:300]"),
        "Review: {sentence}\nSentiment:",
        ("negative", "positive"),
    ),
}
WHOLE = ("full", "full:replay=0.25")
WITHOUT_FULL = ",".join(name for name in METHODS.split(",") if name not in WHOLE)
METHODS_OF = {"olmoe": METHODS + ESFT, "deepseek": WITHOUT_FULL + ESFT, "llama32": METHODS}
SETTINGS = {f"{model}-{task}": methods for model, methods in METHODS_OF.items() for task in TASKS}


def changed(setting: str, models: Path | None) -> dict[str, Any]:
    """What replaces the recipe's model, task and control; `models` has the models' folders in the place of the hub."""
    model, task = setting.split("-")
    rows, (train, test), prompt, words = TASKS[task]
    asked, (_, questions), question, answers = TASKS[OTHER[task]]
    return {
        "model_name_or_path": MODELS[model] if models is None else str(models / model),
        "max_steps": STEPS,
        "kappatune.k": "10%",
        "data.train": {**rows, "split": train},
        "data.test": {**rows, "split": test},
        "data.prompt": prompt,
        "data.labels": dict(enumerate(words)),
        "forgetting.control": {
            "wikitext": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
            "self": "self",
        },
        "forgetting.recall": {
            **asked,
            "split": questions,
            "prompt": question,
            "completion": " {label}",
            "labels": dict(enumerate(answers)),
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--models", type=Path, default=None, help=f"a folder with {', '.join(MODELS)}; else the hub")
    parser.add_argument("--methods", default=None, help="in the place of each setting's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rates", default=RATES)
    parser.add_argument("--widen", type=int, default=1)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--smooth", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/study-gpu"))
    parser.add_argument("--results", type=Path, default=None, help="a folder to copy each setting's JSON file to")
    args, given = parser.parse_known_args(words)
    for name in args.settings:
        asked = Asked(
            RECIPE,
            words_of(changed(name, args.models), given),
            args.seeds,
            args.learning_rates,
            args.every,
            args.smooth,
            output_dir=args.output / name,
            widen=args.widen,
            limits=LIMITS,
        )
        compare_session(asked, args.methods or SETTINGS[name])
        if args.results is not None:
            local = {args.output: "study"} if args.models is None else {args.models: "models", args.output: "study"}
            publish(args.output / name / "compare.json", args.results / f"{name}.json", local)


if __name__ == "__main__":
    main()
