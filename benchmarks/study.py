"""The study behind docs/RESULTS.md: every method on the quickstart model and on two small pretrained ones.

The pretrained models and their data are local copies in the folder that --data names (default: shared/data beside the
repository): models/tinystories-656k, models/tinystories-656k-upcycled-moe-DERIVED, tasks/sent-conv/{stsa.binary.train,
subj.all}, text/tinystories/ts_2m.txt. Killed and started again it goes on where it was.

    python benchmarks/study.py [--settings quickstart quickstart-target dense-subj ...] --results docs/results
    python benchmarks/results.py    # writes docs/RESULTS.md from docs/results/*.json

On a GPU the same with a larger pretrained mixture of experts: `kappatune compare --config recipes/olmoe_sarcasm.yaml`.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from kappatune_plugin.study.session import Asked, compare_session

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"dense": "tinystories-656k", "moe": "tinystories-656k-upcycled-moe-DERIVED"}
# file, words of the labels, what comes before the word
TASKS = {
    "sst2": ("stsa.binary.train", ("bad", "good"), "{sentence}\nThis was "),
    "subj": ("subj.all", ("told", "felt"), "{sentence}\nThis was "),
}
LONGEST, TRAIN, TEST, STORIES, SMOOTH = 14, 1000, 120, 10, 8
# lowest_mlp is not among them: all that lowest takes here are experts
ALL = "lowest,highest,random,shape_matched_random,random_mlp,attention_only,lora,lora_mlp,osf,full"
TARGET = (
    "full,attention_only,osf,highest,lora,random,shape_matched_random,random_mlp,lowest,"
    "highest:rank_by=gain_over_forgetting,lowest:rank_by=kappa_over_null,lowest_per_type,highest:rank_by=log_volume"
)
FEWER = "lowest,highest,random,lowest_mlp,random_mlp,attention_only,lora,full"
# methods, learning rates, steps, steps between measurements, target of the training loss (None: the worst run's best)
RUNS = {
    "quickstart": (ALL, "1e-3,3e-3", 100, 50, 0.3),
    # every method at the lower rate until it is there, and other ways to choose
    "quickstart-target": (TARGET, "1e-3", 400, 400, 0.3),
    "pretrained": (FEWER, "1e-3,3e-3", 64, 32, None),
}


def sentences(source: Path, folder: Path) -> list[Path]:
    """A seeded sample of the short sentences of a file of lines "1 some words", as train.jsonl and test.jsonl."""
    # not splitlines: in latin-1 it also parts lines at characters inside them
    lines = source.read_text(encoding="latin-1").split("\n")
    short = [line for line in lines if 1 < len(line.split()) <= LONGEST + 1]
    rows = [{"sentence": line[2:].strip(), "label": int(line[0])} for line in short]
    random.Random(0).shuffle(rows)
    return [
        write(rows[:TRAIN], folder / "train.jsonl"),
        write(rows[TRAIN : TRAIN + TEST], folder / "test.jsonl"),
    ]


def stories(source: Path, target: Path) -> Path:
    """The last stories of a file that parts them by an end-of-text mark."""
    found = [text.strip() for text in source.read_text(encoding="utf-8").split("<|endoftext|>")]
    return write([{"text": text} for text in found if len(text) > 100][-STORIES:], target)


def write(rows: list[dict], target: Path) -> Path:
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def quickstart() -> tuple[Path, dict]:
    """The recipe, and what is changed in it so that the study takes minutes."""
    return REPOSITORY / "recipes" / "quickstart.yaml", {
        "per_device_train_batch_size": 8,
        "data.test.split": "train[:80]",
        "forgetting.max_samples": 40,
        "forgetting.batch_size": 32,
    }


def pretrained(model: str, task: str, data: Path, folder: Path) -> tuple[Path, dict]:
    """recipes/sst2_tinystories.yaml on local files, for one of the models and tasks."""
    file, (no, yes), prompt = TASKS[task]
    folder.mkdir(parents=True, exist_ok=True)
    train, test = sentences(data / "tasks" / "sent-conv" / file, folder)
    control = stories(data / "text" / "tinystories" / "ts_2m.txt", folder / "control.jsonl")
    return REPOSITORY / "recipes" / "sst2_tinystories.yaml", {
        "model_name_or_path": data / "models" / MODELS[model],
        "kappatune.k": "35%",
        "data.train": json.dumps({"path": str(train)}),
        "data.test": json.dumps({"path": str(test)}),
        "data.prompt": prompt,
        "data.labels": json.dumps({"0": no, "1": yes}),
        "forgetting.control": json.dumps({"tinystories": {"path": str(control)}}),
        "forgetting.max_length": 64,
        "forgetting.batch_size": 32,
    }


def publish(source: Path, target: Path, data: Path, output: Path) -> None:
    """Copy a comparison without this machine's folders in it."""
    text = source.read_text(encoding="utf-8")
    for folder, name in ((data, "data"), (output, "study"), (REPOSITORY, ".")):
        text = text.replace(str(folder.resolve()), name).replace(str(folder), name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def main() -> None:
    names = [*list(RUNS)[:-1], *(f"{model}-{task}" for task in TASKS for model in MODELS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--settings", nargs="+", default=names, choices=names)
    parser.add_argument("--methods", default=None, help="in the place of each setting's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--results", type=Path, default=None, help="a folder to copy each compare.json to, by setting")
    args = parser.parse_args()
    for name in args.settings:
        folder = args.output / name
        methods, rates, steps, every, target = RUNS[name if name in RUNS else "pretrained"]
        if name in RUNS:
            recipe, changes = quickstart()
        else:
            recipe, changes = pretrained(*name.split("-"), args.data, folder / "data")
        changes["max_steps"] = steps
        overrides = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        asked = Asked(recipe, overrides, args.seeds, rates, every, SMOOTH, target, output_dir=folder)
        asked = replace(asked, stop_at_target=name == "quickstart-target")
        compare_session(asked, args.methods or methods)
        if args.results is not None:
            publish(folder / "compare.json", args.results / f"{name}.json", args.data, args.output)


if __name__ == "__main__":
    main()
