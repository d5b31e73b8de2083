"""Recipes for tests, on a tiny model and a handful of rows."""

import json
from dataclasses import fields
from pathlib import Path

import yaml

ROWS = [{"text": f"the cat {i} sat on the {word}", "label": i % 2} for i in range(8) for word in ("mat", "rug")]
FACTS = [{"question": "the cat sat on the", "answer": " mat"}, {"question": "yes no", "answer": " good"}]
CONTROL = [{"text": "the cat sat on the mat, yes. " * 3}, {"text": "no good mat"}, {"text": " "}]


def known(config: type, **settings: object) -> dict[str, object]:
    """Those of `settings` that this version's dataclass `config` has."""
    return {key: value for key, value in settings.items() if key in {field.name for field in fields(config)}}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, model: Path, **changes) -> dict:
    """A complete recipe whose data lies in `folder`; `changes` replace keys, None deletes one."""
    recipe = {
        "model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "learning_rate": "1e-2",
        "weight_decay": 0.1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "kappatune": {"k": 7},
        "data": {
            "train": {"path": str(write_rows(folder / "train.jsonl", ROWS))},
            "test": {"path": str(write_rows(folder / "test.jsonl", ROWS[:6]))},
            "prompt": "Say: {text}\nTone:",
            "completion": " {label}",
            "labels": {0: "bad", 1: "good"},
        },
        "forgetting": {
            "control": {"path": str(write_rows(folder / "control.jsonl", CONTROL))},
            "recall": {
                "path": str(write_rows(folder / "facts.jsonl", FACTS)),
                "prompt": "{question}",
                "completion": "{answer}",
            },
            "every": 2,
        },
        **changes,
    }
    return {key: value for key, value in recipe.items() if value is not None}


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
