"""PEFT and the Trainers write our card of an adapter of ours, where they would write a template of their own.

What is changed in other libraries, while none of them asks the method for its card:

- `peft.PeftModel.create_or_update_model_card`, which `save_pretrained` calls;
- `create_model_card` of `transformers.Trainer` and of TRL's trainers, which write over that one, at each checkpoint and
  before a push to the hub; Axolotl and LLaMA-Factory call it too.
"""

import functools
from pathlib import Path
from typing import Any

from peft import PeftModel

from kappatune_plugin.tuner.model import KappaTuneModel
from kappatune_plugin.tuner.plain_lora import decided

# what a reader needs to train the same, where there is no recipe
SETTINGS = (
    "learning_rate", "lr_scheduler_type", "weight_decay", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "bf16", "fp16", "seed",
)  # fmt: skip


def follow(peft: Any) -> None:
    """Have every PeftModel with an adapter of ours write its card."""
    real = peft.PeftModel.create_or_update_model_card

    @functools.wraps(real)
    def create(self: Any, output_dir: str) -> None:
        name = self.active_adapter if isinstance(self.active_adapter, str) else self.active_adapters[0]
        found = decided(self, name)
        if found is None:
            real(self, output_dir)
            return
        # what it needs takes long to load
        from kappatune_plugin.export.card import write_card

        config = {**self.peft_config[name].to_dict(), "selection": found.selection.to_dict()}
        settings = self.base_model.__dict__.get("trained_with")
        form = "kappatune" if isinstance(self.base_model, KappaTuneModel) else "lora"
        write_card(Path(output_dir), config, settings=settings, form=form)

    peft.PeftModel.create_or_update_model_card = create


def _of_trainers(trainer_class: type) -> None:
    real = trainer_class.create_model_card

    @functools.wraps(real)
    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        from kappatune_plugin.export.card import may_write_card

        model = self.accelerator.unwrap_model(self.model)
        ours = isinstance(model, PeftModel) and decided(model, model.active_adapters[0]) is not None
        if ours and not may_write_card(Path(self.args.output_dir)):
            return
        real(self, *args, **kwargs)
        if ours and self.is_world_process_zero():
            model.base_model.trained_with = {key: getattr(self.args, key) for key in SETTINGS if _plain(self.args, key)}
            model.create_or_update_model_card(self.args.output_dir)

    trainer_class.create_model_card = create


def _plain(args: Any, key: str) -> bool:
    return isinstance(getattr(args, key, None), str | int | float)


def of_transformers(module: Any) -> None:
    """Have the Trainer of `transformers.trainer` write it."""
    _of_trainers(module.Trainer)


def of_trl(module: Any) -> None:
    """Have the trainers of `trl.trainer.base_trainer` write it."""
    for each in list(vars(module).values()):
        if isinstance(each, type) and "create_model_card" in vars(each) and each.__module__ == module.__name__:
            _of_trainers(each)
