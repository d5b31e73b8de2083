"""A recipe in, a trained adapter out: TRL's own SFTTrainer, run as `trl sft` runs it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from kappatune_plugin.checkpoint import checkpoint_to_resume
from kappatune_plugin.console import console
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.loading import cannot_load
from kappatune_plugin.modes import devices_problem, fsdp_problem
from kappatune_plugin.run_data import eval_rows, load_data, task_examples
from kappatune_plugin.versions import newer_tokenizer
from kappatune_plugin.watch import together

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from torch import nn
    from trl import SFTTrainer

    from kappatune_plugin.auto_callback import AutoBudgetCallback
    from kappatune_plugin.forgetting import ForgettingData, ForgettingProbe, ForgettingReport
    from kappatune_plugin.recipe import Recipe
    from kappatune_plugin.selection import Selection

# what may hold a secret isn't copied: output_dir gets published
SECRETS = ("token", "key", "secret", "password")


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output_dir: holds the adapter, selection.json, kappa_report.json, forgetting.json and recipe.yaml.
        trainer: after training.
        selection: what was trained.
        forgetting: what was measured; None for a recipe without the block.
    """

    output_dir: Path
    trainer: "SFTTrainer"
    selection: "Selection"
    forgetting: "ForgettingReport | None"


def needs_one_process(recipe: "Recipe") -> bool:
    """Whether `recipe` asks for what several processes can't do: `k: auto`, or measuring gain over forgetting."""
    from kappatune_plugin.gain_run import needs_gain

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
        _save_adapter(trainer)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script_args.dataset_name)
    if hasattr(trainer, "end"):
        # trackers stay open without it (transformers 5.18 and later)
        trainer.end()
    _say_the_end(out, output_dir, forgetting)
    _say_findings(out, recipe, trainer, selection, forgetting)
    return RunResult(output_dir, trainer, selection, forgetting)


def _save_adapter(trainer: "SFTTrainer") -> None:
    if trainer.is_fsdp_enabled:
        # with SHARDED_STATE_DICT the Trainer leaves parts for the same number of ranks, and no adapter
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(trainer.args.output_dir)


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, so that the error doesn't come after minutes of work.

    Raises:
        KappaTuneError: it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KappaTuneError(
            f"Can't write in '{folder}': {error.strerror}. Choose a folder that you may write to."
        ) from error


def _trainer(recipe: "Recipe", train: "Dataset", test: "Dataset | None") -> "SFTTrainer":
    """The trainer of trl/scripts/sft.py with `peft_config` in the place of LoRA's."""
    from trl import SFTTrainer

    from kappatune_plugin.gain_run import config_with_gain, needs_gain

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


def _tokenizer_error(recipe: "Recipe") -> ValueError | None:
    """What keeps the tokenizer from loading: TRL up to 0.24 asks for a processor, whose error doesn't say it."""
    try:
        load_tokenizer(recipe)
    except ValueError as error:
        return error
    return None


def load_base(recipe: "Recipe", trained: str | None = None) -> "nn.Module":
    """The recipe's model, or one that was `trained` from it, as SFTTrainer loads it from its name.

    Raises:
        KappaTuneError: it can't be loaded.
    """
    from trl.trainer.utils import create_model_from_path

    name, options = trained or recipe.model_args.model_name_or_path, model_init_kwargs(recipe)
    if trained is not None:
        del options["revision"]
    try:
        return create_model_from_path(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_load(name, error) from error


def load_tokenizer(recipe: "Recipe") -> Any:
    """The recipe's tokenizer."""
    from transformers import AutoTokenizer

    model = recipe.model_args
    options = {"revision": model.model_revision, "trust_remote_code": _trusts_remote_code(recipe)}
    return AutoTokenizer.from_pretrained(model.model_name_or_path, **options)


def _trusts_remote_code(recipe: "Recipe") -> bool:
    """TRL moved this key from ModelConfig to SFTConfig."""
    owners = (recipe.training_args, recipe.model_args)
    return any(getattr(owner, "trust_remote_code", False) for owner in owners)


def _forgetting_data(recipe: "Recipe", test: "Dataset | None") -> "ForgettingData | None":
    if recipe.forgetting is None:
        return None
    from kappatune_plugin.forgetting import ForgettingData

    return ForgettingData.load(recipe.forgetting, task_examples(recipe.data, test), recipe.folder)


def model_init_kwargs(recipe: "Recipe") -> dict[str, Any]:
    """How to load the recipe's model, as trl/scripts/sft.py gives it to `from_pretrained`."""
    from trl import get_quantization_config

    args, model = recipe.training_args, recipe.model_args
    quantization = get_quantization_config(model)
    return {
        **({"quantization_config": quantization} if quantization else {}),
        "revision": model.model_revision,
        "trust_remote_code": _trusts_remote_code(recipe),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }


def _measure_forgetting(
    recipe: "Recipe", data: "ForgettingData", trainer: "SFTTrainer", output_dir: Path
) -> "ForgettingReport":
    """Have `trainer` measure `data` before, during and after training."""
    from kappatune_plugin.forgetting import ForgettingCallback, ForgettingProbe

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
    from kappatune_plugin.auto_budget import levels, prefix_count
    from kappatune_plugin.auto_callback import AutoBudgetCallback
    from kappatune_plugin.budget import parse_budget

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
    tuner = trainer.model.base_model
    selection, report = tuner.selections["default"], tuner.reports["default"]
    if report is None:
        out.print(f"Training the {len(selection.units)} matrices of the selection given.")
    else:
        out.print(report.table(selection))
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
    from kappatune_plugin.diagnosis import findings

    if forgetting is not None and forgetting.budget is not None:
        for step in forgetting.budget["steps"]:
            out.print(f"Step {step['step']}, {step['action']}: {step['reason']}.", highlight=False, soft_wrap=True)
        out.print(f"The adapter holds {len(selection.units)} matrices.", highlight=False)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    target = (recipe.auto.target_loss or None) if recipe.auto else None
    max_delta = recipe.forgetting.max_delta if recipe.forgetting else None
    report = trainer.model.base_model.reports["default"]
    for finding in findings(losses, selection, report, forgetting, max_delta, target):
        out.print(f"- {finding}", highlight=False, soft_wrap=True)


def public_yaml(resolved: dict[str, Any]) -> str:
    """The recipe as YAML, without what may hold a secret: tokens, and environment variables named like one."""

    def public(content: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {key: value for key, value in content.items() if not str(key).lower().endswith(names)}

    resolved = public(resolved, ("hub_token",))
    if isinstance(resolved.get("env"), dict):
        resolved["env"] = public(resolved["env"], SECRETS)
    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120)
