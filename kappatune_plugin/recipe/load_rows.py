"""The rows that a recipe names, as a run trains on them and measures the task by them."""

from typing import Any

from datasets import Dataset, load_dataset
from trl import get_dataset

from kappatune_plugin.data.examples import choice_examples, own_choices, own_pairs, pairs, prompt_completion
from kappatune_plugin.data.rows import TEMPLATES, load_all_rows
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.forgetting.probe import Task
from kappatune_plugin.recipe.recipe import Recipe
from kappatune_plugin.recipe.speech import recordings
from kappatune_plugin.speech.recordings import RECORDING


def load_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, in a format that TRL knows, and the test rows as they were loaded.

    Raises:
        KappaTuneError: data that can't be loaded, or rows that the templates don't fit.
    """
    data = recipe.data
    if data is None:
        return _trl_data(recipe)
    return formatted_rows(recipe, "train"), load_test_rows(recipe)


def formatted_rows(recipe: Recipe, part: str) -> Dataset:
    """The rows of `data.train` or `data.validation` in a format that TRL knows. Raises what `load_data` does."""
    data = recipe.data
    if recipe.audio is not None:
        return recordings(recipe, part)
    rows = _formatted(load_all_rows(data[part], f"data.{part}", recipe.folder), _templates(data))
    return rows if data.get("max_chars") is None else _short_enough(rows, data["max_chars"])


def load_test_rows(recipe: Recipe) -> Dataset | None:
    """The rows of `data.test`, as they were loaded; None without them. Raises KappaTuneError if they can't be."""
    test = (recipe.data or {}).get("test")
    if not test:
        return None
    if recipe.audio is not None:
        return recordings(recipe, "test")
    if isinstance(test, dict):
        test = {key: value for key, value in test.items() if key not in TEMPLATES}
    return load_all_rows(test, "data.test", recipe.folder)


def eval_rows(recipe: Recipe, test: Dataset | None) -> Dataset | None:
    """The test rows in a format that TRL knows, if the recipe has the trainer evaluate."""
    if recipe.training_args.eval_strategy == "no" or test is None:
        return None
    return test if recipe.data is None else _formatted(test, _templates(recipe.data, test=True))


def task_examples(data: dict[str, Any] | None, test: Dataset | None, evaluated: bool = False) -> Task:
    """The test rows as examples to measure the task on; none without the block `data` or its test rows.

    Args:
        evaluated: whether the Trainer evaluates on them anyway: then plain texts are right there, and no task.

    Raises:
        KappaTuneError: rows that neither have templates nor a format of TRL's with a completion.
    """
    if data is None or test is None or RECORDING in test.column_names:
        # recordings are measured by their word errors
        return []
    templates = _templates(data, test=True)
    if templates.get("prompt") is not None:
        return (choice_examples if templates.get("labels") else pairs)(test, **templates)
    found = own_pairs(test)
    if found is None and not evaluated:
        raise KappaTuneError(
            f"data.test: its rows ({', '.join(test.column_names)}) can't be measured: they have no completion. Give "
            "the templates prompt and completion, rows with the columns prompt and completion or messages, or leave "
            "data.test out."
        )
    return own_choices(found, templates["labels"]) if found and templates.get("labels") else found or []


def _formatted(rows: Dataset, templates: dict[str, Any]) -> Dataset:
    return prompt_completion(rows, **templates) if "prompt" in templates else rows


def _templates(data: dict[str, Any], test: bool = False) -> dict[str, Any]:
    """The templates and labels of `data`; for the test rows, the templates that they have of their own go before."""
    found = {key: data[key] for key in (*TEMPLATES, "labels", "label_column") if data.get(key) is not None}
    own = data["test"] if test and isinstance(data.get("test"), dict) else {}
    return {**found, **{key: own[key] for key in TEMPLATES if key in own}}


def _short_enough(rows: Dataset, max_chars: int) -> Dataset:
    kept = rows.filter(lambda row: len(row["prompt"]) + len(row["completion"]) <= max_chars)
    if len(kept) == 0:
        raise KappaTuneError(f"data.max_chars: none of the {len(rows)} rows has {max_chars} characters or fewer.")
    return kept


def _trl_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """TRL's `datasets` or `dataset_name`, as `trl sft` loads them."""
    script = recipe.script_args
    splits = [script.dataset_train_split]
    if recipe.training_args.eval_strategy != "no":
        splits.append(script.dataset_test_split)
    try:
        if recipe.dataset_args.datasets:
            loaded = get_dataset(recipe.dataset_args)
        else:
            loaded = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (OSError, ValueError) as error:
        named = "datasets" if recipe.dataset_args.datasets else f"dataset_name '{script.dataset_name}'"
        raise KappaTuneError(f"Can't load {named}: {error}") from error
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise KappaTuneError(
            f"The data has no split {', '.join(missing)}; it has {', '.join(loaded)}. Set dataset_train_split or "
            "dataset_test_split."
        )
    return loaded[splits[0]], loaded[splits[1]] if len(splits) > 1 else None
