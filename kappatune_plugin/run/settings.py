"""What can be told of a recipe's settings before anything is loaded, and TRL doesn't tell."""

import math
import os
from collections.abc import Iterator

import torch
from torch.optim import SGD
from transformers import get_scheduler
from trl import SFTConfig

WHOLE, POSITIVE, NOT_NEGATIVE = "a whole number from 1 on", "a number above 0", "a number from 0 on"
LEAST = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"),
        (1, WHOLE),
    ),
    **dict.fromkeys(("save_steps", "logging_steps", "eval_steps", "adam_epsilon"), (math.ulp(0), POSITIVE)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "adam_beta1", "adam_beta2"), (0, NOT_NEGATIVE)),
    "learning_rate": (0, f"{NOT_NEGATIVE}, such as 5.0e-5"),
}
# numpy's generators take no others
SEEDS = range(2**32)


def setting_problem(args: SFTConfig) -> str | None:
    """What is wrong with settings that TRL takes and no training works with; None if nothing is."""
    return " ".join(f"{key}: {getattr(args, key)} is not {expected}." for key, expected in _wrong(args)) or None


def _wrong(args: SFTConfig) -> Iterator[tuple[str, str]]:
    """Each setting that can't be, and what would be expected."""
    for key, value in vars(args).items():
        least, expected = LEAST.get(key, (-math.inf, "a finite number"))
        if isinstance(value, float) and not math.isfinite(value):
            yield key, expected
        elif isinstance(value, int | float) and value < least:
            yield key, expected
        elif key.endswith("_kwargs") and not isinstance(value, dict | None):
            yield key, "a mapping"
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(args, key) >= 1:
            yield key, "a number below 1"
    for key in ("seed", "data_seed"):
        if getattr(args, key) is not None and getattr(args, key) not in SEEDS:
            yield key, f"a whole number from 0 to {SEEDS[-1]}"
    if args.optim_args and not all("=" in part for part in args.optim_args.split(",")):
        yield "optim_args", "text such as 'betas=0.9, eps=1e-8'"
    if args.lr_scheduler_kwargs and isinstance(args.lr_scheduler_kwargs, dict):
        yield from _wrong_schedule(args)
    template = getattr(args, "chat_template_path", None)
    if template and template.endswith((".jinja", ".j2")) and not os.path.isfile(template):
        yield "chat_template_path", "a file that is there"
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        yield "num_train_epochs", POSITIVE


def _wrong_schedule(args: SFTConfig) -> Iterator[tuple[str, str]]:
    optimizer = SGD([torch.zeros(1, requires_grad=True)])
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        yield "lr_scheduler_kwargs", f"what {args.lr_scheduler_type} takes ({error})"
