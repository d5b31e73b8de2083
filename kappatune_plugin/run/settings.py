"""What can be told of a recipe's settings before anything is loaded, and TRL doesn't tell."""

import math
import os

from trl import SFTConfig


def setting_problem(args: SFTConfig) -> str | None:
    """What is wrong with settings that TRL takes and no training works with; None if nothing is."""
    at_least_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    wrong = [(key, "a whole number from 1 on") for key in at_least_1 if getattr(args, key) < 1]
    if not (math.isfinite(args.learning_rate) and args.learning_rate >= 0):
        wrong.append(("learning_rate", "a number from 0 on, such as 5.0e-5"))
    if not isinstance(args.dataset_kwargs, dict | None):
        wrong.append(("dataset_kwargs", "a mapping"))
    template = getattr(args, "chat_template_path", None)
    if template and template.endswith((".jinja", ".j2")) and not os.path.isfile(template):
        wrong.append(("chat_template_path", "a file that is there"))
    if args.max_steps <= 0 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        wrong.append(("num_train_epochs", "a number above 0"))
    return " ".join(f"{key}: {getattr(args, key)} is not {expected}." for key, expected in wrong) or None
