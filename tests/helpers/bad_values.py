"""What people write by mistake, as YAML, as JSON and as words of a command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

# of any key of a recipe: numbers that are none, other types, texts that no file system, encoding or parser takes
YAML_VALUES = (
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e400",
    "1" * 5000,
    "2024-02-30",
    "2024-02-03",
    "12:30:59",
    "yes",
    "null",
    "''",
    "'~'",
    "'x y'",
    "[]",
    "[1, two]",
    "[null]",
    "{}",
    "{1: 2}",
    "{a: {b: [c]}}",
    '"a\\0b"',
    '"\\uD800"',
    "!!binary aGk=",
    "!!set {a, b}",
    "!!python/object:os.system x",
    "&a [*a]",
    "*nowhere",
    "[unclosed",
    "m" * 300,
    "/" * 3,
    "{" * 400 + "}" * 400,
)
RECIPE_KEYS = (
    *("model_name_or_path", "output_dir", "dtype", "learning_rate", "max_steps", "num_train_epochs", "seed", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "weight_decay", "max_grad_norm"),
    *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "warmup_steps", "lr_scheduler_type", "bf16"),
    *("packing", "report_to", "run_name", "eval_strategy", "resume_from_checkpoint", "overwrite_output_dir", "env"),
    *("chat_template_path", "dataset_kwargs", "model_init_kwargs", "trust_remote_code", "attn_implementation"),
    *("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "optim_args", "adam_beta1", "adam_epsilon"),
    *("kappatune", "data", "forgetting"),
    *(f"kappatune.{key}" for key in ("k", "order", "rank_by", "seed", "include", "exclude", "report", "selection")),
    *(f"kappatune.{key}" for key in ("modules_to_save", "scan_from", "auto", "gain")),
    *(
        f"data.{key}"
        for key in ("train", "validation", "test", "prompt", "completion", "labels", "replay", "end_token")
    ),
    *(f"forgetting.{key}" for key in ("control", "recall", "every", "max_samples", "max_length", "max_delta")),
    *(f"forgetting.{key}" for key in ("long_texts", "batch_size", "harness", "samples", "divergence")),
)
JSON_VALUES = (
    *("null", "true", "-1", "0", "1.5", "1e999", "NaN", "Infinity", "-Infinity", "1" + "0" * 400, '""', '"x"'),
    *("[]", "[1]", "[[]]", "{}", '{"a": 1}', '"\\u0000"', '"\\ud800"'),
)


def with_value(content: dict[str, Any], key: str, raw: str) -> str:
    """A recipe as YAML in which `key` ("kappatune.k") has the value `raw`, as it stands."""
    content = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    block, _, inner = key.partition(".")
    if not inner:
        content.pop(block, None)
        return f"{yaml.safe_dump(content, sort_keys=False)}{block}: {raw}\n"
    settings = content.pop(block, {})
    settings.pop(inner, None)
    lines = yaml.safe_dump({block: settings}, sort_keys=False) if settings else f"{block}:\n"
    return f"{yaml.safe_dump(content, sort_keys=False)}{lines}  {inner}: {raw}\n"


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside JSON `content`, of lists the first item's alone."""
    if path:
        yield path
    inside = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for key, value in inside:
        yield from places(value, (*path, key))


def damaged(text: str, place: tuple, raw: str) -> str:
    """The JSON `text` with the value at `place` replaced by `raw`, as it stands."""
    content = json.loads(text)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = "@@"
    return json.dumps(content).replace('"@@"', raw)


def write(path: Path, text: str | bytes) -> Path:
    """`path`, with `text` in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


NUMBERS = ("nan", "inf", "-inf", "-1", "abc", "", "0", "1e400", "9" * 5000, "1,,", "[1]")
BUDGETS = (
    *(
        "0",
        "-1",
        "1.5",
        "1000000",
        "abc",
        "",
        "%",
        "101%",
        "-5%",
        "nan%",
        "inf%",
        "[1]",
        "{}",
        "{a: 1}",
        "true",
        "null",
    ),
    *(
        "{params: -1}",
        "{params: nan}",
        "{kappa: .nan}",
        "{kappa: .inf}",
        "{params: 1, kappa: 2}",
        "9" * 5000,
        "{",
        "2024-02-30",
    ),
)
TEXTS = ("", " ", "nothing", "a\0b", "[", "ä" * 200, "../..", "~nobody/x", "{}", "%", "a=b", ",,")

NAN = float("nan")
API_CALLS = (
    *(
        ("condition_number", (w,), {}, "condition_number")
        for w in (None, 3, [[1.0]], torch.ones(2), torch.ones(2, 2, 2))
    ),
    *(("condition_number", (torch.ones(shape),), {}, "condition_number") for shape in ((0, 3), (3, 0), ())),
    *(
        ("condition_number", (torch.ones(2, 2, dtype=kind),), {}, "condition_number")
        for kind in (torch.int64, torch.complex64, torch.bool)
    ),
    *(("condition_number", (torch.eye(3),), {"rtol": value}, "rtol") for value in (0, 1, -1, NAN, 2.0)),
    *(("scan", (model,), {}, "scan") for model in (None, 3, {}, [], b"x")),
    *(("scan", (torch.nn.Linear(4, 4),), {"k": value}, "k") for value in (0, -1, "abc", 1.5, [], {"a": 1})),
    *(("scan", (torch.nn.Linear(4, 4),), {"rank_by": value}, "rank_by") for value in ("x", "", 3)),
    *(("scan", (torch.nn.Linear(4, 4),), {"include": value}, "include") for value in (["nothing"], "nothing", [3])),
    *(("KappaTuneConfig", (), {"k": value}, "k") for value in (0, -1, "abc", NAN, [], {"params": 0})),
    *(("KappaTuneConfig", (), {"order": value}, "order") for value in ("x", "", 3, None)),
    *(("KappaTuneConfig", (), {"rank_by": value}, "rank_by") for value in ("x", "", 3, None)),
    *(("KappaTuneConfig", (), {"seed": value}, "seed") for value in (-1, "x", NAN, 1.5, None)),
    *(("KappaTuneConfig", (), {"include": value}, "include") for value in (3, [3], {"a": 1})),
)
