"""The sections of a model card, as Markdown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kappatune_plugin.forgetting.report import SHARES, recall_title
from kappatune_plugin.selection.names import layer_and_type
from kappatune_plugin.version import __version__

PAPER = "[arXiv 2506.16289](https://arxiv.org/abs/2506.16289)"
NOT_IMPORTED = " (`KeyError: 'KAPPATUNE'` says that the package isn't imported)"
PICTURES = {"forgetting.png": "What was learned and forgotten", "interpolation.png": "What was kept"}


def first_words(config: Mapping[str, Any], base: str | None, merged: bool) -> str:
    """What it is, of which model."""
    what = "A plain checkpoint of" if merged else "An adapter of"
    of = f"[{base}](https://huggingface.co/{base})" if base else "a model that its author kept in a folder"
    if not (selection := config.get("selection")):
        return f"{what} {of}, trained by {config.get('peft_type')}."
    beside = ", ".join(sorted(config.get("modules_to_save") or ()))
    if not selection["units"]:
        return f"{what} {of}. KappaTune trained {beside} whole and no other weight: k is 0."
    shapes, rank = [unit["shape"] for unit in selection["units"]], config.get("r")
    numbers = sum(rank * sum(shape) if rank else shape[0] * shape[1] for shape in shapes)
    trained = f"trained a low-rank pair (r = {rank}) beside" if rank else "trained"
    order = f"{selection['order']} {selection['rank_by'].replace('_', ' ')}"
    return (
        f"{what} {of}. KappaTune ({PAPER}) {trained} {len(shapes)} of its weight matrices, "
        f"{numbers:,} numbers, chosen by {order} (k = {selection['k']}); every other weight is the base's."
    )


def what_was_trained(config: Mapping[str, Any]) -> str:
    """A row for each type of matrix: in which layers how many, and their condition numbers."""
    selection = config.get("selection")
    if not selection or not selection["units"]:
        return ""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for unit in selection["units"]:
        groups.setdefault(layer_and_type(unit["name"])[1], []).append(unit)
    rows = []
    for kind, units in groups.items():
        layers = Counter(layer_and_type(unit["name"])[0].rpartition(".")[2] for unit in units)
        where = ", ".join(
            f"{layer} ({count})" if count > 1 else layer for layer, count in sorted(layers.items(), key=_by)
        )
        kappas = [unit["kappa"] for unit in units]
        spread = [f"{number(kappas):.4g}" for number in (min, median, max)]
        rows.append([f"`{kind}`", str(len(units)), where or "-", *spread])
    beside = config.get("modules_to_save")
    more = f"\n\nTrained whole beside them: {', '.join(sorted(beside))}." if beside else ""
    heading = ["matrix", "number", "layers (how many in each)", "κ min", "median", "max"]
    return f"## What was trained\n\n{table(heading, rows)}{more}"


def _by(item: tuple[str, int]) -> int:
    return int(item[0]) if item[0].isdigit() else -1


def forgetting(measured: Mapping[str, Any]) -> str:
    """The table of forgetting.json, and how it was measured."""
    if not measured:
        return ""
    kept, rows = measured.get("kept") or {}, []
    if task := measured.get("task"):
        share = task["metric"] in SHARES
        title = f"task {task['metric'].replace('_', ' ')}" + (
            # runs of before this was counted have no number
            f", {task['examples']} examples" if share and "examples" in task else ""
        )
        rows.append(_row(title, task["before"], task["after"], kept.get(f"task_{task['metric']}"), share))
    if recall := measured.get("recall"):
        title = recall_title(recall["metric"], recall["facts"])
        rows.append(_row(title, recall["before"], recall["after"], kept.get("recall"), True))
    for name, row in measured.get("control", {}).items():
        rows.append(_row(f"{name}: loss", row["loss_before"], row["loss_after"], kept.get(f"{name}_loss")))
        rows.append(_row(f"{name}: KL to the base", 0.0, row["kl_after"], kept.get(f"{name}_kl")))
    for name, row in measured.get("lm_eval", {}).items():
        rows.append(_row(f"{name} (lm_eval)", row["before"], row["after"], kept.get(f"lm_eval/{name}")))
    heading = ["", "base", "trained", *(["kept"] if kept else [])]
    rows = [row[: len(heading)] for row in rows]
    return (
        f"## What was learned, what was forgotten\n\n{table(heading, rows)}\n\n"
        "Loss and KL are in nats a token. The base and the trained model read the same texts; a control is text of "
        "another kind than the task, and a higher loss there is what was forgotten."
        + (" \"Kept\" is this adapter, after what was trained was scaled back." if kept else "")
    )  # fmt: skip


def _row(title: str, before: Any, after: Any, kept: Any, share: bool = False) -> list[str]:
    return [
        title,
        *("-" if value is None else f"{value:.1%}" if share else f"{value:.4f}" for value in (before, after, kept)),
    ]


def scaled_back(found: Mapping[str, Any]) -> str:
    """What interpolation.json says was taken back, and what it keeps to."""
    if not found:
        return ""
    scales = sorted(found["alphas"].values())
    said = [f"What was trained is scaled back towards its base: by {scales[0]:.3f} to {scales[-1]:.3f} (1 keeps all)."]
    for name, rise in found["verified"].items():
        said.append(
            f"- {name}: the loss rose by {_shown(rise['mean'])} nats a token on {rise['documents']} documents that "
            f"took no part in choosing; with 95% confidence by at most {_shown(rise['upper'])} "
            f"(limit {found['limit']:g})."
        )  # fmt: skip
    return "## Scaled back\n\n" + "\n\n".join((said[0], "\n".join(said[1:])))


def _shown(value: float | None) -> str:
    return "more than can be measured" if value is None else f"{value:+.4f}"


def pictures(folder: Path) -> str:
    """The pictures that lie beside the card."""
    return "\n\n".join(f"![{title}]({name})" for name, title in PICTURES.items() if (folder / name).is_file())


def how_to_use(config: Mapping[str, Any], base: str | None, merged: bool, form: str) -> str:
    """Snippets to load it, to make a plain checkpoint of it, and to serve that."""
    auto = "AutoModelForCausalLM" if str(config.get("task_type")).endswith("CAUSAL_LM") else "AutoModel"
    if merged:
        load = f"from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained(FOLDER)"
        said = "## Use\n\nFOLDER is this folder, or its name on the hub."
        return f"{said}\n\n```python\n{load}\n```\n\n```bash\nvllm serve FOLDER\n```"
    named = f'"{base}"' if base else "BASE"
    ours = (
        "import kappatune_plugin  # PEFT knows the method then\n"
        if config.get("selection") and form == "kappatune"
        else ""
    )
    load = (
        f"{ours}from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"model = PeftModel.from_pretrained({auto}.from_pretrained({named}), FOLDER)"
    )
    model = f" --model {base or 'BASE'}"
    if ours and config.get("r"):
        load += "\n# no plain LoRA adapter: some of these matrices are no whole linear layers, which PEFT can't name"
    return (
        f"## Use\n\nFOLDER is this folder, downloaded or not{'' if base else ', BASE the base model'}.\n\n"
        f"Load it{NOT_IMPORTED if ours else ''}:\n\n"
        f"```python\n{load}\n```\n\n"
        f"Make a plain checkpoint, which loads without `kappatune_plugin` {__version__}:\n\n"
        f"```bash\nkappatune merge FOLDER{model} --output_dir merged\n```\n\n"
        "Serve it:\n\n```bash\nvllm serve merged\n```"
    )


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
