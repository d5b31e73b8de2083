"""A LoRA recipe of TRL, Axolotl or LLaMA-Factory in, the same recipe for KappaTune out."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.files import write_text
from kappatune_plugin.recipe.text import BLOCKS, read_yaml
from kappatune_plugin.recipe.trl_keys import OVERWRITE, gone_key, trl_keys
from kappatune_plugin.selection.budget import parse_budget
from kappatune_plugin.toolkits.lora_recipes import (
    AXOLOTL,
    LLAMAFACTORY,
    QUANTIZED,
    TRL,
    WHERE,
    Toolkit,
    names,
    toolkit_of,
)
from kappatune_plugin.toolkits.lora_size import DEFAULT_SHARE, LoraSize, lora_size, matching_budget
from kappatune_plugin.toolkits.yaml_edit import YamlText
from kappatune_plugin.version import NAME

MATCHES = ("params", "share")
PLUGIN = "kappatune_plugin.toolkits.axolotl.KappaTunePlugin"
GIB = 2**30
# arXiv 2506.16289
PAPER_RATE = 5e-5
# of `kappatune sft` alone
FORGETTING = """# forgetting:  # measures what is forgotten, and scales back what was trained until the limit is kept
#   control: self
#   max_delta: 0.02"""
# of TRL and LLaMA-Factory
STAYS_QUANTIZED = ("load_in_4bit", "load_in_8bit", "quantization_bit")


@dataclass(frozen=True)
class Conversion:
    """A converted recipe.

    Attributes:
        path: of the recipe.
        toolkit: whose recipe it is.
        before, after: its text.
        budget: the k chosen.
        notes: why each key was removed, and what can't be carried over, a line each.
    """

    path: Path
    toolkit: Toolkit
    before: str
    after: str
    budget: Any
    notes: list[str]

    def diff(self) -> list[str]:
        """The change as a unified diff, a line each."""
        lines = (text.splitlines() for text in (self.before, self.after))
        return list(difflib.unified_diff(*lines, str(self.path), f"{self.path} (KappaTune)", lineterm=""))

    def command(self, path: str | os.PathLike) -> str:
        """What to type to train with the recipe at `path`."""
        return f"{self.toolkit.command} {path}"

    def write(self, path: str | os.PathLike | None = None) -> Path:
        """Write the converted recipe to `path`, or over the old one, which is kept as NAME.lora.yaml.

        Raises:
            KappaTuneError: the file to write exists already.
        """
        target = Path(path or self.path)
        kept = self.path.with_suffix(f".lora{self.path.suffix}")
        new = target if path else kept
        if os.path.lexists(new):
            raise KappaTuneError(f"{new} is there already. Move it away, or give another place with --output.")
        if target.is_symlink():
            raise KappaTuneError(f"{target} is a link, which would be replaced. Give the file that it leads to.")
        if path:
            write_text(target, self.after)
            return target
        write_text(kept, self.before)
        try:
            write_text(target, self.after)
        except KappaTuneError:
            # the recipe is still there, and its copy would refuse the next try
            kept.unlink()
            raise
        return target


def convert_recipe(
    path: str | os.PathLike,
    match: str = "params",
    k: Any = None,
    toolkit: str | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Convert the recipe at `path`; nothing is written.

    Args:
        match: "params": as many trainable parameters as the LoRA; "share": a tenth of the matrices.
        k: a budget to use instead of `match`.
        toolkit: trl, axolotl or llamafactory; default: recognized by the keys.

    Raises:
        KappaTuneError: not YAML, not a recipe of these toolkits, not LoRA, or it can't be edited line by line.
    """
    path = Path(path)
    if match not in MATCHES:
        raise KappaTuneError(f"--match {match} is none of {', '.join(MATCHES)}.")
    content, problems = read_yaml(path)
    if problems:
        raise KappaTuneError("\n  - ".join([f"Recipe {path} has keys twice:", *problems]))
    if numbers := [key for key in content if not isinstance(key, str)]:
        raise KappaTuneError(f"Recipe {path} has the key {numbers[0]!r}; keys are names. Delete it.")
    if content.get("adapter") == NAME or any(key.startswith(NAME) for key in content):
        raise KappaTuneError(f"{path} is a KappaTune recipe already.")
    kind = toolkit_of(content, toolkit)
    if refusal := kind.refusal(content):
        raise KappaTuneError(f"{path} is no LoRA recipe of {kind.title}: {refusal}.")
    # building the model to see LoRA's size takes most of the time
    sized = (match == "params" and k is None) or any(kind.reason(key) == QUANTIZED for key in content)
    size, found = _size(path, content, kind, trust_remote_code) if sized else (None, [])
    budget, comment = _budget(size, match, k)
    # as bytes: read_text would turn Windows' line ends into others
    before = path.read_bytes().decode("utf-8")
    new = _new_keys(kind, content, budget)
    after = _edited(before, kind, new, comment)
    _check(after, content, kind, new)
    notes = [*_gone(kind, content), *_losses(kind, content, size), *found]
    return Conversion(path, kind, before, after, budget, notes)


def _size(
    path: Path, content: Mapping[str, Any], kind: Toolkit, trust_remote_code: bool
) -> tuple[LoraSize | None, list[str]]:
    """The LoRA's size; or None and the reason why it isn't known."""
    from kappatune_plugin.data.rows import find_local

    model = content.get(kind.model)
    if not isinstance(model, str):
        return None, [f"{kind.model} names no model, so LoRA's size is unknown; k is {DEFAULT_SHARE} of the matrices."]
    try:
        return lora_size(find_local(model, path.resolve().parent), kind.options(content), trust_remote_code), []
    except KappaTuneError as error:
        reason = str(error).splitlines()[0]
        return None, [f"LoRA's size is unknown, so k is {DEFAULT_SHARE} of the matrices: {reason}"]


def _budget(size: LoraSize | None, match: str, k: Any) -> tuple[Any, str]:
    """The budget, and the comment beside it."""
    if k is not None:
        parse_budget(k)
        return k, ""
    if match == "params" and size is not None:
        return matching_budget(size)
    return DEFAULT_SHARE, "of the matrices"


def _new_keys(kind: Toolkit, content: Mapping[str, Any], budget: Any) -> dict[str, Any]:
    """The top-level keys that replace LoRA's in the converted recipe."""
    block = {"k": budget}
    if saved := kind.saved_modules(content):
        block["modules_to_save"] = saved
    if kind is LLAMAFACTORY:
        return {"finetuning_type": NAME, **{f"{NAME}_{key}": value for key, value in block.items()}}
    if kind is AXOLOTL:
        return {"plugins": [*names(content.get("plugins")), PLUGIN], "adapter": NAME, NAME: block}
    return {NAME: block}


def _edited(text: str, kind: Toolkit, new: Mapping[str, Any], comment: str) -> str:
    """`text` without LoRA's keys, and with the `new` ones where the key that turned LoRA on was."""
    edit = YamlText(text)
    gone = [key for key in edit.keys if kind.reason(key)]
    switch = kind.switch if kind.switch in edit.keys else next(iter(gone), None)
    line = edit.keys[switch][0] if switch else len(edit.lines)
    for key in gone:
        edit.remove(key)
    if kind is TRL and kind.switch in edit.keys:
        edit.remove(kind.switch)
    for key, value in new.items():
        if key == "plugins" and key in edit.keys:
            edit.append(key, PLUGIN)
        elif key in edit.keys:
            edit.set(key, _flow(value))
        else:
            edit.insert(line if key != NAME or kind is TRL else line + 1, _lines(key, value, comment))
    if kind is TRL:
        edit.insert(line, FORGETTING.splitlines())
    return edit.text()


def _lines(key: str, value: Any, comment: str) -> list[str]:
    """`key: value` as YAML, blocks over several lines, with the comment beside the budget."""
    if key == NAME:
        return [f"{NAME}:", *(f"  {line}" for inner in value for line in _lines(inner, value[inner], comment))]
    budget = key in ("k", f"{NAME}_k")
    return [f"{key}: {_flow(value)}" + (f"  # {comment}" if comment and budget else "")]


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def _check(after: str, content: Mapping[str, Any], kind: Toolkit, new: Mapping[str, Any]) -> None:
    """Check that the edited text has the intended content, since anchors and merged mappings reach over lines."""
    stays = {key: value for key, value in content.items() if not kind.reason(key) and key != kind.switch}
    try:
        found = yaml.safe_load(after)
    except yaml.YAMLError as error:
        raise KappaTuneError(f"The recipe can't be edited line by line: {error}. Write it without anchors.") from error
    if found != {**stays, **new}:
        wrong = sorted(key for key in {*found, *stays, *new} if found.get(key) != {**stays, **new}.get(key))
        raise KappaTuneError(f"The recipe can't be edited line by line: check {', '.join(wrong)}, avoid `<<:`.")


def _gone(kind: Toolkit, content: Mapping[str, Any]) -> list[str]:
    """Why keys were removed, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for key, value in content.items():
        reason = kind.reason(key)
        if reason and value not in (None, False):
            reasons.setdefault(reason, []).append(key)
    return [f"{', '.join(keys)}: {reason}." for reason, keys in reasons.items()]


def _losses(kind: Toolkit, content: Mapping[str, Any], size: LoraSize | None) -> list[str]:
    """Notes on what the conversion can't carry over and the user has to decide."""
    notes = []
    reasons = {kind.reason(key): key for key, value in content.items() if value}
    if WHERE in reasons and (targets := _restriction(kind.options(content))):
        key = f"{NAME}_include" if kind is LLAMAFACTORY else f"to {NAME} include"
        notes.append(f"To train only where LoRA sat, add {key}: [{', '.join(targets)}].")
    if QUANTIZED in reasons:
        needed = f", where it takes {2 * size.model / GIB:.1f} GiB" if size else ""
        notes.append(f"The base is loaded in bfloat16{needed}; one that was saved quantized by bitsandbytes stays so.")
    if any(content.get(key) and not kind.reason(key) for key in STAYS_QUANTIZED):
        notes.append("The base stays quantized, except for the selected matrices, which are dequantized.")
    rate = content.get("learning_rate", "at its default")
    if not _at_most(rate, PAPER_RATE):
        notes.append(
            f"learning_rate stays {rate}: LoRA's are high for weights that are trained themselves; the paper uses 5e-5."
        )
    if kind is TRL:
        notes += _other_trainer(content)
    return notes


def _at_most(value: Any, limit: float) -> bool:
    """Whether `value` is a number up to `limit`; YAML reads 5e-5 as a text."""
    try:
        return float(value) <= limit
    except (TypeError, ValueError):
        return False


def _restriction(options: Mapping[str, Any]) -> list[str]:
    """Globs on the names of the matrices that LoRA was put on; none for all of them."""
    targets = options.get("target_modules")
    if not isinstance(targets, list):
        return []
    return [f"'*.{target}.weight'" for target in [*targets, *_experts(options.get("target_parameters") or ())]]


def _experts(parameters: Sequence[str]) -> list[str]:
    """The names that KappaTune gives the experts in fused `parameters`, as globs."""
    if not parameters:
        return []
    from kappatune_plugin.weights.units import FUSED_PROJECTIONS

    split = [target.rpartition(".") for target in parameters]
    return [f"{owner}.*.{part}" for owner, _, last in split for part in FUSED_PROJECTIONS.get(last, (last,))]


def _other_trainer(content: Mapping[str, Any]) -> list[str]:
    known = {*trl_keys(), *BLOCKS, OVERWRITE}
    unknown = [key for key in content if key not in known and TRL.reason(key) is None]
    notes = [f"{key}: {gone}." for key in unknown if (gone := gone_key(key, content[key]))]
    unknown = [key for key in unknown if gone_key(key) is None]
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: no keys of `trl sft`, the one script that `kappatune sft` runs. For other trainers "
            "of TRL pass peft_config=KappaTuneConfig(...) in Python."
        )
    return notes
