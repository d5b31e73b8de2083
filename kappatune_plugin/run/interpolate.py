"""Scale back what a recipe trained until it keeps `forgetting.max_delta`: at the end of a run, or later."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from trl import SFTTrainer

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.export.card import write_card
from kappatune_plugin.files import write_text
from kappatune_plugin.forgetting.callback import ForgettingCallback
from kappatune_plugin.forgetting.measures import base_of, shown_as
from kappatune_plugin.forgetting.plot import plot_forgetting
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
from kappatune_plugin.forgetting.report import ForgettingReport
from kappatune_plugin.interpolation.dial import PER_MATRIX, TRAINED, Dialed, DialSettings
from kappatune_plugin.interpolation.find_changes import changes_of_adapter, changes_of_checkpoint
from kappatune_plugin.interpolation.interpolate import turn_model
from kappatune_plugin.interpolation.plot import plot_dial
from kappatune_plugin.interpolation.speech_losses import speech_texts
from kappatune_plugin.interpolation.texts import Texts
from kappatune_plugin.interpolation.token_losses import Piece, control_documents, row_documents, texts
from kappatune_plugin.model_folder import CARD, CARD_MARK, check_free, publish, staging
from kappatune_plugin.recipe.held_out import a_tenth, interpolates, texts_of, validation_rows
from kappatune_plugin.recipe.load_model import load_tokenizer
from kappatune_plugin.recipe.load_rows import load_data, task_examples
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.recipe.speech import collator_of, speech_task
from kappatune_plugin.run.evaluate import load_on_device, load_trained
from kappatune_plugin.run.output_dir import FORGETTING
from kappatune_plugin.tuner.adapter_folder import ADAPTER, ADAPTER_CONFIG, adapter_config, claims_adapter

RESULT, PICTURE = "interpolation.json", "interpolation.png"
# what was trained, whole: to scale it back to another limit later
WHOLE = "checkpoint-trained"
# scaling back takes no longer than so many training steps; below so many parameters it takes seconds
STEPS, SMALL = 60, 50_000_000


def turn_dial(
    recipe: Recipe, data: ForgettingData | None, held: Dataset | None, trainer: SFTTrainer, out: Console
) -> Dialed | None:
    """At the end of a run: scale back what was trained, measure what is kept, and write both beside the adapter.

    Args:
        held: rows held out from training; None for a run that keeps what it trained: then nothing is done.

    Raises:
        KappaTuneError: no scale above 0 keeps the limit, or the changes can't be scaled. What was trained is in the
            folder checkpoint-trained then, and whenever something was taken back.
    """
    if held is None:
        return None
    folder, model = Path(trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, ForgettingCallback))
    tokenizer = callback.probe.tokenizer
    mode = recipe.forgetting.interpolate or PER_MATRIX
    rows = _task_texts(recipe, held, tokenizer, model)
    within = _affordable(recipe, rows, model)
    quiet = out.quiet or trainer.args.disable_tqdm
    settings = DialSettings(recipe.forgetting.max_delta, mode == PER_MATRIX, within=within, quiet=quiet)
    try:
        changes = changes_of_adapter(model)
        controls = _control_documents(recipe, data, callback.probe)
        dialed = turn_model(model, changes, rows, controls, settings, recipe.forgetting.batch_size, out.print)
    except KappaTuneError as error:
        raise KappaTuneError(f"{error}\nWhat was trained is in {folder / WHOLE}; no adapter was saved.") from error
    report = callback.report
    with shown_as(None if quiet else "kept"):
        report.kept = {**callback.probe.measure(model), **callback.probe.divergences(model)}
    if trainer.is_world_process_zero():
        report.save(callback.path)
        write_result(dialed, folder)
        if dialed.mode == TRAINED:
            shutil.rmtree(folder / WHOLE)
    for sentence in dialed.sentences():
        out.print(f"- {sentence}", highlight=False, soft_wrap=True)
    return dialed


def write_result(dialed: Dialed, folder: Path) -> None:
    """Write interpolation.json and interpolation.png into `folder`."""
    dialed.save(folder / RESULT)
    plot_dial(dialed, folder / PICTURE)


def interpolate_trained(
    recipe: Recipe,
    place: str,
    output_dir: str | os.PathLike,
    max_delta: float,
    per_matrix: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Dialed, ForgettingReport]:
    """Scale back a model that was trained before from the recipe's, and write one of the same kind to `output_dir`.

    The folder appears under its name when it is complete, or not at all.

    Args:
        place: a folder with an adapter of this package, of LoRA or of another method whose change can be scaled; or a
            whole checkpoint.
        max_delta: most that the loss of each control may rise, in nats a token.
        overwrite: replace an `output_dir` that holds something.
        say: told how long it takes.

    Raises:
        KappaTuneError: no control, no rows held out from training, another base, no scale above 0 that keeps the
            limit, or what can't be loaded or written. Nothing is written then.
    """
    output_dir = Path(output_dir)
    held, data = _inputs(recipe, place, output_dir, overwrite)
    base = load_on_device(recipe)
    model = load_trained(recipe, place, base)
    adapter = claims_adapter(Path(place))
    changes = changes_of_adapter(model) if adapter else changes_of_checkpoint(base, model)
    tokenizer = load_tokenizer(recipe)
    probe = ForgettingProbe.build(recipe.forgetting, data, model, tokenizer)
    report = probe.new_report()
    with base_of(model):
        report.before = probe.measure(model)
    report.after = probe.measure(model)
    rows, controls = _task_texts(recipe, held, tokenizer, model), _control_documents(recipe, data, probe)
    settings = DialSettings(max_delta, per_matrix, within=_affordable(recipe, rows, model))
    dialed = turn_model(model, changes, rows, controls, settings, recipe.forgetting.batch_size, say)
    report.kept = probe.measure(model)
    with staging(output_dir) as folder:
        (_write_adapter if adapter else _write_checkpoint)(model, Path(place), folder)
        write_result(dialed, folder)
        report.save(folder / FORGETTING)
        plot_forgetting(report, folder)
        _write_card(folder, place, dialed)
        publish(folder, output_dir)
    return dialed, report


def _inputs(recipe: Recipe, place: str, output_dir: Path, overwrite: bool) -> tuple[Dataset, ForgettingData]:
    """The rows held out from training and the controls' texts; everything that is wrong before a model is loaded."""
    if recipe.forgetting is None or not recipe.forgetting.controls():
        raise KappaTuneError("There is no control to keep a limit on: add `forgetting: {control: self}` to the recipe.")
    check_free(output_dir, [Path(place), Path(recipe.model_args.model_name_or_path)], overwrite)
    if claims_adapter(Path(place)):
        _check_base(recipe, place)
    held = validation_rows(recipe)
    train, test = load_data(recipe)
    if held is None:
        if not interpolates(recipe):
            raise KappaTuneError(
                "There are no rows held out from training: this recipe trains on all of data.train. Add "
                "data.validation, with rows of the task that training didn't see (and no test rows)."
            )
        _, held = a_tenth(train)
    task = task_examples(recipe.data, test)
    return held, ForgettingData.load(recipe.forgetting, task, recipe.folder, speech_task(recipe, test))


def _check_base(recipe: Recipe, place: str) -> None:
    named, base = adapter_config(Path(place)).base_model_name_or_path, recipe.model_args.model_name_or_path
    if named and Path(named).resolve() != Path(base).resolve():
        raise KappaTuneError(
            f"'{place}' says that it was trained from '{named}', and the recipe's model is '{base}'. Give "
            f"--model_name_or_path {named}, or write into its adapter_config.json where that base is now."
        )


def _task_texts(recipe: Recipe, rows: Dataset, tokenizer: Any, model: nn.Module) -> Texts:
    """As TRL trains on them; those above its max_length are cut there."""
    if recipe.audio is not None:
        return speech_texts(model, collator_of(recipe), rows, recipe.forgetting.batch_size)
    pairs, end_token = texts_of(rows, tokenizer)
    longest = recipe.training_args.max_length
    documents = row_documents(tokenizer, pairs, end_token and (recipe.data or {}).get("end_token", True))
    cut = [[(ids[:longest], start)] for [(ids, start)] in documents if longest is None or start < longest]
    return texts(model, cut, recipe.forgetting.batch_size)


def _affordable(recipe: Recipe, rows: Texts, model: nn.Module) -> int | None:
    """The tokens that a model can read in the time of STEPS training steps; None for a small model.

    A step takes about as long as reading its tokens twice: most weights are frozen and need no gradient.
    """
    args = recipe.training_args
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        return None
    longest = args.max_length if args.packing else np.mean(rows.lengths)
    return int(2 * STEPS * longest * args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _control_documents(recipe: Recipe, data: ForgettingData, probe: ForgettingProbe) -> dict[str, list[list[Piece]]]:
    """Of text that the base wrote each sample is a document, of running text each block."""
    config, found = recipe.forgetting, {}
    for name, content in data.controls.items():
        if content is None or config.running_text:
            found[name] = [[(piece, 1)] for piece in probe.controls[name]]
        else:
            truncate = config.long_texts == "truncate"
            found[name] = control_documents(probe.tokenizer, content, config.max_length, truncate)
    return found


def _write_adapter(model: nn.Module, place: Path, folder: Path) -> None:
    """The folder of the adapter with the values that it has now, in the dtypes of the file."""
    before, now = load_file(place / ADAPTER), get_peft_model_state_dict(model)
    if before.keys() != now.keys():
        raise KappaTuneError(
            f"'{place}' holds other values than PEFT saves now, such as {sorted(before.keys() ^ now.keys())[0]}. Save "
            "it anew with this version of PEFT."
        )
    for file in place.iterdir():
        if file.is_file() and file.name != ADAPTER:
            shutil.copy2(file, folder)
    values = {name: now[name].detach().cpu().to(before[name].dtype).contiguous() for name in before}
    save_file(values, folder / ADAPTER, metadata={"format": "pt"})


def _write_checkpoint(model: nn.Module, place: Path, folder: Path) -> None:
    """As `save_pretrained` does, with what else the checkpoint's folder holds but its weights."""
    model.save_pretrained(folder)
    there = {file.name for file in folder.iterdir()}
    for file in place.iterdir() if place.is_dir() else ():
        if file.is_file() and file.name not in there and file.suffix not in (".safetensors", ".bin", ".pt"):
            if not file.name.endswith(".index.json"):
                shutil.copy2(file, folder)


def _write_card(folder: Path, place: str, dialed: Dialed) -> None:
    """Say in the model's card what was done."""
    if claims_adapter(Path(place)):
        write_card(folder, json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else "# Model card\n"
    if CARD_MARK in text:
        return
    lines = "\n".join(f"- {sentence}" for sentence in dialed.sentences())
    write_text(
        card,
        f"{text.rstrip()}\n\n## Scaled back\n\nThis is `{Path(place).name}` with what was trained scaled back towards "
        f"its base by `kappatune interpolate`, a scale for each weight in {RESULT}.\n\n{lines}\n",
    )
