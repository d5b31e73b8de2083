"""The model card (README.md) of a folder, written from the files in it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from kappatune_plugin.export import card_text
from kappatune_plugin.files import write_text
from kappatune_plugin.model_folder import CARD, CARD_MARK
from kappatune_plugin.recipe.public import public_yaml, without_paths

# what cards hold that a program wrote; a person's own card stays
OF_PROGRAMS = (CARD_MARK, "[More Information Needed]", "generated_from_trainer", "generated automatically")
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".yaml")


def may_write_card(folder: Path) -> bool:
    """Whether the card in `folder` is missing or a program's: one that a person wrote is left alone."""
    card = folder / CARD
    return not card.is_file() or any(mark in card.read_text(encoding="utf-8") for mark in OF_PROGRAMS)


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    merged: bool = False,
    settings: Mapping[str, Any] | None = None,
    more: str = "",
    files: Path | None = None,
    form: str = "kappatune",
) -> None:
    """Write the card of what lies in `folder`: an adapter, or what was made of one and loads without this package.

    It tells what was trained, what was measured (forgetting.json), what was taken back (interpolation.json) and the
    recipe (recipe.yaml), as far as those files are there. It names no path of this machine and holds no secret. A card
    that a person wrote stays.

    Args:
        config: of the adapter, as adapter_config.json holds it.
        merged: whether the folder holds a whole checkpoint.
        settings: how it was trained, where there is no recipe.yaml.
        more: a section to add, as Markdown.
        files: where those files are; default: `folder`.
        form: "lora" for an adapter that PEFT loads without this package.

    Raises:
        KappaTuneError: the card can't be written.
    """
    if not may_write_card(folder):
        return
    files = files or folder
    measured, recipe = _json(files / "forgetting.json"), _recipe(files, settings)
    base, title = public_name(config.get("base_model_name_or_path")), _title(config)
    sections = [
        card_text.first_words(config, base, merged),
        card_text.what_was_trained(config),
        card_text.forgetting(measured),
        card_text.pictures(folder),
        card_text.scaled_back(_json(files / "interpolation.json")),
        more,
        f"## Recipe\n\n```yaml\n{public_yaml(without_paths(recipe)).strip()}\n```" if recipe else "",
        card_text.how_to_use(config, base, merged, form),
    ]
    text = "\n\n".join(section for section in sections if section)
    data = _data(config, merged, measured, recipe, title)
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{CARD_MARK}\n\n# {title}\n\n{text}\n")
    ModelCard.load(folder / CARD)


def public_name(name: Any) -> str | None:
    """The hub's name of a model or data set; None for a folder or a file, which nobody else has."""
    if not isinstance(name, str) or Path(name).expanduser().exists() or name.endswith(DATA_FILES):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _title(config: Mapping[str, Any]) -> str:
    name = Path(str(config.get("base_model_name_or_path") or "model")).name
    return f"{name}, fine-tuned" + (" with KappaTune" if config.get("selection") else "")


def _data(
    config: Mapping[str, Any], merged: bool, measured: Mapping[str, Any], recipe: Mapping[str, Any], title: str
) -> ModelCardData:
    task = PIPELINES.get(str(config.get("task_type")).rpartition(".")[2])
    datasets = [name for name in _sources(recipe) if public_name(name)]
    results = _results(measured, task or "text-generation", datasets)
    return ModelCardData(
        base_model=public_name(config.get("base_model_name_or_path")),
        library_name="transformers" if merged else "peft",
        pipeline_tag=task,
        tags=[str(config.get("peft_type", "peft")).rpartition(".")[2].lower()],
        datasets=datasets or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _results(measured: Mapping[str, Any], task: str, datasets: list[str]) -> list[EvalResult]:
    """What was measured of the weights in the folder, in the hub's form: as kept, where what was trained was not."""
    kept, found = measured.get("kept") or {}, []
    if row := measured.get("task"):
        where = datasets[0] if datasets else "the task's test rows"
        found.append((where, row["metric"], kept.get(f"task_{row['metric']}", row.get("after"))))
    for name, row in measured.get("control", {}).items():
        found.append((f"control: {name}", "loss", kept.get(f"{name}_loss", row.get("loss_after"))))
    for name, row in measured.get("lm_eval", {}).items():
        found.append((f"lm_eval: {name}", "accuracy", kept.get(f"lm_eval/{name}", row.get("after"))))
    return [
        EvalResult(
            # the hub's format holds results of one dataset_type together, under one name
            task_type=task, dataset_type=public_name(where) or re.sub(r"\W+", "-", where), dataset_name=where,
            metric_type=metric,
            metric_value=value, metric_name=f"{metric.replace('_', ' ')} after training",
        )
        for where, metric, value in found
        if value is not None
    ]  # fmt: skip


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    """Where the recipe's training rows come from."""
    train = (recipe.get("data") or {}).get("train")
    sources = train if isinstance(train, list) else [train]
    places = [each if isinstance(each, str) else (each or {}).get("path") for each in sources]
    places.append(recipe.get("dataset_name"))
    places += [each.get("path") for each in recipe.get("datasets") or () if isinstance(each, Mapping)]
    return list(dict.fromkeys(place for place in places if isinstance(place, str)))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _recipe(files: Path, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    path = files / "recipe.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else dict(settings or {})
