"""`kappatune sft` on real models and data: SST-2 sentiment, TinyStories as control, before and after.

Needs local copies of the models and texts, in the folder that --data names (default: shared/data beside the
repository): models/tinystories-656k, models/tinystories-656k-upcycled-moe-DERIVED, tasks/sent-conv/stsa.binary.*,
text/tinystories/ts_2m.txt.

    python benchmarks/real_models.py [--order lowest random highest] [--max_steps 300]
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from study import REPOSITORY, stories, write

from kappatune_plugin.recipe.recipe import load_recipe
from kappatune_plugin.run.train import run_sft

RECIPE = REPOSITORY / "recipes" / "sst2_tinystories.yaml"
# K = the share of matrices that the recipe's 5 of 14 is
MODELS = {"tinystories-656k": 5, "tinystories-656k-upcycled-moe-DERIVED": 10}


def sentences(source: Path, target: Path, limit: int | None = None) -> Path:
    """Lines "1 some words" as rows {"sentence", "label"}; a seeded sample of `limit` of them."""
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    if limit is not None:
        lines = random.Random(0).sample(lines, limit)
    return write([{"sentence": line[2:], "label": int(line[0])} for line in lines], target)


def overrides(data: Path, folder: Path, test_rows: int | None) -> list[str]:
    """What replaces the recipe's hub names by local files."""
    task = data / "tasks" / "sent-conv"
    train = sentences(task / "stsa.binary.train", folder / "train.jsonl")
    test = sentences(task / "stsa.binary.test", folder / "test.jsonl", test_rows)
    control = stories(data / "text" / "tinystories" / "ts_2m.txt", folder / "control.jsonl", 200)
    return [
        "--data.train",
        json.dumps({"path": str(train)}),
        "--data.test",
        json.dumps({"path": str(test)}),
        "--forgetting.control",
        json.dumps({"tinystories": {"path": str(control)}}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--order", nargs="+", default=["lowest"])
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--test_rows", type=int, default=None)
    args = parser.parse_args()
    table = Table("model", "trained", "steps", "task accuracy", "control loss", "control perplexity", "KL to the base")
    with tempfile.TemporaryDirectory() as folder:
        local = overrides(args.data, Path(folder), args.test_rows)
        for model, k in MODELS.items():
            for order in args.order:
                output = Path(folder) / f"{model}-{order}"
                settings = {
                    "model_name_or_path": args.data / "models" / model,
                    "output_dir": output,
                    "max_steps": args.max_steps,
                    "kappatune.k": k,
                    "kappatune.order": order,
                }
                flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
                run_sft(load_recipe(RECIPE, [*local, *flags]))
                table.add_row(model, f"{k} {order}", str(args.max_steps), *figures(output))
    Console(width=140).print(table)


def figures(output: Path) -> list[str]:
    """The before and after of a run's forgetting.json, as the table shows them."""
    found = json.loads((output / "forgetting.json").read_text())
    task, control = found["task"], found["control"]["tinystories"]
    return [
        f"{task['before']:.3f} -> {task['after']:.3f}",
        f"{control['loss_before']:.3f} -> {control['loss_after']:.3f}",
        f"{control['ppl_before']:.2f} -> {control['ppl_after']:.2f}",
        f"{control['kl_after']:.3f}",
    ]


if __name__ == "__main__":
    main()
