"""After every optimizer step the trained values reach the base model, without the user adding anything.

Two ways, since neither is right alone. A plain PyTorch loop has only its optimizer: a hook after each step sees that
values moved. DeepSpeed's optimizer holds copies of them and brings those back after that hook, but a Trainer is
running, and its `on_optimizer_step` comes after.
"""

import functools
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from kappatune_plugin.distributed.unsupported import check_mode


class WritesThrough(Protocol):
    """What is told that a step happened."""

    def write_through(self, everything: bool = False) -> None: ...

    def stepped(self) -> None: ...

    def check_checkpoint(self, folder: str) -> None: ...

    def keep_selection(self, folder: str) -> None: ...

    def keep_float32(self) -> None: ...


_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_hook: Any = None


def follow(tuner: WritesThrough) -> None:
    """Call `tuner.write_through()` after each optimizer step of any optimizer or transformers Trainer."""
    global _hook
    _followed.add(tuner)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
        _add_trainer_callback()
        _check_before_loading()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for tuner in list(_followed):
        tuner.stepped()


def _match_groups(scheduler: Any) -> None:
    """Let a learning rate scheduler forget the groups that DeepSpeed has taken out of its optimizer.

    transformers 4 makes the scheduler before DeepSpeed drops groups without parameters, here that of norms and biases,
    and newer torch doesn't step with more rates than groups (LoRA fails so too). All groups have one rate.
    """
    groups = len(scheduler.optimizer.param_groups)
    if len(set(scheduler.base_lrs)) == 1:
        scheduler.base_lrs = scheduler.base_lrs[:groups]
        scheduler.lr_lambdas = scheduler.lr_lambdas[:groups]


def _add_trainer_callback() -> None:
    """Give every Trainer made from now on the callback, through transformers' list of default callbacks."""
    try:
        from transformers import TrainerCallback, trainer
    except ImportError:
        # without transformers there is no Trainer to call it
        return

    class KappaTuneWriteThrough(TrainerCallback):
        """Writes trained values into the base model after each step, and those of a checkpoint before the first."""

        def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            tuner = getattr(model, "base_model", None)
            if tuner in _followed:
                tuner.keep_float32()

        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
        ) -> None:
            tuner = getattr(model, "base_model", None)
            if tuner in _followed:
                tuner.write_through(everything=True)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **others: Any
        ) -> None:
            tuner = getattr(model, "base_model", None)
            if tuner in _followed:
                check_mode(model, args)
                if isinstance(others.get("lr_scheduler"), LambdaLR):
                    _match_groups(others["lr_scheduler"])
                # DeepSpeed loads a checkpoint into its own copies, past load_state_dict
                tuner.write_through(everything=True)

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            tuner = getattr(model, "base_model", None)
            if tuner in _followed:
                tuner.keep_selection(f"{args.output_dir}/checkpoint-{state.global_step}")

    trainer.DEFAULT_CALLBACKS.append(KappaTuneWriteThrough)


def _check_before_loading() -> None:
    """Have every Trainer ask its tuner before it loads a checkpoint.

    torch loads one into an FSDP2 model past `load_state_dict`, and where a key isn't there ends with a KeyError.
    """
    try:
        from transformers import Trainer
    except ImportError:
        return
    real = Trainer._load_from_checkpoint

    @functools.wraps(real)
    def load(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        tuner = getattr(self.model, "base_model", None)
        if tuner in _followed:
            tuner.check_checkpoint(resume_from_checkpoint)
        real(self, resume_from_checkpoint, *args, **kwargs)

    Trainer._load_from_checkpoint = load
