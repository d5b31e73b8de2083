"""The study behind docs/RESULTS-small-models.md: every method on the quickstart model and on two small pretrained ones.

The pretrained models and their data are local copies in the folder that --data names (default: shared/data beside the
repository): models/tinystories-656k, models/tinystories-656k-upcycled-moe-DERIVED, tasks/sent-conv/{stsa.binary.train,
subj.all}, text/tinystories/ts_2m.txt. Killed and started again it goes on where it was.

    python benchmarks/study.py [--settings quickstart quickstart-target dense-subj ...] --results docs/results
    python benchmarks/results.py    # writes the page from docs/results/*.json

benchmarks/study_real.py and benchmarks/study_gpu.py do it with real models.
"""

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compact import compact, read

from kappatune_plugin.files import write_text
from kappatune_plugin.study.session import Asked, compare_session, sweep_session

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = {"dense": "tinystories-656k", "moe": "tinystories-656k-upcycled-moe-DERIVED"}
# file, words of the labels, what comes before the word
TASKS = {
    "sst2": ("stsa.binary.train", ("bad", "good"), "{sentence}\nThis was "),
    "subj": ("subj.all", ("told", "felt"), "{sentence}\nThis was "),
}
LONGEST, TRAIN, TEST, STORIES = 14, 1400, 120, 10
# lowest_mlp is not among them: all that lowest takes here are experts
QUICKSTART = "lowest,highest,random,shape_matched_random,random_mlp,attention_only,lora,lora_mlp,osf,full"
TARGET = (
    "full,attention_only,osf,highest,lora,random,shape_matched_random,random_mlp,lowest,"
    "highest:rank_by=gain_over_forgetting,lowest:rank_by=kappa_over_null,lowest_per_type,highest:rank_by=log_volume"
)
EVERY_METHOD = f"lowest_mlp,{QUICKSTART}"
# other ways to choose matrices, and the same with routers left out
CHOICES = (
    "lowest,highest,random,shape_matched_random,lowest_mlp,random_mlp,highest_mlp,attention_only,lowest_per_type,"
    "lowest:rank_by=kappa_over_null,highest:rank_by=log_volume,highest:rank_by=gain_over_forgetting"
)
NO_ROUTERS = "lowest:exclude=[router]"
BUDGETS = "10%,25%,50%,100%"


@dataclass(frozen=True)
class Run:
    """A comparison, or with `sweep` a sweep over the budgets that `methods` then are.

    `every` is steps between measurements, `target` the training loss to compare at (None: the worst run's best).
    """

    methods: str
    rates: str
    steps: int
    every: int
    target: float | None = None
    smooth: int = 8
    widen: int = 0
    stop_at_target: bool = False
    sweep: bool = False


# The given targets of the pretrained models are a little above the loss of who guesses the label and knows the rest:
# ln 2 / 3 = .231 on Subj, ln 2 / 2 = .347 on SST-2, and with the routers' loss .04 more. That of the quickstart, whose
# base knows the end token, is .22 nats a label: half of its tokens are labels, and the routers' loss is .04.
RUNS = {
    "quickstart": Run(QUICKSTART, "1e-3,3e-3", 100, 50, 0.15),
    # every method at the lower rate until it is there, and other ways to choose
    "quickstart-target": Run(TARGET, "1e-3", 400, 400, 0.15, stop_at_target=True),
    "quickstart-sweep": Run(BUDGETS, "1e-3", 100, 50, 0.15, sweep=True),
    "dense-subj": Run(EVERY_METHOD, "1e-3,3e-3", 120, 40, smooth=16, widen=2),
    "moe-subj": Run(EVERY_METHOD, "1e-3,3e-3", 120, 40, smooth=16, widen=2),
    "dense-sst2": Run(EVERY_METHOD, "1e-3,3e-3", 80, 40, 0.36, 16),
    "moe-sst2": Run(EVERY_METHOD, "1e-3,3e-3", 80, 40, 0.4, 16),
    # every choice of matrices at one rate
    "dense-subj-choices": Run(CHOICES, "3e-3", 120, 40, 0.235, 16),
    "moe-subj-choices": Run(f"{CHOICES},{NO_ROUTERS}", "3e-3", 120, 40, 0.285, 16),
    "moe-subj-sweep": Run(BUDGETS, "3e-3", 120, 40, 0.285, 16, sweep=True),
}


def sentences(source: Path, folder: Path) -> list[Path]:
    """A seeded sample of the short sentences of a file of lines "1 some words", as train.jsonl and test.jsonl."""
    # not splitlines, which in latin-1 also splits at characters inside lines
    lines = source.read_text(encoding="latin-1").split("\n")
    short = [line for line in lines if 1 < len(line.split()) <= LONGEST + 1]
    rows = [{"sentence": line[2:].strip(), "label": int(line[0])} for line in short]
    random.Random(0).shuffle(rows)
    return [
        write(rows[:TRAIN], folder / "train.jsonl"),
        write(rows[TRAIN : TRAIN + TEST], folder / "test.jsonl"),
    ]


def stories(source: Path, target: Path, count: int = STORIES) -> Path:
    """The last `count` stories of a file that separates them by an end-of-text mark, written to `target`."""
    found = [text.strip() for text in source.read_text(encoding="utf-8").split("<|endoftext|>")]
    return write([{"text": text} for text in found if len(text) > 100][-count:], target)


def write(rows: list[dict], target: Path) -> Path:
    """Write `rows` to `target` as JSON lines."""
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
        "per_device_train_batch_size": 8,
        "kappatune.k": "35%",
        "data.train": json.dumps({"path": str(train)}),
        "data.test": json.dumps({"path": str(test)}),
        "data.prompt": prompt,
        "data.labels": json.dumps({"0": no, "1": yes}),
        "forgetting.control": json.dumps({"tinystories": {"path": str(control)}}),
        "forgetting.max_length": 64,
        "forgetting.batch_size": 32,
    }


def publish(source: Path, target: Path, names: Mapping[Path, str]) -> None:
    """Copy a comparison's JSON, `compact`, with this machine's folders replaced by the given `names`."""
    text = compact(read(source))
    for folder, name in {**names, REPOSITORY: "."}.items():
        text = text.replace(str(folder.resolve()), name).replace(str(folder), name)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)


def ask(name: str, data: Path, folder: Path, seeds: int) -> Asked:
    """The arguments of a setting's session, as its command line would give them."""
    run, (model, *task) = RUNS[name], name.split("-")
    recipe, changes = quickstart() if model == "quickstart" else pretrained(model, task[0], data, folder / "data")
    changes["max_steps"] = run.steps
    overrides = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    return Asked(
        recipe,
        overrides,
        seeds,
        run.rates,
        run.every,
        run.smooth,
        run.target,
        output_dir=folder,
        stop_at_target=run.stop_at_target,
        widen=run.widen,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--settings", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--methods", default=None, help="in the place of each setting's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--results", type=Path, default=None, help="a folder to copy each setting's JSON file to")
    args = parser.parse_args()
    for name in args.settings:
        # settings of one model and task share its folder, and with it the runs that both need
        folder, run = args.output / "-".join(name.split("-")[:2]), RUNS[name]
        session = sweep_session if run.sweep else compare_session
        session(ask(name, args.data, folder, args.seeds), args.methods or run.methods)
        if args.results is not None:
            file = "sweep.json" if run.sweep else "compare.json"
            publish(folder / file, args.results / f"{name}.json", {args.data: "data", args.output: "study"})


if __name__ == "__main__":
    main()
