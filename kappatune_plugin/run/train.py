"""A recipe in, a trained adapter out: TRL's own SFTTrainer, run as `trl sft` runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.console import console
from kappatune_plugin.distributed.lost_ranks import together
from kappatune_plugin.distributed.unsupported import devices_problem, fsdp_problem
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import check_writable, write_text
from kappatune_plugin.recipe.held_out import hold_out
from kappatune_plugin.recipe.load_model import _tokenizer_error, load_base, load_tokenizer, model_init_kwargs
from kappatune_plugin.recipe.load_rows import eval_rows, load_data, task_examples
from kappatune_plugin.recipe.recipe import public_yaml
from kappatune_plugin.run.interpolate import turn_dial
from kappatune_plugin.run.resume import checkpoint_to_resume
from kappatune_plugin.weights.load_model import cannot_load

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from trl import SFTTrainer

    from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
    from kappatune_plugin.forgetting.report import ForgettingReport
    from kappatune_plugin.interpolation.dial import Dialed
    from kappatune_plugin.recipe.recipe import Recipe
    from kappatune_plugin.run.auto_budget import AutoBudgetCallback
    from kappatune_plugin.selection.selection import Selection


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output_dir: holds the adapter, selection.json, kappa_report.json, forgetting.json and recipe.yaml.
        trainer: after training.
        selection: what was trained.
        forgetting: what was measured; None for a recipe without the block.
        dialed: how what was trained was scaled back to keep `forgetting.max_delta`; None where it wasn't.
    """

    output_dir: Path
    trainer: "SFTTrainer"
    selection: "Selection"
    forgetting: "ForgettingReport | None"
    dialed: "Dialed | None" = None


def needs_one_process(recipe: "Recipe") -> bool:
    """Whether `recipe` asks for what several processes can't do: `k: auto`, or measuring gain over forgetting."""
    from kappatune_plugin.recipe.measure_gain import needs_gain

    return recipe.auto is not None or needs_gain(recipe.kappatune)


def run_sft(recipe: "Recipe") -> RunResult:
    """Train as `recipe` says and write everything that the run decided to its output_dir.

    Raises:
        KappaTuneError: a mistake of the user that shows only now: data, model, checkpoint, or output_dir.
    """
    args = recipe.training_args
    if problem := devices_problem(args) or fsdp_problem(args):
        raise KappaTuneError(problem)
    output_dir = Path(args.output_dir)
    check_writable(output_dir)
    resume = checkpoint_to_resume(args.resume_from_checkpoint, output_dir, args.save_only_model)
    train, test = load_data(recipe)
    train, held = hold_out(recipe, train)
    # before the model: what is wrong with it shows at once
    measured = _forgetting_data(recipe, test)
    trainer = _trainer(recipe, train, test)
    out = console(quiet=not trainer.is_world_process_zero())
    selection = _write_decisions(recipe, trainer, output_dir, out)
    forgetting = _measure_forgetting(recipe, measured, trainer, output_dir) if measured else None
    if recipe.auto is not None:
        counts = forgetting.budget["start"], forgetting.budget["most"]
        out.print("k: auto starts with {} of these {} matrices.".format(*counts))
    with together("training", stop_stuck=False):
        trainer.train(resume_from_checkpoint=resume)
        if recipe.auto is not None:
            selection = _settle_budget(trainer, forgetting, output_dir)
        dialed = turn_dial(recipe, measured, held, trainer, out)
        _save_adapter(trainer)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script_args.dataset_name)
    if hasattr(trainer, "end"):
        # trackers stay open without it (transformers 5.18 and later)
        trainer.end()
    _say_the_end(out, output_dir, forgetting)
    _say_findings(out, recipe, trainer, selection, forgetting)
    return RunResult(output_dir, trainer, selection, forgetting, dialed)


def _save_adapter(trainer: "SFTTrainer") -> None:
    if trainer.is_fsdp_enabled:
        # with SHARDED_STATE_DICT the Trainer leaves parts for the same number of ranks, and no adapter
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(trainer.args.output_dir)


def _trainer(recipe: "Recipe", train: "Dataset", test: "Dataset | None") -> "SFTTrainer":
    """The trainer of trl/scripts/sft.py with `peft_config` in the place of LoRA's."""
    from trl import SFTTrainer

    from kappatune_plugin.recipe.measure_gain import config_with_gain, needs_gain

    args, model, config = recipe.training_args, recipe.model_args, recipe.kappatune
    args.model_init_kwargs = model_init_kwargs(recipe)
    test = eval_rows(recipe, test)
    try:
        base = model.model_name_or_path
        if needs_gain(config):
            base = load_base(recipe)
            config = config_with_gain(recipe, base, load_tokenizer(recipe), train)
            args.model_init_kwargs = None
        return SFTTrainer(model=base, args=args, train_dataset=train, eval_dataset=test, peft_config=config)
    except KappaTuneError:
        raise
    except (OSError, SafetensorError) as error:
        raise cannot_load(model.model_name_or_path, error) from error
    except RuntimeError as error:
        # transformers: the weights' shapes are not the config's
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise cannot_load(model.model_name_or_path, error) from error
    except ValueError as error:
        hint = newer_tokenizer(_tokenizer_error(recipe) or error)
        if hint is None:
            raise KappaTuneError(f"TRL can't train '{model.model_name_or_path}' so: {error}") from error
        raise KappaTuneError(f"Can't load the tokenizer of '{model.model_name_or_path}': {error} {hint}") from error


def _forgetting_data(recipe: "Recipe", test: "Dataset | None") -> "ForgettingData | None":
    if recipe.forgetting is None:
        return None
    from kappatune_plugin.forgetting.probe import ForgettingData

    return ForgettingData.load(recipe.forgetting, task_examples(recipe.data, test), recipe.folder)


def _measure_forgetting(
    recipe: "Recipe", data: "ForgettingData", trainer: "SFTTrainer", output_dir: Path
) -> "ForgettingReport":
    """Have `trainer` measure `data` before, during and after training."""
    from kappatune_plugin.forgetting.callback import ForgettingCallback
    from kappatune_plugin.forgetting.probe import ForgettingProbe

    # a processor, of a model that also sees, holds its tokenizer
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    probe = ForgettingProbe.build(recipe.forgetting, data, trainer.model, tokenizer)
    if recipe.auto is None:
        callback = ForgettingCallback(probe, output_dir, recipe.forgetting.every)
    else:
        callback = _auto_callback(recipe, probe, trainer, output_dir)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return callback.report


def _auto_callback(
    recipe: "Recipe", probe: "ForgettingProbe", trainer: "SFTTrainer", output_dir: Path
) -> "AutoBudgetCallback":
    from kappatune_plugin.run.auto_budget import AutoBudgetCallback
    from kappatune_plugin.selection.auto_budget import levels, prefix_count
    from kappatune_plugin.selection.budget import parse_budget

    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise KappaTuneError(
            "kappatune.k: auto runs in one process without DeepSpeed and FSDP, whose optimizers hold what rests too. "
            "Give a number, such as the one that `k: auto` finds on a smaller run."
        )
    tuner = trainer.model.base_model
    beside = tuner.peft_config["default"]
    if beside.modules_to_save or beside.trainable_token_indices:
        # a recipe that says so itself is refused before
        raise KappaTuneError(
            "kappatune.k: auto can't take back what the tokens that TRL adds have learned. Give a number, or use a "
            "chat template without new tokens."
        )
    units, report = tuner.selections["default"].units, tuner.reports["default"]
    eligible = len(units) if report is None else len(report.units)
    start = prefix_count(units, parse_budget(recipe.auto.start), eligible)
    counts = levels(start, len(units), recipe.auto.growth)
    limits = recipe.forgetting.every, recipe.auto, counts, recipe.forgetting.max_delta
    return AutoBudgetCallback(probe, output_dir, *limits)


def _settle_budget(trainer: "SFTTrainer", forgetting: "ForgettingReport", output_dir: Path) -> "Selection":
    """Reduce the adapter and selection.json to what `k: auto` trained in the end."""
    tuner = trainer.model.base_model
    tuner.keep_first(forgetting.budget["matrices"])
    selection = tuner.selections["default"]
    if trainer.is_world_process_zero():
        selection.save(output_dir / "selection.json")
    return selection


def _write_decisions(recipe: "Recipe", trainer: "SFTTrainer", output_dir: Path, out: "Console") -> "Selection":
    """Show and write what will be trained, before training: an interrupted run has it too."""
    from kappatune_plugin.selection.table import report_table

    tuner = trainer.model.base_model
    selection, report = tuner.selections["default"], tuner.reports["default"]
    if report is None:
        out.print(f"Training the {len(selection.units)} matrices of the selection given.")
    else:
        out.print(report_table(report, selection))
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
        selection.save(output_dir / "selection.json")
        if report is not None:
            report.save(output_dir / "kappa_report.json")
        write_text(output_dir / "recipe.yaml", public_yaml(recipe.resolved))
    return selection


def _say_the_end(out: "Console", output_dir: Path, forgetting: "ForgettingReport | None") -> None:
    if forgetting is not None:
        out.print(forgetting.table())
    else:
        out.print(
            "Nothing was measured. To see what is forgotten, add a block to the recipe: forgetting: {control: self}"
        )
    out.print(
        f"The adapter is in {output_dir}, a plain checkpoint comes from\n"
        f"  kappatune merge {output_dir} --output_dir {output_dir}-merged",
        highlight=False,
        soft_wrap=True,
    )


def _say_findings(
    out: "Console",
    recipe: "Recipe",
    trainer: "SFTTrainer",
    selection: "Selection",
    forgetting: "ForgettingReport | None",
) -> None:
    """What `k: auto` did, and the failure signatures that the run shows."""
    from kappatune_plugin.run.diagnosis import findings

    if forgetting is not None and forgetting.budget is not None:
        for step in forgetting.budget["steps"]:
            out.print(f"Step {step['step']}, {step['action']}: {step['reason']}.", highlight=False, soft_wrap=True)
        out.print(f"The adapter holds {len(selection.units)} matrices.", highlight=False)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    target = (recipe.auto.target_loss or None) if recipe.auto else None
    # a limit that is kept needs no advice
    max_delta = recipe.forgetting.max_delta if recipe.forgetting and not forgetting.kept else None
    report = trainer.model.base_model.reports["default"]
    for finding in findings(losses, selection, report, forgetting, max_delta, target):
        out.print(f"- {finding}", highlight=False, soft_wrap=True)
