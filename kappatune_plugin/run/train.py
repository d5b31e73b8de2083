"""A recipe in, a trained adapter out: TRL's own SFTTrainer, run as `trl sft` runs it."""

import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import extract_tb

import torch
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from trl import SFTConfig, SFTTrainer

from kappatune_plugin.compat import newer_tokenizer
from kappatune_plugin.console import console
from kappatune_plugin.distributed.lost_ranks import together
from kappatune_plugin.distributed.unsupported import devices_problem, fsdp_problem
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import alone, write_text
from kappatune_plugin.forgetting.callback import ForgettingCallback
from kappatune_plugin.forgetting.measures import shown_as
from kappatune_plugin.forgetting.plot import plot_forgetting
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
from kappatune_plugin.forgetting.report import ForgettingReport
from kappatune_plugin.interpolation.dial import Dialed
from kappatune_plugin.recipe.held_out import hold_out, interpolates
from kappatune_plugin.recipe.load_model import (
    load_base,
    load_tokenizer,
    model_init_kwargs,
    quantizes_experts,
    tokenizer_error,
)
from kappatune_plugin.recipe.load_rows import eval_rows, load_data, task_examples
from kappatune_plugin.recipe.measure_on_rows import config_with_scores, needs_rows
from kappatune_plugin.recipe.public import public_yaml
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.recipe.speech import collator_of, speech_task
from kappatune_plugin.run.auto_budget import AutoBudgetCallback
from kappatune_plugin.run.diagnosis import findings
from kappatune_plugin.run.end_token import EndTokenCallback, EndTokenShare, leave_out_end_token
from kappatune_plugin.run.finish import save_adapter, train_to_the_end
from kappatune_plugin.run.interpolate import WHOLE, turn_dial
from kappatune_plugin.run.output_dir import (
    RECIPE,
    RESOLVED,
    check_output_dir,
    clear,
    holds_adapter,
)
from kappatune_plugin.run.replay import mix_replay
from kappatune_plugin.run.resume import checkpoint_to_resume
from kappatune_plugin.run.settings import setting_problem
from kappatune_plugin.scanning.cache import Cache, cache_folder, identity_of
from kappatune_plugin.selection.auto_budget import levels, prefix_count
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.selection.selection import Selection
from kappatune_plugin.selection.table import ranked_and_left_out, report_tables
from kappatune_plugin.tuner.config import LORA
from kappatune_plugin.tuner.layer import KappaTuneLayer
from kappatune_plugin.tuner.plain_lora import check_resumed, decided, peft_config_for
from kappatune_plugin.weights.load_model import cannot_load


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output_dir: holds the adapter, selection.json, kappa_report.json, forgetting.json and recipe.yaml.
        trainer: after training.
        selection: what was trained.
        forgetting: what was measured; None for a recipe without the block.
        end_token: what share of the task's loss before training was the end-of-text token.
        dialed: how what was trained was scaled back to keep `forgetting.max_delta`; None where it wasn't.
    """

    output_dir: Path
    trainer: SFTTrainer
    selection: Selection
    forgetting: ForgettingReport | None
    end_token: EndTokenShare | None = None
    dialed: Dialed | None = None


def needs_one_process(recipe: Recipe) -> bool:
    """Whether `recipe` asks for what several processes can't do: `k: auto`, or ranking by what its rows say."""
    return recipe.auto is not None or needs_rows(recipe.kappatune)


def run_sft(recipe: Recipe) -> RunResult:
    """Train as `recipe` says and write everything that the run decided to its output_dir.

    Raises:
        KappaTuneError: a mistake of the user that shows only now: data, model, checkpoint, or output_dir.
    """
    args = recipe.training_args
    if problem := devices_problem(args) or fsdp_problem(args) or setting_problem(args):
        raise KappaTuneError(problem)
    output_dir = Path(args.output_dir)
    resume = checkpoint_to_resume(args.resume_from_checkpoint, output_dir, args.save_only_model)
    model = recipe.model_args.model_name_or_path
    check_output_dir(output_dir, recipe.folder, model, resume is not None, recipe.overwrite)
    with alone(output_dir, "run") if args.process_index == 0 else nullcontext():
        result = _run(recipe, output_dir, resume)
    if args.push_to_hub:
        result.trainer.push_to_hub(dataset_name=recipe.script_args.dataset_name)
    return result


def _run(recipe: Recipe, output_dir: Path, resume: str | None) -> RunResult:
    train, test = load_data(recipe)
    train, held = hold_out(recipe, train)
    # before the model: what is wrong with it shows at once
    measured = _forgetting_data(recipe, test)
    trainer = _trainer(recipe, train, test)
    out = console(quiet=not trainer.is_world_process_zero())
    _say_dropped_rows(out, train, trainer)
    _say_slow_dtype(out, trainer.model)
    selection = _show_decisions(trainer, out)
    if resume is not None:
        check_resumed(trainer.model, Path(resume))
    # a finished run that is resumed stays as it is until there is another one to put in its place
    replaces = resume is not None and holds_adapter(output_dir)
    if recipe.overwrite and resume is None and trainer.is_world_process_zero():
        clear(output_dir)
    if not replaces:
        _write_decisions(recipe, trainer, output_dir)
    end_token = _finish_rows(recipe, trainer, train, resume, out)
    forgetting = _measure_forgetting(recipe, measured, trainer, output_dir, out) if measured else None
    if recipe.auto is not None:
        counts = forgetting.budget["start"], forgetting.budget["most"]
        out.print("k: auto starts with {} of these {} matrices.".format(*counts))
    with together("training", stop_stuck=False):
        train_to_the_end(trainer, resume, out)
        if recipe.auto is not None:
            selection = _settle_budget(trainer, forgetting)
        dialed = turn_dial(recipe, measured, held, trainer, out)
        save_adapter(trainer, output_dir)
    if replaces or recipe.auto is not None:
        _write_decisions(recipe, trainer, output_dir)
    if trainer.is_world_process_zero():
        if forgetting is not None:
            plot_forgetting(forgetting, output_dir)
        # now that what it tells of is measured
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(output_dir))
    if hasattr(trainer, "end"):
        # trackers stay open without it (transformers 5.18 and later)
        trainer.end()
    _say_the_end(out, output_dir, forgetting)
    _say_findings(out, recipe, trainer, selection, forgetting, end_token.found)
    return RunResult(output_dir, trainer, selection, forgetting, end_token.found, dialed)


def _finish_rows(
    recipe: Recipe, trainer: SFTTrainer, train: Dataset, resume: str | None, out: Console
) -> EndTokenCallback:
    """What the recipe does to the rows that TRL has prepared; returns what measures the end token in them."""
    if not recipe.end_token:
        leave_out_end_token(trainer)
    # of the task's rows, before others are among them
    callback = EndTokenCallback.of(trainer)
    trainer.add_callback(callback)
    if recipe.replay is not None:
        with together("making the texts of data.replay", stop_stuck=False):
            cost = mix_replay(recipe.replay, trainer, len(train), recipe.folder, resumes=resume is not None)
        out.print(cost, highlight=False, soft_wrap=True)
    return callback


def _say_slow_dtype(out: Console, model: nn.Module) -> None:
    """CPUs without instructions for bfloat16 take 6 to 11 times as long with it as with float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    lacks = found.get("architecture") == "x86_64" and not (found.get("avx512_bf16") or found.get("amx_bf16"))
    if lacks and model.device.type == "cpu" and model.dtype == torch.bfloat16:
        out.print(
            "This CPU has no instructions for bfloat16: with `dtype: float32` and `bf16: false` a step takes 6 to 11 "
            "times less.",
            style="yellow",
        )


def _say_dropped_rows(out: Console, train: Dataset, trainer: SFTTrainer) -> None:
    """TRL leaves out rows whose prompt fills max_length, where nothing of the completion would be trained."""
    args = trainer.args
    if args.packing or not hasattr(train, "__len__") or not hasattr(trainer.train_dataset, "__len__"):
        return
    dropped, limit = len(train) - len(trainer.train_dataset), f"max_length ({args.max_length} tokens)"
    if dropped == len(train):
        raise KappaTuneError(f"In all {dropped} training rows the prompt alone fills {limit}. Raise max_length.")
    if dropped > 0:
        out.print(
            f"{dropped} of {len(train)} training rows are left out: their prompt alone fills {limit}.", style="yellow"
        )


def _trainer(recipe: Recipe, train: Dataset, test: Dataset | None) -> SFTTrainer:
    """The trainer of trl/scripts/sft.py with `peft_config` in the place of LoRA's."""
    args, model, config = recipe.training_args, recipe.model_args, recipe.kappatune
    args.model_init_kwargs = model_init_kwargs(recipe)
    test = eval_rows(recipe, test)
    try:
        base = model.model_name_or_path
        measured = needs_rows(config)
        if measured or config.adapter == LORA or quantizes_experts(recipe):
            base = load_base(recipe)
            args.model_init_kwargs = None
        if measured:
            config = config_with_scores(recipe, base, load_tokenizer(recipe), train)
        if config.adapter == LORA:
            config = peft_config_for(base, config)
        data = {"train_dataset": train, "eval_dataset": test}
        if recipe.audio is not None:
            data["data_collator"] = collator_of(recipe)
            data["processing_class"] = data["data_collator"].processor
        trainer = SFTTrainer(model=base, args=args, peft_config=config, **data)
        _forget_secrets(args)
        return trainer
    except KappaTuneError:
        raise
    except (OSError, SafetensorError) as error:
        if args.push_to_hub and any(frame.name == "create_repo" for frame in extract_tb(error.__traceback__)):
            raise KappaTuneError(
                f"push_to_hub: can't make the repository: {error}\nLog in with `hf auth login`, or delete push_to_hub."
            ) from error
        raise cannot_load(model.model_name_or_path, error) from error
    except (RuntimeError, TypeError) as error:
        # transformers: the weights' shapes are not the config's, or model_init_kwargs that no model has
        if not re.search("ignore_mismatched_sizes|unexpected keyword argument", str(error)):
            raise
        raise cannot_load(model.model_name_or_path, error) from error
    except ValueError as error:
        hint = newer_tokenizer(tokenizer_error(recipe) or error)
        if hint is None:
            raise KappaTuneError(f"TRL can't train '{model.model_name_or_path}' so: {error}") from error
        raise KappaTuneError(f"Can't load the tokenizer of '{model.model_name_or_path}': {error} {hint}") from error


def _forget_secrets(args: SFTConfig) -> None:
    """The Trainer writes its arguments beside the adapter (training_args.bin), and pushes them with it."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
    # the last is transformers 4's
    args.hub_token = args.model_init_kwargs = args.push_to_hub_token = None


def _forgetting_data(recipe: Recipe, test: Dataset | None) -> ForgettingData | None:
    if recipe.forgetting is None:
        return None
    task = task_examples(recipe.data, test, evaluated=recipe.training_args.eval_strategy != "no")
    return ForgettingData.load(recipe.forgetting, task, recipe.folder, speech_task(recipe, test))


def _measure_forgetting(
    recipe: Recipe, data: ForgettingData, trainer: SFTTrainer, output_dir: Path, out: Console
) -> ForgettingReport:
    """Have `trainer` measure `data` before, during and after training."""
    # a processor, of a model that also sees, holds its tokenizer
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    with shown_as(None if trainer.args.disable_tqdm else "base"):
        probe = ForgettingProbe.build(recipe.forgetting, data, trainer.model, tokenizer)
    often = f", every {recipe.forgetting.every} steps" if recipe.forgetting.every else ""
    out.print(f"Measured before{often} and after: {probe.cost()}.", highlight=False, soft_wrap=True)
    if recipe.auto is None:
        callback = ForgettingCallback(probe, output_dir, recipe.forgetting.every)
    else:
        callback = _auto_callback(recipe, probe, trainer, output_dir)
    callback.trainer = trainer
    if trainer.args.world_size == 1:
        base = decided(trainer.model).selection.base["hash"]
        model = identity_of(trainer.model, base, recipe.forgetting.batch_size)
        callback.remember = partial(Cache(cache_folder()).remembered, model)
    # what the dial takes back is kept whole beside the adapter
    callback.save = partial(save_adapter, trainer, output_dir / WHOLE if interpolates(recipe) else output_dir)
    trainer.add_callback(callback)
    return callback.report


def _auto_callback(recipe: Recipe, probe: ForgettingProbe, trainer: SFTTrainer, output_dir: Path) -> AutoBudgetCallback:
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


def _settle_budget(trainer: SFTTrainer, forgetting: ForgettingReport) -> Selection:
    """Reduce the adapter to what `k: auto` trained in the end."""
    tuner = trainer.model.base_model
    tuner.keep_first(forgetting.budget["matrices"])
    return tuner.selections["default"]


def _trained_by_group(model: nn.Module) -> Counter[str]:
    """How many parameters of each type of matrix, and of each module beside them, are trained."""
    layers = (module for module in model.modules() if isinstance(module, KappaTuneLayer))
    units = {id(leaf): layer.unit.name for layer in layers for leaf in layer.leaves}
    groups = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            owner, lora, _ = place.partition(".lora_")
            matrix = units.get(id(parameter)) or (f"{owner}.weight" if lora else None)
            # under ZeRO-3 this process holds a part
            count = getattr(parameter, "ds_numel", parameter.numel())
            groups[layer_and_type(matrix)[1] if matrix else place] += count
    return groups


def _show_decisions(trainer: SFTTrainer, out: Console) -> Selection:
    found = decided(trainer.model)
    selection, report = found.selection, found.report
    if not selection.units:
        out.print("k: 0: no matrix is trained, only what modules_to_save names.")
    elif report is None:
        out.print(f"Training the {len(selection.units)} matrices of the selection given.")
    else:
        out.print(*report_tables(report, selection))
        counted = f"Of {len(report.units) + len(report.left_out)} matrices {ranked_and_left_out(report)}."
        out.print(counted, markup=False)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    groups = [f"{group} {count:,}" for group, count in _trained_by_group(trainer.model).items()]
    out.print(f"Trained parameters by group: {', '.join(groups)}.", highlight=False, markup=False, soft_wrap=True)
    return selection


def _write_decisions(recipe: Recipe, trainer: SFTTrainer, output_dir: Path) -> None:
    """Write what is trained, where possible before training: an interrupted run has it too."""
    if not trainer.is_world_process_zero():
        return
    decided(trainer.model).save(output_dir)
    write_text(output_dir / RECIPE, RESOLVED + public_yaml(recipe.resolved))


def _say_the_end(out: Console, output_dir: Path, forgetting: ForgettingReport | None) -> None:
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
    out: Console,
    recipe: Recipe,
    trainer: SFTTrainer,
    selection: Selection,
    forgetting: ForgettingReport | None,
    end_token: EndTokenShare | None,
) -> None:
    """What `k: auto` did, and the failure signatures that the run shows."""
    if forgetting is not None and forgetting.budget is not None:
        for step in forgetting.budget["steps"]:
            out.print(f"Step {step['step']}, {step['action']}: {step['reason']}.", highlight=False, soft_wrap=True)
        out.print(f"The adapter holds {len(selection.units)} matrices.", highlight=False)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    target = (recipe.auto.target_loss or None) if recipe.auto else None
    # a limit that is kept needs no advice
    max_delta = recipe.forgetting.max_delta if recipe.forgetting and not forgetting.kept else None
    report = decided(trainer.model).report
    adapter = recipe.kappatune.adapter
    for finding in findings(losses, selection, report, forgetting, max_delta, target, end_token, adapter):
        out.print(f"- {finding}", highlight=False, soft_wrap=True)
