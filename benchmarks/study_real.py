"""The study on real models: who learns most within a limit of forgetting?

SmolLM2-135M-Instruct and Gemma 3 270M, dequantized from 4 bit by shared/data/pretrained.sh, and a mixture of experts
made of the former by benchmarks/mixture.py, learn a task beside WikiText-2 and text that the base writes as controls; a
task that isn't trained is asked by its labels. Each method has the best of three rates, then three seeds, and is scaled
back to each limit. Killed and started again it goes on where it was; settings may run side by side. With SmolLM2 a run
takes one to four minutes of one CPU core (a third of it training) and 7 GB, five runs a method; on an H100, 16 of them
side by side, 330 runs of SmolLM2, the mixture and Gemma took 10 minutes, at most 9 GB of its memory each. Methods that
a setting's results have already aren't run again: new ones are added to them.

    python benchmarks/study_real.py --models FOLDER [--settings smollm2-irony ...] --results docs/results
    python benchmarks/results.py
"""

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compact import compact, read
from dial import TASKS, load, wikitext
from study import REPOSITORY, publish, write

from kappatune_plugin.files import write_text
from kappatune_plugin.study.methods import split_list
from kappatune_plugin.study.session import Asked, compare_session

MODELS = {"smollm2": "smollm2-135m-instruct", "mixture": "smollm2-135m-mixture", "gemma3": "gemma-3-270m"}
RECIPE = REPOSITORY / "recipes" / "sst2_tinystories.yaml"
METHODS = (
    "lowest,highest,lowest_mlp,highest_mlp,random_mlp,random_mlp:seed=100,shape_matched_random,"
    "highest:rank_by=gain_over_forgetting,"
    "lora,lora_mlp,osf,full,lora:replay=0.25,full:replay=0.25,lowest_mlp:replay=0.25"
)
ESFT = ",highest:rank_by=expert_share,highest:rank_by=expert_gate,lowest:within=expert_share"
# the same without the end token, and with a scale for each matrix beside one for all: several times as long
NO_END, PER_MATRIX = "_no_end", "_per_matrix"
SETTINGS = {
    "smollm2-irony": METHODS,
    "smollm2-sst2": METHODS,
    "smollm2-gsm8k": METHODS,
    "mixture-irony": METHODS + ESFT,
    "mixture-sst2": METHODS + ESFT,
    "gemma3-irony": METHODS,
    f"smollm2-irony{NO_END}": "lowest_mlp,random_mlp,lora,full",
    f"smollm2-irony{PER_MATRIX}": "lowest_mlp,random_mlp,lora,lora_mlp,full",
    f"smollm2-sst2{PER_MATRIX}": "lowest_mlp,random_mlp,lora,lora_mlp,full",
}
# asked, and not trained
OTHER = {"irony": "sst2", "sst2": "irony", "gsm8k": "sst2"}
RATES, LIMITS, STEPS = "5e-5,1.5e-4,5e-4", "0.01,0.02,0.05,0.1", 40
TRAIN, TEST, ASKED, ROWS = 400, 64, 32, 4
# words of a tweet or review at most, and of a problem of GSM8K with its answer, of which there are HALF as many
LONGEST, LONGEST_PROBLEM, HALF = 16, 50, 2
# of the controls: paragraphs of WikiText-2, texts that the base writes, and tokens of each
PARAGRAPHS, WRITTEN, TOKENS = 32, 16, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", default=None, help="in the place of each setting's own")
    parser.add_argument("--seeds", type=int, default=3)
    # the one takes half the time of the other on some CPUs, and twice on others
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"), help="bf16: mixed precision")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("outputs/study-real"))
    parser.add_argument("--results", type=Path, default=None, help="a folder to copy each setting's JSON file to")
    args = parser.parse_args()
    # half the time of the defaults on a CPU
    torch.set_float32_matmul_precision("medium")
    for name in args.settings:
        folder = args.output / name
        target = None if args.results is None else args.results / f"{name}.json"
        known = read(target) if target is not None and target.exists() else None
        methods = missing(args.methods or SETTINGS[name], known)
        if not methods:
            continue
        changes = changed(name, args.models, args.data, folder / "data", args.precision) | {"max_steps": args.steps}
        asked = Asked(
            RECIPE,
            words_of(changes),
            args.seeds,
            RATES,
            args.steps,
            # limits decide, not a training loss: no run gets there, so none is repeated up to there
            target_loss=1e-9,
            output_dir=folder,
            scales="1",
            limits=LIMITS,
            kl=False,
        )
        compare_session(asked, methods)
        if target is not None:
            local = {args.data: "data", args.models: "models", args.output: "study"}
            publish(folder / "compare.json", folder / "published.json", local)
            write_text(target, compact(joined(known, read(folder / "published.json"), SETTINGS[name])))


def missing(methods: str, known: Mapping[str, Any] | None) -> str:
    """Those of `methods` that the results don't have."""
    there = () if known is None else [method["name"] for method in known["methods"]]
    return ",".join(name for name in split_list(methods) if name not in there)


def joined(known: Mapping[str, Any] | None, new: Mapping[str, Any], order: str) -> Mapping[str, Any]:
    """Results with the methods of `new` added, in the `order` of a list of methods.

    Raises:
        SystemExit: they are of other runs, or of a base that measures otherwise.
    """
    if known is None:
        return new
    other = [key for key in ("recipe", "settings", "hashes", "matched_parameters") if known[key] != new[key]]
    # processors round differently
    other += [key for key, value in known["before"].items() if abs(value - new["before"][key]) > 0.01 * abs(value)]
    if other:
        raise SystemExit(f"The results can't be added to: they differ in {', '.join(other)}. Write to another folder.")
    names = split_list(order)
    methods = [*known["methods"], *new["methods"]]
    methods.sort(key=lambda each: names.index(each["name"]) if each["name"] in names else len(names))
    return {**known, "methods": methods}


def changed(name: str, models: Path, data: Path, folder: Path, precision: str = "float32") -> dict[str, Any]:
    """What replaces the recipe's model, task and control."""
    model, task = name.removesuffix(twin(name)).split("-")
    folder.mkdir(parents=True, exist_ok=True)
    other_prompt, *other_words = TASKS[OTHER[task]]
    asked = load(data / "tasks", OTHER[task], LONGEST)[1]
    control = write([{"text": each} for each in wikitext(data, PARAGRAPHS, 0)], folder / "control.jsonl")
    recall = {
        "path": str(sampled(labelled(asked), ASKED, folder / "other.jsonl")),
        "prompt": other_prompt.replace("{}", "{sentence}"),
        "completion": "{label}",
        "labels": dict(enumerate(other_words)),
    }
    return {
        "model_name_or_path": str(models / MODELS[model]),
        "attn_implementation": "eager",
        "bf16": precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": ROWS,
        "kappatune.k": "10%",
        **(problems(data, folder) if task == "gsm8k" else labels(task, data, folder)),
        "data.end_token": not name.endswith(NO_END),
        "forgetting.control": {"wikitext": {"path": str(control)}, "self": "self"},
        "forgetting.recall": recall,
        "forgetting.max_length": TOKENS,
        "forgetting.long_texts": "truncate",
        "forgetting.samples": WRITTEN,
        "forgetting.batch_size": 16,
        # a recipe with a limit says how it is kept; the limits compared at are those of LIMITS
        **({"forgetting.max_delta": 0.05} if name.endswith(PER_MATRIX) else {}),
    }


def twin(name: str) -> str:
    """What tells a setting from another one of the same model and task; "" for those others."""
    return next((each for each in (NO_END, PER_MATRIX) if name.endswith(each)), "")


def labels(task: str, data: Path, folder: Path) -> dict[str, Any]:
    """The keys of a task of benchmarks/dial.py: one of two words is the answer."""
    prompt, *words = TASKS[task]
    train, test = map(labelled, load(data / "tasks", task, LONGEST))
    return {
        "data.train": {"path": str(sampled(train, TRAIN, folder / "train.jsonl"))},
        "data.test": {"path": str(sampled(test, TEST, folder / "test.jsonl"))},
        "data.prompt": prompt.replace("{}", "{sentence}"),
        "data.completion": "{label}",
        "data.labels": dict(enumerate(words)),
    }


def problems(data: Path, folder: Path) -> dict[str, Any]:
    """The keys of GSM8K: the answer is free, what was learned is its loss."""
    files = []
    for part, count in (("train", TRAIN // HALF), ("test", TEST // HALF)):
        lines = (data / "tasks" / "gsm8k" / f"{part}.jsonl").read_text("utf-8").splitlines()
        # without the calculator's marks
        rows = [{key: re.sub("<<.*?>>", "", text) for key, text in json.loads(line).items()} for line in lines]
        short = [row for row in rows if sum(len(text.split()) for text in row.values()) <= LONGEST_PROBLEM]
        files.append({"path": str(sampled(short, count, folder / f"{part}.jsonl"))})
    return {
        "data.train": files[0],
        "data.test": files[1],
        "data.prompt": "Question: {question}\nAnswer:",
        "data.completion": " {answer}",
        "data.labels": None,
        "per_device_train_batch_size": ROWS // HALF,
    }


def words_of(changes: Mapping[str, Any], given: Sequence[str] = ()) -> list[str]:
    """Changes of a recipe as command-line words; the `given` ones take precedence."""
    words = []
    for key, value in changes.items():
        if f"--{key}" not in given:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return [*words, *given]


def labelled(rows: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows as the templates name their columns."""
    return [{"sentence": text, "label": label} for text, label in rows]


def sampled(rows: list[dict[str, Any]], count: int, target: Path) -> Path:
    """So many of the rows, drawn, as JSON lines."""
    return write(random.Random(0).sample(rows, count), target)


if __name__ == "__main__":
    main()
