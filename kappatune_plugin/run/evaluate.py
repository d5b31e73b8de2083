"""What models trained before have learned and forgotten: adapters of any PEFT method, and whole checkpoints."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table
from torch import nn

from kappatune_plugin.console import number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_json
from kappatune_plugin.forgetting.measures import base_in_place, base_of, shown_as
from kappatune_plugin.forgetting.probe import ForgettingData, ForgettingProbe
from kappatune_plugin.forgetting.report import ForgettingReport, shown, shown_change
from kappatune_plugin.recipe.load_model import load_base, load_tokenizer
from kappatune_plugin.recipe.load_rows import load_test_rows, task_examples
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.recipe.speech import speech_task
from kappatune_plugin.scanning.cache import Cache, cache_folder, identity_of
from kappatune_plugin.tuner.adapter_folder import (
    ADAPTER_CONFIG,
    adapter_config,
    check_adapter,
    claims_adapter,
    load_adapter,
)
from kappatune_plugin.weights.model_source import ModelSource
from kappatune_plugin.weights.quantized import quantization_of


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        base: {"name", "hash"} of the model that the others were trained from.
        reports: place of each trained model -> what was measured of the base and of it.
    """

    base: dict[str, str]
    reports: dict[str, ForgettingReport]

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        models = {name: report.to_dict() for name, report in self.reports.items()}
        for content in models.values():
            del content["steps"]
        write_json(path, {"base": self.base, "models": models})

    def table(self) -> Table:
        """A row for each measure, a column for the base and for each model, with its change from the base."""
        reports = list(self.reports.values())
        titles = {"title": "What was learned, what was forgotten", "caption": reports[0].caption}
        table = Table("", "base", *_short(list(self.reports)), **titles)
        for title, key, count in reports[0].rows():
            before, *after = reports[0].before[key], *(report.after[key] for report in reports)
            changes = (f"{shown(value, count)} ({shown_change(value - before, count)})" for value in after)
            table.add_row(title, shown(before, count), *changes)
        for title, key in reports[0].divergence_rows():
            table.add_row(title, "0", *(number("{:.4f}", report.after[key]) for report in reports))
        return table


def evaluate(
    recipe: Recipe, places: Sequence[str], measured: Callable[[Evaluation], None] = lambda found: None
) -> Evaluation:
    """Measure the recipe's model and what was trained from it, by the recipe's blocks `data.test` and `forgetting`.

    Args:
        places: folders with an adapter or with a checkpoint of the same architecture; a name on the hub is a
            checkpoint's.
        measured: called after each of them with what is known so far. What was measured before is in the cache.

    Raises:
        KappaTuneError: nothing to measure, data or models that can't be loaded, an adapter of another base.
    """
    check_recipe(recipe, places)
    test = load_test_rows(recipe)
    task = task_examples(recipe.data, test)
    data = ForgettingData.load(recipe.forgetting, task, recipe.folder, speech_task(recipe, test))
    tokenizer, probe, reports, cache = load_tokenizer(recipe), None, {}, Cache(cache_folder())
    for place in places:
        # an adapter changes the model that it is put on: each gets its own
        base = load_on_device(recipe)
        if probe is None:
            named = {"name": recipe.model_args.model_name_or_path, "hash": ModelSource(base).base_hash()}
        model = load_trained(recipe, place, base)
        if probe is None:
            with shown_as("base"):
                probe = ForgettingProbe.build(recipe.forgetting, data, model, tokenizer)
                identity = identity_of(base, named["hash"], recipe.forgetting.batch_size)
                with base_of(model):
                    before = probe.measure(model, remember=partial(cache.remembered, identity))
        report = probe.new_report()
        with shown_as(place):
            report.before, report.after = before, {**probe.measure(model), **probe.divergences(model)}
        reports[place] = report
        measured(Evaluation(named, reports))
        del base, model
    return Evaluation(named, reports)


def check_recipe(recipe: Recipe, places: Sequence[str]) -> None:
    """Raise KappaTuneError if `evaluate` can't measure these, before anything is loaded."""
    problems = []
    if recipe.forgetting is None:
        problems.append("the block forgetting is missing: add `forgetting: {control: self}`.")
    if recipe.training_args.world_size > 1:
        problems.append(f"it runs on one process, and {recipe.training_args.world_size} are running.")
    if not places:
        problems.append("there is no model to measure: give the output_dir of a run.")
    problems += [f"'{place}' is given twice." for place in sorted({each for each in places if places.count(each) > 1})]
    for place in map(Path, places):
        if place.is_dir() and not any((place / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
            problems.append(
                f"'{place}' holds no {ADAPTER_CONFIG} and no config.json: it is no adapter and no checkpoint."
            )
        elif claims_adapter(place):
            try:
                adapter_config(place)
                check_adapter(place)
            except KappaTuneError as error:
                problems.append(str(error))
    if problems:
        raise KappaTuneError("\n  - ".join(["eval:", *problems]))


def load_on_device(recipe: Recipe, trained: str | None = None) -> nn.Module:
    """The base, or the checkpoint `trained`, where the recipe would train it."""
    model = load_base(recipe, trained)
    # bitsandbytes' models can't be moved, and are there already
    return model if quantization_of(model) else model.to(recipe.training_args.device)


def load_trained(recipe: Recipe, place: str, base: nn.Module) -> nn.Module:
    """The model at `place`, evaluated against `base` as PEFT's models are against theirs."""
    if claims_adapter(Path(place)):
        _warn_of_another_base(recipe, place)
        return load_adapter(base, Path(place))
    if quantization_of(base):
        raise KappaTuneError(
            f"'{place}' is a whole checkpoint, and the recipe's model is quantized: what that costs would be taken for "
            "forgetting. Give the adapter, or the model unquantized (--load_in_4bit false)."
        )
    model = load_on_device(recipe, place)
    ours, its = ({name: value.shape for name, value in each.named_parameters()} for each in (base, model))
    if ours != its:
        other = sorted(name for name in ours.keys() | its.keys() if ours.get(name) != its.get(name))
        raise KappaTuneError(
            f"'{place}' was not trained from '{recipe.model_args.model_name_or_path}': {len(other)} of its weights are "
            f"others or of other shape, such as {other[0]}."
        )
    model.disable_adapter = partial(base_in_place, model, base)
    return model


def _warn_of_another_base(recipe: Recipe, place: str) -> None:
    """Adapters of this package know their base by its values, others by its name alone."""
    named, base = adapter_config(Path(place)).base_model_name_or_path, recipe.model_args.model_name_or_path
    if named and Path(named).resolve() != Path(base).resolve():
        warnings.warn(f"'{place}' says that it was trained from '{named}'; it is measured on '{base}'.", stacklevel=2)


def _short(places: list[str]) -> list[str]:
    """The last part of each, where that tells them apart."""
    last = [Path(place).name for place in places]
    return last if len(set(last)) == len(last) else places
