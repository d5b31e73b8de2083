"""The page docs/recipe-keys.md, made of the models that check the blocks of a recipe.

`python -m kappatune_plugin.recipe.keys_table docs/recipe-keys.md` writes it anew.
"""

import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kappatune_plugin.data.rows import DataSet
from kappatune_plugin.files import write_text
from kappatune_plugin.recipe.blocks import RECIPE_BLOCKS, TestSet
from kappatune_plugin.recipe.trl_keys import NAMES
from kappatune_plugin.schema import block_of

HEAD = """# Recipe keys

Every key of TRL's `SFTConfig`, `ModelConfig` and `ScriptArguments` goes at the top level of a recipe, as in a file for
`trl sft`. The blocks below are KappaTune's own; `kappatune_KEY` at the top level says the same as `KEY` in its block.
"""
# keys that take a block in one of several forms, which their types alone don't say
BLOCKS_OF_KEYS = {"data.train": DataSet, "data.test": TestSet, "forgetting.control": DataSet}


def keys_page() -> str:
    """The page as Markdown: a table for each block."""
    return "\n".join([HEAD, *(part for name, model in RECIPE_BLOCKS.items() for part in _tables(name, model))])


def _tables(name: str, model: type[BaseModel]) -> list[str]:
    head = [f"## `{name}`", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    tables = ["\n".join([*head, *(_row(field.alias or key, field) for key, field in model.model_fields.items()), ""])]
    for key, field in model.model_fields.items():
        inner = BLOCKS_OF_KEYS.get(f"{name}.{key}") or block_of(field.annotation)
        if inner is not None:
            tables += _tables(f"{name}.{key}", inner)
    return tables


def _row(key: str, field: FieldInfo) -> str:
    value = "null" if field.default is None else field.default
    default = "required" if field.is_required() else f"`{value}`"
    cells = (f"`{key}`", _type(field.annotation), default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    """An annotation in words, without null, which the default shows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in get_args(annotation) if each is not NoneType)
    if origin is Literal:
        return " or ".join(str(each) for each in get_args(annotation))
    if origin is list:
        return "a list"
    if annotation is Any:
        return "see meaning"
    return NAMES.get(origin or annotation, "a block")


if __name__ == "__main__":
    write_text(sys.argv[1], keys_page())
