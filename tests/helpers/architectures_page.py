"""Write docs/architectures.md: `PYTHONPATH=.:tests python -m helpers.architectures_page docs/architectures.md`."""

import re
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
import transformers

from helpers.architectures import CLASSES, Outcome, all_architectures, examine
from kappatune_plugin.files import write_text

PATTERNS_SHOWN = 3
INTRO = """# Architectures

What was tried of transformers {transformers} with torch {torch}, on tiny random models (two layers or a layer of each
kind, float32, CPU) of everything in four of its Auto classes. Of each model **all** matrices were selected, embeddings
and head too, and compared with full fine-tuning of the same model on the same batch of text:

1. each matrix gets full fine-tuning's gradient (relative tolerance 1e-4);
2. a step of SGD on half of the matrices, drawn at random, moves those as far as full fine-tuning would, and no other
   parameter at all;
3. the adapter, saved and loaded on the base, and the merged checkpoint, saved and loaded, hold the same values bit by
   bit.

{built} of {tried} models could be made tiny by rule and run on text alone; {right} of them are right in all three
points{wrong}.
`pytest -m slow tests/tuner/test_architectures.py` tries them again, and this page is written by
`PYTHONPATH=.:tests python -m helpers.architectures_page docs/architectures.md`.
"""


def page(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """The page, from (Auto class, model type) -> what was found."""
    built = [each for each in outcomes.values() if not each.not_built]
    wrong = [each for each in built if each.wrong or each.refused]
    parts = [
        INTRO.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            built=len(built),
            tried=len(outcomes),
            right=len(built) - len(wrong),
            wrong=f", {len(wrong)} are not (below)" if wrong else "",
        ),
        "## Trained right\n",
    ]
    for auto in CLASSES:
        good = [kind for (cls, kind), each in outcomes.items() if cls == auto and each in built and each not in wrong]
        parts.append(f"**{auto}** ({len(good)}): {', '.join(good)}.\n")
    parts += _section(
        "Matrices without a gradient on text",
        "Full fine-tuning on text gives these none either: they are read only with images or sound, by a decoder that "
        "has an encoder beside it, by a choice that has no derivative (indexers, routers), or by no token of the batch "
        "(experts). The rest of the model is trained. A run that selects one stops before its first step and names it, "
        "unless it is an expert. What lies beside the language model (group `tower`: encoders of images or sound, "
        "projectors) and 3-D weights that aren't experts (group `stack`) are left out unless `include` names them; "
        "here both were included.",
        "matrices",
        outcomes,
        lambda each: each.without_gradient,
        lambda each: f"{len(each.without_gradient)} of {each.matrices}: {_patterns(each.without_gradient)}",
    )
    parts += _section(
        "Named otherwise than in the checkpoint",
        "The checkpoint splits, joins or leaves out (as tied) what the model in memory has as one matrix. Reports and "
        "adapters name it as in memory; it is trained, saved and merged like any other.",
        "names in memory",
        outcomes,
        lambda each: each.other_names,
        lambda each: _patterns(each.other_names),
    )
    fused = sorted({each.model_type for each in built if each.fused})
    parts.append(
        f"Matrices that are slices of one tensor in the checkpoint too, which has no key for them (experts, and in "
        f"some of these attention heads or blocks): {', '.join(fused)}.\n"
    )
    parts += _section("Wrong or refused", "", "what", outcomes, lambda each: each in wrong, _fault)
    parts += _section(
        "Not tried",
        "The rules that make a config tiny don't give one that transformers can run on text, or a library is missing.",
        "what transformers said",
        outcomes,
        lambda each: each.not_built,
        lambda each: _cell(each.not_built),
    )
    return "\n".join(parts)


def _section(
    title: str,
    text: str,
    column: str,
    outcomes: dict[tuple[str, str], Outcome],
    belongs: Callable[[Outcome], object],
    cell: Callable[[Outcome], str],
) -> list[str]:
    rows = [f"| {kind} | {auto} | {cell(each)} |" for (auto, kind), each in outcomes.items() if belongs(each)]
    if not rows:
        return []
    head = [f"## {title}\n", *([f"{text}\n"] if text else [])]
    return [*head, f"| architecture | class | {column} |\n|---|---|---|", *rows, ""]


def _patterns(names: Iterable[str]) -> str:
    """The names with `*` for numbers, the first of them."""
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    more = len(patterns) - PATTERNS_SHOWN
    return ", ".join(f"`{each}`" for each in patterns[:PATTERNS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _fault(outcome: Outcome) -> str:
    return _cell(outcome.refused or outcome.wrong[0])


def _cell(text: str) -> str:
    # a bracket would be a link
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    write_text(sys.argv[1], page({each: examine(*each) for each in all_architectures()}))
