"""The end of a run: no step too many, and an adapter that is whole."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.run.output_dir import UNFINISHED, publish, staging


class CheckpointsAnew(TrainerCallback):
    """A checkpoint that is written over an earlier one counts as incomplete until the last of its files is there.

    A kill would leave the new adapter beside the old optimizer, which is no state that any run was in.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Delete what the Trainer writes last, if it is about to save."""
        if control.should_save and state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / TRAINER_STATE_NAME).unlink(missing_ok=True)

    on_epoch_end = on_step_end


def train_to_the_end(trainer: SFTTrainer, resume: str | None, out: Console) -> None:
    """Train, or only end what was trained to its end: the Trainer would make one more step at `max_steps`."""
    if resume is not None:
        state = json.loads((Path(resume) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if state["global_step"] >= _planned_steps(trainer):
            out.print(f"All {state['global_step']} steps were trained before; what follows them is done.")
            _plan_no_more(trainer)
        trainer.add_callback(CheckpointsAnew)
    trainer.train(resume_from_checkpoint=resume)


def _plan_no_more(trainer: SFTTrainer) -> None:
    if hasattr(trainer.train_dataset, "__len__"):
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    else:
        # a stream has no epochs to count; an empty one ends at once
        trainer.train_dataset = trainer.train_dataset.take(0)


def _planned_steps(trainer: SFTTrainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def save_adapter(trainer: SFTTrainer, output_dir: Path) -> None:
    """Save what is trained now, so that a kill leaves the adapter that was there before or the new one whole.

    Collective. Raises KappaTuneError if it can't be written.
    """
    if trainer.is_fsdp_enabled:
        # with SHARDED_STATE_DICT the Trainer leaves parts for the same number of ranks, and no adapter
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    folder = staging(output_dir) if trainer.is_world_process_zero() else output_dir / UNFINISHED
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(folder), _internal_call=True)
    except (OSError, SafetensorError) as error:
        raise KappaTuneError(f"Can't save the adapter in '{output_dir}': {error}. Is the disk full?") from error
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        publish(folder, output_dir)
