"""After every optimizer step the trained values reach the base model, without the user adding anything.

Two ways, since neither is right alone. A plain PyTorch loop has only its optimizer: a hook after each step writes what
that optimizer holds. DeepSpeed's optimizer holds copies and brings those back after that hook, but a Trainer is
running, and its `on_optimizer_step` comes after.

What is changed in other libraries, and the version from which it isn't needed:

- `transformers.trainer.DEFAULT_CALLBACKS` gets a callback: while a Trainer has no list of a model's own callbacks.
- `transformers.Trainer._load_from_checkpoint` asks the tuner first: torch loads a checkpoint into an FSDP2 model past
  `load_state_dict` and ends with a KeyError where a key isn't there. While PEFT has no hook before loading.
- `transformers.PreTrainedModel.load_adapter` tells the tuner what it loaded: transformers 5 sets parameters past
  `load_state_dict`, earlier versions don't. While its loader calls no hook of the module that it fills.
- A learning rate scheduler's groups (`_match_groups`): transformers 5 makes the scheduler after DeepSpeed's optimizer.
"""

import functools
import weakref
from collections.abc import Set
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kappatune_plugin.distributed.unsupported import check_mode


class WritesThrough(Protocol):
    """What is told that a step happened."""

    model: nn.Module

    def write_through(self, everything: bool = False) -> None: ...

    def stepping(self, held: Set[int] | None = None) -> None: ...

    def stepped(self, held: Set[int]) -> None: ...

    def check_checkpoint(self, folder: str) -> None: ...

    def keep_selection(self, folder: str) -> None: ...

    def keep_float32(self) -> None: ...

    def take_over(self, missing: Set[str]) -> None: ...


_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_stepping: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hooks: list[Any] = []


def follow(tuner: WritesThrough) -> None:
    """Call `tuner.stepped` after each step of any optimizer, and `write_through` after that of any Trainer."""
    _followed.add(tuner)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
        _add_trainer_callback()
        _check_before_loading()
        _take_over_after_loading()


def in_step() -> bool:
    """Whether an optimizer is in its step, as L-BFGS is when it evaluates the model anew."""
    return bool(_stepping)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(each): each for group in optimizer.param_groups for each in group["params"]}
    # with a closure, the argument after the optimizer itself, the gradients come within the step
    has_closure = len(args) > 1 or kwargs.get("closure") is not None
    if not has_closure and any(each.grad is not None for each in held.values()):
        for tuner in list(_followed):
            tuner.stepping(held.keys())
    _stepping.add(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _stepping.discard(optimizer)
    # fused optimizers, and those that write to `.data`, leave a tensor's version as it was
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for tuner in list(_followed):
        tuner.stepped(held)


def _tuners_of(model: nn.Module | None) -> list[WritesThrough]:
    """Those whose model is `model` or inside it: a user's module may hold a PeftModel, or a model PEFT's layers."""
    modules = set() if model is None else set(model.modules())
    return [tuner for tuner in _followed if tuner.model in modules]


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
            for tuner in _tuners_of(model):
                tuner.keep_float32()

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
        ) -> None:
            # DeepSpeed's optimizer holds copies, which say nothing of what they are copies of
            for tuner in _tuners_of(model):
                tuner.stepping()

        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
        ) -> None:
            for tuner in _tuners_of(model):
                tuner.write_through(everything=True)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **others: Any
        ) -> None:
            for tuner in _tuners_of(model):
                check_mode(model, args)
                if isinstance(others.get("lr_scheduler"), LambdaLR):
                    _match_groups(others["lr_scheduler"])
                # DeepSpeed loads a checkpoint into its own copies, past load_state_dict
                tuner.write_through(everything=True)

        def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
            for tuner in _tuners_of(model):
                tuner.keep_selection(f"{args.output_dir}/checkpoint-{state.global_step}")

    trainer.DEFAULT_CALLBACKS.append(KappaTuneWriteThrough)


def _check_before_loading() -> None:
    """Have every Trainer ask its tuner before it loads a checkpoint."""
    try:
        from transformers import Trainer
    except ImportError:
        return
    real = Trainer._load_from_checkpoint

    @functools.wraps(real)
    def load(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        for tuner in _tuners_of(self.model):
            tuner.check_checkpoint(resume_from_checkpoint)
        real(self, resume_from_checkpoint, *args, **kwargs)

    Trainer._load_from_checkpoint = load


def _take_over_after_loading() -> None:
    """Have every model of transformers tell its tuner of an adapter that it has loaded."""
    try:
        from transformers.integrations.peft import PeftAdapterMixin
    except ImportError:
        return
    real = PeftAdapterMixin.load_adapter

    @functools.wraps(real)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        info = real(self, *args, **kwargs)
        for tuner in _tuners_of(self):
            tuner.take_over(set(getattr(info, "missing_keys", ())))
        return info

    PeftAdapterMixin.load_adapter = load
